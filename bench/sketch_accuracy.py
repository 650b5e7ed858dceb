"""What sketches lose: their estimates and bounds beside the exact KL and TV of stored full logits and a checkpoint.

python -m bench.sketch_accuracy ROLLOUTS CHECKPOINT [SEEDS]

ROLLOUTS is a folder of rollouts with their full logits beside them; those are compared as they are stored, the
checkpoint's in float32 and at temperature 1. All rows are held in memory, 6 bytes a logit. With several seeds the
misses are counted over all of them, the other figures are the first one's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.numerics.divergences import divergences
from trm_audit.numerics.sketch import Sketch, project_tail, sketch
from trm_audit.numerics.sketch_bounds import SketchBounds, chi_square_factors, compare_sketch
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.read import find_shards

GRID = ((20, 64), (20, 128), (64, 128), (64, 256))
DELTAS = (0.02, 0.05, 0.1)
UNDECIDED_AT = 0.05
CONFIDENCE = 0.95
HALF = 2.0**-11
HEADINGS = (
    "K, m",
    "bytes a token",
    "verdicts of the estimate that differ, max KL .02/.05/.1",
    "estimate / exact, a sequence's max",
    "TV upper / exact, a sequence's max, median",
    "undecided at max KL .05",
    "sequences whose interval missed",
    "positions where a bound does not hold",
)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Response:
    """A response under both policies, [T, V] each, and what is exact of it, [T] each."""

    rollout: Tensor
    trainer: Tensor
    kl: Floats
    tv: Floats


@dataclass
class Outcome:
    """What one K and m came to.

    Attributes:
        exact, estimate, lower, upper: a sequence's largest KL, and what the sketch says of it.
        tv, tv_upper: a sequence's largest TV, and its bound.
        missed: sequences in which the interval of the tails' distance misses the truth at some position, all seeds.
        violated: positions at which a bound of KL or TV does not hold, all seeds.
        sequences, positions: how many there were, all seeds.
    """

    exact: list[float] = field(default_factory=list)
    estimate: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    tv: list[float] = field(default_factory=list)
    tv_upper: list[float] = field(default_factory=list)
    missed: int = 0
    violated: int = 0
    sequences: int = 0
    positions: int = 0

    def row(self, k: int, m: int) -> str:
        """A line of the table."""
        exact, estimate = np.array(self.exact), np.array(self.estimate)
        differ = "/".join(str(int(((exact <= delta) != (estimate <= delta)).sum())) for delta in DELTAS)
        ratio, tv = estimate / exact, np.median(np.divide(self.tv_upper, self.tv))
        open_ = (np.array(self.lower) <= UNDECIDED_AT) & (np.array(self.upper) > UNDECIDED_AT)
        return (
            f"| {k}, {m} | {6 * k + 2 * m} | {differ} | {ratio.min():.2f}-{ratio.max():.2f} | {tv:.2f} "
            f"| {open_.mean():.2f} | {self.missed} of {self.sequences} | {self.violated} of {self.positions} |"
        )


def sequences(folder: Path, checkpoint: Path) -> Iterator[Response]:
    """Rollouts that have full logits, one at a time through the model."""
    model = TrainerModel(find_checkpoint(checkpoint), dtype="float32", sharing="alone")
    for shard in find_shards([str(folder)], "rollouts").shards:
        logits = StoredLogits(shard.logits)
        for row in pq.read_table(shard.path, columns=["rollout_id", "prompt_ids", "response_ids"]).to_pylist():
            length = len(row["response_ids"])
            if row["rollout_id"] in logits and length:
                ids = np.array(row["prompt_ids"] + row["response_ids"][:-1])
                (states,) = model.hidden(model.steps([ids]), [ids])
                trainer = model.logits(states[len(row["prompt_ids"]) - 1 :]).cpu()
                rollout = logits.rows(row["rollout_id"], 0, length)[:, : trainer.shape[1]].clone()
                exact = divergences(rollout.double(), trainer.double())
                yield Response(rollout, trainer, exact.kl.numpy(), exact.tv.numpy())


def true_distances(one: Response, ids: Tensor) -> Floats:
    """||sqrt(p^) - sqrt(q^)||^2 of the tails outside some tokens, [T], in float64."""
    p, q = (x.double().scatter(1, ids, -torch.inf).softmax(1).sqrt() for x in (one.rollout, one.trainer))
    distances: Floats = (p - q).square().sum(1).numpy()
    return distances


def interval_misses(one: Response, known: Sketch, truth: Floats, seed: int) -> bool:
    """Whether the chi-square's interval misses the true distance at some position of a sequence."""
    m = known.vector.shape[1]
    tail = project_tail(one.trainer, known.topk_ids, m, seed)
    unit = known.vector.double() / known.tail_mass.sqrt()[:, None]
    distance, rounding = (unit - tail.vector).norm(dim=1).numpy(), HALF * unit.norm(dim=1).numpy()
    low, high = chi_square_factors(m, np.full(len(truth), len(truth)), CONFIDENCE)
    least, most = np.maximum(distance - rounding, 0) ** 2 * low, (distance + rounding) ** 2 * high
    return bool(((truth < least) | (truth > np.minimum(most, 2))).any())


def look(outcome: Outcome, one: Response, found: SketchBounds, *, first: bool) -> None:
    """Adds what the bounds of a sequence say."""
    lower, upper, tv_upper = (x.numpy() for x in (found.kl_lower, found.kl_upper, found.tv_upper))
    wrong = (one.kl < lower) | (one.kl > upper) | (one.tv < found.tv_lower.numpy()) | (one.tv > tv_upper)
    outcome.violated += int(wrong.sum())
    outcome.positions += len(wrong)
    outcome.sequences += 1
    if first:
        outcome.exact.append(one.kl.max())
        outcome.estimate.append(found.kl_estimate.max().item())
        outcome.lower.append(lower.max())
        outcome.upper.append(upper.max())
        outcome.tv.append(one.tv.max())
        outcome.tv_upper.append(tv_upper.max())


def measure(data: Sequence[Response], k: int, m: int, seeds: int) -> Outcome:
    """One K and m over all sequences, log-probabilities stored as float16."""
    out = Outcome()
    truth = [true_distances(one, sketch(one.rollout, k, 64, 0).topk_ids) for one in data]
    for seed in range(1, seeds + 1):
        for one, distances in zip(data, truth, strict=True):
            made = sketch(one.rollout, k, m, seed)
            known = replace(made, topk_logprobs=made.topk_logprobs.half())
            found = compare_sketch(
                known,
                one.trainer,
                seed=seed,
                positions=np.full(len(one.kl), len(one.kl)),
                step=HALF,
                confidence=CONFIDENCE,
            )
            look(out, one, found, first=seed == 1)
            out.missed += interval_misses(one, known, distances, seed)
    return out


def main(folder: str, checkpoint: str, seeds: str = "1") -> None:
    """Prints the table."""
    data = list(sequences(Path(folder), Path(checkpoint)))
    print(f"{len(data)} sequences, {sum(len(one.kl) for one in data)} tokens, {seeds} seeds, confidence {CONFIDENCE}")
    print("".join(f"| {name} " for name in HEADINGS) + "|")
    print("|---" * len(HEADINGS) + "|")
    for k, m in GRID:
        print(measure(data, k, m, int(seeds)).row(k, m), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
