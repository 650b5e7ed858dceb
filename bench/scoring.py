"""How fast `trm-audit` scores, beside what is done today and what the machine allows.

    python -m bench.scoring --model CHECKPOINT --scale 1/32 --modes full --out cpu-float32

One process, one model in memory, interleaved rounds, two that do not count, medians of the others. The rollouts are
made in a temporary folder and deleted afterwards: at scale 1, full vocabulary, W5 is 13 GB for a vocabulary of 49,152
and 40 GB for 152,064. Results go to bench/results/OUT.json, and bench/RESULTS.md is rendered from all of them.

Arms (see `baselines`, `limit`, `ours`): padded (a), padded-kl (a'), packed (b), ours (d), and ours without one of its
parts: ours-packed, ours-padded, ours-torch, ours-no-read-ahead. The limit (c) is always computed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.baselines import NotMeasured, Packed, Padded, attention, kl_alone
from bench.limit import Rates, limit, rates
from bench.material import Material, make
from bench.measure import WARM_UP, Arm, Memory, machine, measure
from bench.models import checkpoint
from bench.ours import VARIANTS, Ours
from bench.workloads import WORKLOADS, Work, trajectories, work
from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.loading import pick_device, pick_dtype
from trm_audit.engine.model import MAX_TOKENS, TrainerModel

MODES = ("sampled", "top64", "full")
BASELINES = ("padded", "padded-kl", "packed")
SEED = 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure scoring.", epilog="See the docstrings in bench/.")
    parser.add_argument("--model", required=True, help="checkpoint folder, 7b, wide, or model_type:name=value,...")
    parser.add_argument("--out", required=True, help="name of the JSON file in results/")
    parser.add_argument("--folder", type=Path, default=results.HERE, help="where results/ and RESULTS.md are")
    parser.add_argument("--title", help="heading of its section; --out by default")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--arms", nargs="+", choices=(*BASELINES, *VARIANTS), default=[*BASELINES, *VARIANTS])
    parser.add_argument("--scale", type=Fraction, default=Fraction(1, 32), help="of all lengths alike, such as 1/32")
    parser.add_argument("--groups", type=int, default=1, help="groups of a workload")
    parser.add_argument("--rounds", type=int, default=5, help=f"that count, after {WARM_UP} that do not")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-tokens", type=int, help="of one forward, ours and packed: 4096 on a CPU, 16384 on a GPU")
    parser.add_argument("--head-rows", type=int, default=128)
    parser.add_argument("--cold", action="store_true", help="drop stored logits from the page cache before each arm")
    return parser.parse_args(given)


def main(options: argparse.Namespace) -> int:
    """Runs everything; returns 1 if an arm was wrong."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    options.max_tokens = options.max_tokens or MAX_TOKENS[device.type]
    with tempfile.TemporaryDirectory(prefix="trm-audit-bench-") as tmp:
        folder = checkpoint(options.model, Path(tmp) / "model", device, dtype)
        trainer = TrainerModel(
            find_checkpoint(folder), device=options.device, dtype=options.dtype, max_tokens=options.max_tokens
        )
    bench = Bench(options, trainer)
    run = {
        "title": options.title or options.out,
        "model": Path(options.model).name,
        "machine": machine(device),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "sharing": trainer.sharing.rung,
        "warm_up": WARM_UP,
        "rounds": options.rounds,
        "groups": options.groups,
        "seed": SEED,
        "files": "files dropped from the page cache first" if options.cold else "files in the page cache",
        "rates": asdict(bench.rates),
        "cells": [cell for name in options.workloads for cell in bench.workload(name)],
    }
    file = options.folder / "results" / f"{options.out}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    results.write(options.folder)
    print("\n\n".join(part for part in results.section(run) if part))
    return int(any(timing["wrong"] for cell in run["cells"] for timing in cell["arms"].values()))


class Bench:
    """One loaded model, measured on workload after workload.

    Args:
        options: the command line.
        trainer: the model.
    """

    def __init__(self, options: argparse.Namespace, trainer: TrainerModel) -> None:
        self.options, self.trainer, self.hf = options, trainer, trainer.module
        with torch.inference_mode(), attention(self.hf, "sdpa"):
            self.hf(input_ids=torch.arange(1, 65, device=trainer.device)[None], use_cache=False)
        self.memory = Memory(trainer.device)
        self.rates: Rates = rates(self.hf, options.max_tokens, options.head_rows)

    def workload(self, name: str) -> list[dict[str, Any]]:
        """One result for each mode; its files are deleted again."""
        options = self.options
        items = trajectories(WORKLOADS[name], float(options.scale), options.groups, self.trainer.vocab_size, SEED)
        counted = work(items)
        print(f"{name}: {counted}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="trm-audit-bench-") as tmp:
            with attention(self.hf, "sdpa"):
                material = make(items, self.hf, self.trainer.vocab_size, Path(tmp), options.modes)
            cells = [self._mode(name, mode, material, counted) for mode in options.modes]
            del material
        gc.collect()
        return cells

    def _mode(self, name: str, mode: str, material: Material, counted: Work) -> dict[str, Any]:
        options = self.options
        file = material.logits_file() if mode == "full" else None
        timings = measure(
            self._arms(mode, material),
            material.reference,
            self.memory,
            options.rounds,
            strict=self.trainer.dtype == torch.float32,
            cold=file if options.cold else None,
        )
        best = limit(self.hf, counted, self.trainer.vocab_size, self.rates, file, cold=options.cold)
        arms = {
            arm: {**asdict(timing), "median": timing.median if timing.seconds else None}
            for arm, timing in timings.items()
        }
        for arm, timing in timings.items():
            rounds = ", ".join(f"{seconds:.2f}" for seconds in timing.seconds)
            print(f"  {mode} {arm}: {timing.failed or rounds + ' s'}", file=sys.stderr, flush=True)
        limits = {**asdict(best), "seconds": best.seconds}
        return {
            "workload": name,
            "mode": mode,
            "scale": float(options.scale),
            "work": asdict(counted),
            "arms": arms,
            "limit": limits,
        }

    def _arms(self, mode: str, material: Material) -> dict[str, Arm]:
        """Those asked for that this mode has: KL alone and read-ahead need stored logits."""
        options = self.options
        arms: dict[str, Arm] = {
            "padded": self._plain(Padded(self.hf, material, mode)),
            "packed": Packed(self.hf, material, mode, options.max_tokens),
        }
        if mode == "full":
            arms["padded-kl"] = self._plain(Padded(self.hf, material, mode, kl_alone))
        for name, variant in VARIANTS.items():
            if variant.read_ahead or mode == "full":
                arms[name] = Ours(self.trainer, material, mode, variant, head_rows=options.head_rows)
        return {name: arms[name] for name in (*BASELINES, *VARIANTS) if name in arms and name in options.arms}

    def _plain(self, arm: Arm) -> Arm:
        """An arm with the library's own attention."""

        def run() -> Any:
            with attention(self.hf, "sdpa"):
                return arm()

        return run


if __name__ == "__main__":
    try:
        sys.exit(main(arguments()))
    except NotMeasured as error:
        sys.exit(str(error))
