"""The compiled CPU code: every width and type, every number a half can hold, and every way of having no compiler."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from trm_audit.numerics import native, rows, torch_rows

TYPES = (torch.float16, torch.bfloat16, torch.float32)
IMPLEMENTATIONS = [
    pytest.param(native, id="native", marks=pytest.mark.skipif(not native.available(), reason="no C++ compiler")),
    pytest.param(torch_rows, id="torch"),
]
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def some_logits(n: int, vocab: int, seed: int, excluded: float = 0.1) -> Tensor:
    """Logits [n, vocab], a share of them -inf, token 0 never."""
    rng = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, vocab, generator=rng) + 10 * torch.randn(n, 1, generator=rng)
    out = torch.rand(n, vocab, generator=rng) < excluded
    out[:, 0] = False
    return logits.masked_fill(out, -torch.inf)


@pytest.mark.parametrize("code", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 2, 7, 15, 16, 17, 1023, 1024, 1025, 3000, 50257])
@pytest.mark.parametrize("trainer_type", TYPES)
@pytest.mark.parametrize("rollout_type", TYPES)
def test_every_width_and_pair_of_types_agrees_with_float64(
    rollout_type: torch.dtype, trainer_type: torch.dtype, vocab: int, code: ModuleType
) -> None:
    rollout, trainer = some_logits(3, vocab, 1), some_logits(3, vocab, 2)
    rollout[1] = trainer[1] = some_logits(1, vocab, 3)[0]  # and a pair that differs by its rounding alone
    rollout, trainer = rollout.to(rollout_type), trainer.to(trainer_type)
    ids = torch.tensor([0, vocab // 2, vocab - 1])
    found = code.pair(rollout, trainer, ids)
    wanted = torch_rows.pair(rollout.double(), trainer.double(), ids)
    torch.testing.assert_close(found[:, :2], wanted[:, :2], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found[:, 2:], wanted[:, 2:], rtol=2e-6, atol=2e-6)
    for side, logits in ((0, rollout), (1, trainer)):
        torch.testing.assert_close(
            code.single(logits, ids), found[:, [5 + side, 3 + side, 7 + side]], rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 20])
@compiler
def test_every_value_of_16_bits_is_read_exactly(width: int, dtype: torch.dtype) -> None:
    # GIVEN all 65536 of them, each the only token of its row that has any probability
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = torch.full((65536, width), -torch.inf, dtype=dtype)
    logits[:, width // 2] = values
    # THEN log-sum-exp is that value, and no number for NaN and the infinities
    found = native.single(logits, None)[:, 2]
    finite = values.isfinite()
    assert torch.equal(found[finite], values.double()[finite])
    assert not bool(found[~finite].isfinite().any())


@pytest.mark.parametrize("code", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_tail_agrees_with_a_sort(dtype: torch.dtype, code: ModuleType) -> None:
    vocab, k = 1500, 6
    for seed, scale in enumerate([1.0, 0.0, 1e-3, 30.0]):  # 0: all alike
        logits = some_logits(40, vocab, seed, excluded=0.05 if seed else 0.0)
        logits = torch.where(logits.isinf(), logits, logits * scale).to(dtype)
        ids = torch.randint(0, vocab, (40, k), generator=torch.Generator().manual_seed(seed)).sort(1).values
        ids[::3, 1] = ids[::3, 2]  # repeated
        count = torch.tensor([0, 1, 7, 700, vocab - k, vocab, 75, 76] * 5)
        found = code.tail(logits, ids, count).numpy()
        for row in range(40):
            tail = np.sort(np.delete(logits[row].double().numpy(), np.unique(ids[row])))
            n = min(int(count[row]), len(tail))
            upcoming = tail[n] if n < len(tail) else 0.0
            wanted = len(tail), np.logaddexp.reduce(tail), tail[:n].sum(), upcoming, tail[0], tail[-1]
            np.testing.assert_allclose(found[row], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("code", IMPLEMENTATIONS)
def test_a_tail_that_is_empty_or_excluded_or_enormous_is_still_a_tail(code: ModuleType) -> None:
    inf, big = torch.inf, torch.finfo(torch.float32).max
    logits = torch.tensor([[1.0, 2, 3, 4], [1, -inf, -inf, 4], [0, -big, big, -inf], [5, 5, 5, 5]])
    everything, ends = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 3, 3]])
    assert code.tail(logits[:1], everything, torch.tensor([2])).tolist() == [[0, -inf, 0, 0, 0, 0]]
    assert code.tail(logits[1:2], ends, torch.tensor([1])).tolist() == [[2, -inf, -inf, -inf, -inf, -inf]]
    assert code.tail(logits[2:3], torch.tensor([[0, 0]]), torch.tensor([2])).tolist() == [
        [3, big, -inf, big, -inf, big]
    ]
    assert code.tail(logits[3:], ends, torch.tensor([9]))[:, 2:].tolist() == [[10, 0, 5, 5]]


@pytest.mark.parametrize("code", IMPLEMENTATIONS)
def test_rows_may_lie_anywhere_in_memory(code: ModuleType) -> None:
    rollout, trainer = some_logits(12, 2000, 4).half(), some_logits(12, 2000, 5)
    ids = torch.arange(12)
    wanted = code.pair(rollout, trainer, ids)
    wider = torch.cat([trainer, trainer], 1)
    close(code.pair(rollout, wider[:, :2000], ids), wanted)
    close(code.pair(rollout.T.contiguous().T, trainer, ids), wanted)
    close(code.pair(rollout[::2], trainer[::2], ids[::2]), wanted[::2])
    one = code.single(trainer[:1], ids[:1])
    close(code.single(trainer[:1].expand(5, -1), ids[:1].expand(5)), one.expand(5, -1))
    close(code.single(trainer[:, 1:], ids), code.single(trainer[:, 1:].clone(), ids))


def close(found: Tensor, wanted: Tensor) -> None:
    """torch adds up in another order where the memory lies otherwise."""
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@compiler
def test_figures_are_the_same_bits_with_any_number_of_threads_and_neighbours() -> None:
    rollout, trainer, ids = some_logits(23, 5000, 6).half(), some_logits(23, 5000, 7), torch.arange(23)
    known, count = torch.arange(46).reshape(23, 2), torch.arange(0, 4600, 200)
    alone = torch.cat([native.pair(rollout[i : i + 1], trainer[i : i + 1], ids[i : i + 1]) for i in range(23)])
    tails = torch.cat([native.tail(trainer[i : i + 1], known[i : i + 1], count[i : i + 1]) for i in range(23)])
    for number in (1, 2, 5, 40):
        torch.set_num_threads(number)
        assert torch.equal(native.pair(rollout, trainer, ids), alone)
        assert torch.equal(native.tail(trainer, known, count), tails)


def forget() -> None:
    native._library.cache_clear()
    rows._compiled.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test's own, nothing compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    forget()
    yield tmp_path / "cache" / "trm-audit"
    forget()


def chosen() -> object:
    """What computes two rows of float32, and whether it does."""
    code = rows.kernel(torch.zeros(2, 3))
    assert code.single(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))[:, 0].exp().tolist() == pytest.approx(
        [1 / 3] * 2
    )
    return code


@compiler
def test_what_was_compiled_is_kept_for_its_owner_alone_found_again_and_not_used_when_damaged(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen() is native
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (kept,) = cache.iterdir()
    made = kept.stat()
    forget()
    assert chosen() is native
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    # GIVEN a damaged one in another cache (a path that is loaded is not read again)
    other = tmp_path / "other" / "trm-audit"
    other.mkdir(parents=True, mode=0o700)
    (other / kept.name).write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other.parent))
    forget()
    assert chosen() is torch_rows


@compiler
def test_another_compiler_or_flag_makes_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() is native
    forget()
    monkeypatch.setenv("CXX", "g++ -O1")
    assert chosen() is native
    assert len(list(cache.iterdir())) == 2


@compiler
def test_processes_that_compile_at_once_do_not_disturb_each_other(cache: Path) -> None:
    code = "import torch; from trm_audit.numerics import rows; print(rows.kernel(torch.zeros(1, 2)).__name__)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate()[0].strip() for one in both] == ["trm_audit.numerics.native"] * 2
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler_torch_computes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for none in ("/nowhere/g++", "false", "true"):  # absent, failing, making nothing
        monkeypatch.setenv("CXX", none)
        forget()
        assert chosen() is torch_rows
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    forget()
    assert chosen() is torch_rows
    assert not list(cache.iterdir()) if cache.exists() else True


@compiler
def test_a_compiler_whose_figures_are_wrong_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GIVEN one that takes 1/2! for .51
    script = tmp_path / "g++"
    script.write_text(
        '#!/bin/sh\nfor f in "$@"; do case $f in *.cpp) sed -i "s/5.0000001201e-1/5.1e-1/" "$f";; esac; done\n'
        + f'exec {shlex.quote(str(shutil.which("g++")))} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert chosen() is torch_rows
    assert native.available()  # it did compile


@compiler
def test_a_cache_that_is_no_folder_or_that_others_can_write_is_not_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert chosen() is torch_rows
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    forget()
    assert chosen() is torch_rows


def test_the_environment_and_a_with_block_turn_compiled_code_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rows.torch_only():
        assert chosen() is torch_rows
    monkeypatch.setenv("TRM_AUDIT_NATIVE", "0")
    assert chosen() is torch_rows
    assert not cache.exists()


def test_float64_is_computed_in_float64() -> None:
    assert rows.kernel(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)) is torch_rows
