"""What sketches lose: their estimates and bounds beside the exact KL and TV of full logits and a checkpoint.

python -m bench.sketch_accuracy ROLLOUTS CHECKPOINT

Two data sets: the rollouts of the folder ROLLOUTS, with their full logits beside them, and ones sampled here from
CHECKPOINT under noise. The evidence is that of `trm_audit.record`, as a shard holds it; bytes are those of a zstd
Parquet file. Writes one file of `bench/results/sketches/`; `python -m bench.sketch_page` shows it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.measure import machine
from bench.sketch_coverage import CONFIDENCE, HALF, OUT, limits, tail_distances
from bench.sketch_material import Response, sampled, stored, true_distances
from trm_audit.numerics.sketch import Sketch, sketch
from trm_audit.numerics.sketch_bounds import SketchBounds, compare_sketch
from trm_audit.record.evidence import Recipe, TokenEvidence, evidence
from trm_audit.shards.sketches import sketch_columns

GRID = ((20, 64), (20, 128), (64, 128), (64, 256))
KL_DELTAS, TV_DELTAS = (0.02, 0.05, 0.1), (0.05, 0.1, 0.2)
NOISE, SAMPLES, LENGTH = 0.02, 4, 48
SINGLE = 2.0**-24
SINGLE_LISTS = "rollout_topk_logprobs as float32"

Floats = NDArray[np.float64]


def as_sketch(kept: TokenEvidence) -> Sketch:
    """Evidence as the comparison takes it."""
    return Sketch(kept.topk_ids, kept.topk_logprobs, kept.vectors, kept.tail_mass.double(), kept.entropy.double())


def compared(known: Sketch, one: Response, seed: int, step: float) -> SketchBounds:
    """All positions of a response, which share the confidence."""
    positions = np.full(len(one.kl), len(one.kl))
    return compare_sketch(known, one.trainer, seed=seed, positions=positions, step=step, confidence=CONFIDENCE)


def sequence_figures(one: Response, recipe: Recipe) -> tuple[dict[str, float], TokenEvidence, Tensor]:
    """The largest values of one response, what was kept of it, and its list's log-probabilities in float32."""
    kept = evidence(one.rollout, torch.from_numpy(one.ids), recipe=recipe)
    known = as_sketch(kept)
    found = compared(known, one, recipe.seed, HALF)
    wide = sketch(one.rollout, recipe.k, recipe.dim, recipe.seed)
    single = compared(replace(known, topk_logprobs=wide.topk_logprobs), one, recipe.seed, SINGLE)
    truth = true_distances(one, known.topk_ids)
    missed = limits(known, tail_distances(known, one.trainer, recipe.seed), truth, len(one.kl))
    lower, upper, tv_lower, tv_upper = (
        getattr(found, name).numpy() for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
    )
    wrong = (one.kl < lower) | (one.kl > upper) | (one.tv < tv_lower) | (one.tv > tv_upper)
    figures = {
        "kl": one.kl.max(),
        "tv": one.tv.max(),
        "estimate": found.kl_estimate.max().item(),
        "distance_missed": float(missed.any()),
        "violated": float(wrong.sum()),
        "tokens": float(len(one.kl)),
    }
    for name in ("kl_lower", "kl_upper", "tv_lower", "tv_upper"):
        figures[name] = getattr(found, name).max().item()
        figures[f"{name}_single"] = getattr(single, name).max().item()
    return figures, kept, wide.topk_logprobs


def summary(figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    """One line of the table."""
    of = {name: np.array([one[name] for one in figures]) for name in figures[0]}
    ratio = of["estimate"] / of["kl"]

    def undecided(name: str, delta: float, suffix: str = "") -> float:
        return float(((of[f"{name}_lower{suffix}"] <= delta) & (of[f"{name}_upper{suffix}"] > delta)).mean())

    return {
        "differ": [int(((of["kl"] <= d) != (of["estimate"] <= d)).sum()) for d in KL_DELTAS],
        "estimate": [ratio.min(), ratio.max()],
        "tv_upper": float(np.median(of["tv_upper"] / of["tv"])),
        "tv_upper_single": float(np.median(of["tv_upper_single"] / of["tv"])),
        "kl_width": float(np.median((of["kl_upper"] - of["kl_lower"]) / of["kl"])),
        "kl_width_single": float(np.median((of["kl_upper_single"] - of["kl_lower_single"]) / of["kl"])),
        "kl_undecided": [undecided("kl", d) for d in KL_DELTAS],
        "tv_undecided": [undecided("tv", d) for d in TV_DELTAS],
        "distance_missed": int(of["distance_missed"].sum()),
        "violated": int(of["violated"].sum()),
    }


def bytes_a_token(kept: Sequence[TokenEvidence], single: Sequence[Tensor]) -> dict[str, float]:
    """By column of a shard with one row a response: zstd Parquet, lists as float16 and beside it as float32."""
    lists = pa.array([list(values.numpy()) for values in single], pa.list_(pa.list_(pa.float32())))
    masks = [np.ones(len(one), dtype=np.bool_) for one in kept]
    columns = sketch_columns([one.numpy() for one in kept], masks)
    columns[SINGLE_LISTS] = lists
    tokens, found = sum(len(one) for one in kept), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, column in columns.items():
            if pa.types.is_nested(column.type) or pa.types.is_large_binary(column.type):
                file = Path(folder) / "column.parquet"
                pq.write_table(pa.table({name: column}), file, compression="zstd")
                chunks = pq.read_metadata(file).row_group(0)
                sizes = [chunks.column(i).total_compressed_size for i in range(chunks.num_columns)]
                found[name] = sum(sizes) / tokens
    return found


def measure(name: str, data: Sequence[Response]) -> dict[str, Any]:
    """One data set at all K and m."""
    kl, tv = (np.concatenate([getattr(one, part) for one in data]) for part in ("kl", "tv"))
    lines = []
    for k, m in GRID:
        figures, kept, single = zip(*(sequence_figures(one, Recipe(k, m)) for one in data), strict=True)
        lines.append({"k": k, "m": m} | summary(figures) | {"bytes": bytes_a_token(kept, single)})
    return {
        "name": name,
        "sequences": len(data),
        "tokens": len(kl),
        "vocab_size": data[0].trainer.shape[1],
        "kl": {"mean": kl.mean(), "max": kl.max()},
        "tv": {"mean": tv.mean(), "max": tv.max()},
        "grid": lines,
    }


def main(folder: str, checkpoint: str) -> None:
    """Measures, and writes the file."""
    given = measure(Path(folder).name, list(stored(Path(folder), Path(checkpoint))))
    made = measure(
        f"{Path(checkpoint).name} under noise of {NOISE:.0%}", list(sampled(Path(checkpoint), NOISE, SAMPLES, LENGTH))
    )
    found = {"confidence": CONFIDENCE, "sets": [given, made], "machine": machine(torch.device("cpu"))}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "accuracy.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
