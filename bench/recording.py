"""What recording costs: generation with and without the recorder, its arithmetic beside a model's, its time alone.

    python -m bench.recording --model CHECKPOINT --out bench/RECORDING.md

Generation is timed in interleaved rounds of one process after two that do not count, and both arms draw the same
tokens (checked in each round). On a CPU the time is the process's own, so that other processes matter little. A
Markdown page is written, or printed without --out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import WARM_UP, machine
from trm_audit.engine.loading import pick_device
from trm_audit.record.evidence import Recipe, evidence
from trm_audit.record.transformers import HELD_LOGITS, GenerateRecorder
from trm_audit.rollout import Sampling
from trm_audit.shards.read import find_shards

RECIPES = (Recipe(20, 64), Recipe(64, 128))
MODELS = {"SmolLM2-135M": (134_515_008, 49_152), "Qwen2.5-7B": (7_615_616_512, 152_064)}
"""Parameters and vocabulary, as their model cards and configurations state them."""
PROMPT_TOKENS = 32


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure recording.", epilog="See the docstring.")
    parser.add_argument("--model", type=Path, help="checkpoint folder; without it, generation is not timed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="of the model's weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows that are generated together")
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--rounds", type=int, default=5, help=f"that count, after {WARM_UP} that do not")
    parser.add_argument("--out", type=Path, help="where the page goes")
    return parser.parse_args(given)


def main(options: argparse.Namespace) -> None:
    """Measures, and writes the page."""
    device = pick_device(options.device)
    parts = ["# What recording costs", "Written by `python -m bench.recording`.", *described(device)]
    if options.model:
        parts += ["## Generation with and without the recorder", table(HEADINGS, generation(options, device))]
    parts += ["## Arithmetic of one token", table(SHARES, shares())]
    parts += ["## The evidence alone", table(ALONE, alone(device, options.rounds))]
    text = "\n\n".join(parts) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def described(device: torch.device) -> list[str]:
    """The machine, in a sentence."""
    found = machine(device)
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers"))
    kind = "the clock" if device.type == "cuda" else "the process on the CPU"
    where = found["gpu"] or f"{found['cpu']} ({', '.join(map(str, found['flags']))})"  # type: ignore[call-overload]
    return [
        f"{where}, {found['cores']} cores, {found['threads']} threads; {versions}. Times are milliseconds of {kind}."
    ]


def table(headings: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table, figures to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEADINGS = (
    "rows, K, m",
    "plain, median (least)",
    "recorded, median (least)",
    "ratio of medians",
    "of minima",
    "bytes a token",
)


def generation(options: argparse.Namespace, device: torch.device) -> Iterator[Sequence[str]]:
    """A line for each batch and recipe. The first step of a call is the prompt's; responses have one length."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval().to(device)
    for rows in options.batches:
        for recipe in RECIPES:
            with tempfile.TemporaryDirectory(prefix="trm-audit-bench-") as folder:
                arms = Arms(model, rows, options.tokens, recipe, Path(folder))
                plain, recorded = timed([arms.plain, arms.recorded], options.rounds)
                size = arms.bytes_per_token()
            yield [
                f"{rows}, {recipe.k}, {recipe.dim}",
                shown(plain),
                shown(recorded),
                f"{statistics.median(recorded) / statistics.median(plain):.3f}",
                f"{min(recorded) / min(plain):.3f}",
                f"{size:.0f}",
            ]


class Arms:
    """`generate` twice: as it is, and with the recorder and its shard."""

    def __init__(self, model: Any, rows: int, tokens: int, recipe: Recipe, folder: Path) -> None:
        self._model, self._recipe, self._folder = model, recipe, folder
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 2000, (rows, PROMPT_TOKENS), generator=rng).to(model.device)
        self._given: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "do_sample": True,
            "top_k": 0,
            "min_new_tokens": tokens,
            "max_new_tokens": tokens,
            "pad_token_id": 0,
        }
        self._tokens = rows * tokens
        self._expected: torch.Tensor | None = None

    def plain(self) -> None:
        self._check(self._model.generate(**self._given))

    def recorded(self) -> None:
        with GenerateRecorder(self._folder, self._recipe) as recorder:
            self._check(self._model.generate(**self._given, custom_generate=recorder))

    def _check(self, out: torch.Tensor) -> None:
        if self._expected is not None and not torch.equal(out, self._expected):
            raise RuntimeError("the arms have drawn different tokens")
        self._expected = out

    def bytes_per_token(self) -> float:
        """Of a shard, with its ids."""
        sizes = [Path(shard.path).stat().st_size for shard in find_shards([str(self._folder)], "rollouts").shards]
        return sum(sizes) / len(sizes) / self._tokens


def timed(arms: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of the rounds that count, of each arm; every call from one seed."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    out: list[list[float]] = [[] for _ in arms]
    for turn in range(WARM_UP + rounds):
        for seconds, arm in zip(out, arms, strict=True):
            torch.manual_seed(0)
            began = clock()
            arm()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                seconds.append(clock() - began)
    return out


SHARES = (
    "model, K, m",
    "multiply-adds of the model",
    "of the sketch",
    "share",
    "signs read, of the weights in bfloat16",
)


def shares() -> Iterator[Sequence[str]]:
    """N multiply-adds a token of the model, without its attention; V m of the sketch. Signs are a byte each."""
    for name, (parameters, vocab) in MODELS.items():
        for recipe in RECIPES:
            work = vocab * recipe.dim
            yield [
                f"{name}, {recipe.k}, {recipe.dim}",
                f"{parameters / 1e6:,.0f} M",
                f"{work / 1e6:.1f} M",
                f"{work / parameters:.2%}",
                f"{work / (2 * parameters):.2%}",
            ]


ALONE = ("V, K, m", "tokens at once", "a token, median (least)", "one token at once, median (least)")


def alone(device: torch.device, rounds: int) -> Iterator[Sequence[str]]:
    """As many tokens together as the recorder for `generate` takes, and one by one."""
    for _, vocab in MODELS.values():
        many = max(1, HELD_LOGITS // vocab)
        logits = torch.randn(many, vocab, generator=torch.Generator().manual_seed(0)).mul_(3).to(device)
        ids = logits.argmax(1)
        for recipe in RECIPES:

            def work(count: int, recipe: Recipe = recipe, logits: Any = logits, ids: Any = ids) -> None:
                evidence(logits[:count], ids[:count], Sampling(logprobs_mode="processed"), recipe)

            together, single = timed([lambda: work(many), lambda: work(1)], rounds)  # noqa: B023 - called at once
            each = [seconds / many for seconds in together]
            yield [f"{vocab:,}, {recipe.k}, {recipe.dim}", str(many), shown(each), shown(single)]


def shown(seconds: Sequence[float]) -> str:
    """Milliseconds."""
    return f"{statistics.median(seconds) * 1e3:,.2f} ({min(seconds) * 1e3:,.2f})"


if __name__ == "__main__":
    main(arguments())
