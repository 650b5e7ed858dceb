"""The GPU kernels' arithmetic, in Triton's interpreter on a CPU, and that they compile for GPUs (none is needed).

The interpreter is chosen when triton is imported, so kernels run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trm_audit.numerics import torch_rows

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = """
import sys, torch
from trm_audit.numerics import triton_rows
cases = torch.load(sys.argv[1])
pairs = [triton_rows.pair(*case) for case in cases]
singles = [triton_rows.single(trainer, ids) for _, trainer, ids in cases]
rollout, trainer, ids = cases[-1]
alone = torch.cat([triton_rows.pair(rollout[i:i+1], trainer[i:i+1], ids[i:i+1]) for i in range(len(ids))])
torch.save((pairs, singles, alone), sys.argv[2])
"""

COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trm_audit.numerics import triton_rows
options = dict(triton_rows.OPTIONS)
block = {"block": options.pop("block")}
for kernel, logits, numbers in (
    (triton_rows._single_kernel, {"logits": "*bf16"}, {"stride": "i64", "vocab": "i32"}),
    (triton_rows._pair_kernel, {"rollout": "*fp16", "trainer": "*fp32"},
     {"stride_p": "i64", "stride_q": "i64", "vocab": "i32"}),
):
    signature = {**logits, "ids": "*i64", "sums": "*fp32", **numbers, "block": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=block)
    for capability in (80, 90):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.__name__, capability, len(made.asm["cubin"]) > 0)
"""

TYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32}
WIDTHS = (1, 2, 37, 2047, 2048, 2049, 5000)
CASES = [
    *(("float", "bfloat", vocab) for vocab in (37, 5000)),
    *(("bfloat", "half", vocab) for vocab in (37, 5000)),
    *(("half", "float", vocab) for vocab in WIDTHS),
]


def inputs(first: str, second: str, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Five pairs of rows: far, near, alike, with -inf among them, with a defect."""
    rng = torch.Generator().manual_seed(vocab)
    trainer = 4 * torch.randn(5, vocab, generator=rng)
    rollout = trainer + torch.tensor([3.0, 1e-2, 0, 1, 1])[:, None] * torch.randn(5, vocab, generator=rng)
    rollout[3, 1::3], trainer[3, 1::2] = -torch.inf, -torch.inf
    rollout[4, vocab // 2] = [torch.nan, torch.inf, -torch.inf][vocab % 3]
    trainer[4, vocab // 3 :] = -torch.inf
    ids = torch.tensor([0, vocab - 1, vocab // 2, 0, vocab // 4])
    return rollout.to(TYPES[first]), trainer.to(TYPES[second]), ids


def run(code: str, *arguments: Path, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]  # numpy's, of overflows not used
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], list[Tensor], Tensor]:
    folder = tmp_path_factory.mktemp("triton")
    torch.save([inputs(*case) for case in CASES], folder / "in.pt")
    run(INTERPRETED, folder / "in.pt", folder / "out.pt", TRITON_INTERPRET="1")
    found: tuple[list[Tensor], list[Tensor], Tensor] = torch.load(folder / "out.pt")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_arithmetic_agrees_with_float64(
    case: tuple[str, str, int], interpreted: tuple[list[Tensor], list[Tensor], Tensor]
) -> None:
    rollout, trainer, ids = inputs(*case)
    found, alone = (part[CASES.index(case)].clone() for part in interpreted[:2])
    wanted = torch_rows.pair(rollout.double(), trainer.double(), ids)
    wanted_alone = torch_rows.single(trainer.double(), ids)
    # THEN a row that is not a distribution shows, and nothing else does
    for ours, theirs, columns in ((found, wanted, [7, 8]), (alone, wanted_alone, [2])):
        assert torch.equal(ours[:, columns].isfinite(), theirs[:, columns].isfinite())
        ours[:, columns], theirs[:, columns] = (x[:, columns].nan_to_num(0, 0, 0) for x in (ours, theirs))
    torch.testing.assert_close(found[:, :2], wanted[:, :2], rtol=1e-4, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(found[:, 2:], wanted[:, 2:], rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(alone, wanted_alone, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_a_row_gives_the_same_bits_with_any_neighbours(
    interpreted: tuple[list[Tensor], list[Tensor], Tensor],
) -> None:
    pairs, _, alone = interpreted
    assert torch.equal(pairs[-1].nan_to_num(7), alone.nan_to_num(7))


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    lines = run(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").split("\n")[:-1]
    kernels = ("_single_kernel", "_pair_kernel")
    assert lines == [f"{name} {capability} True" for name in kernels for capability in (80, 90)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_kernels_are_chosen_and_agree_with_float64() -> None:
    from trm_audit.numerics import rows, triton_rows

    for case in CASES:
        rollout, trainer, ids = inputs(*case)
        assert rows.kernel(rollout.cuda(), trainer.cuda()) is triton_rows
        found = triton_rows.pair(rollout.cuda(), trainer.cuda(), ids.cuda()).cpu()[:4]
        wanted = torch_rows.pair(rollout.double(), trainer.double(), ids)[:4]
        torch.testing.assert_close(found[:, :2], wanted[:, :2], rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[:, 2:], wanted[:, 2:], rtol=2e-6, atol=5e-6)
