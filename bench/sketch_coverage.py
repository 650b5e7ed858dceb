"""How often sketches are wrong, over many draws of R: coverage of the intervals, bias, and how the error falls with m.

python -m bench.sketch_coverage ROLLOUTS CHECKPOINT [SEEDS]

A few positions of a few responses, the same for all seeds: of the longest ones in the folder ROLLOUTS, and of ones
sampled from CHECKPOINT under noise. What does not depend on the seed is made once. Writes one file of
`bench/results/sketches/`; `python -m bench.sketch_page` shows it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor

from bench.measure import machine
from bench.sketch_material import Response, sampled, stored, true_distances
from trm_audit.numerics.divergences import row_statistics
from trm_audit.numerics.sketch import Sketch, project_tail, sketch
from trm_audit.numerics.sketch_bounds import chi_square_factors, compare_sketch

K = 20
COVERAGE, ERROR = (64, 128), (64, 128, 256, 512)
"""Values of m at which misses are counted, with all seeds, and at which the error is measured, with a quarter."""
CONFIDENCE = 0.95
RESPONSES, POSITIONS = 4, 8
NOISE = 0.02
HALF = 2.0**-11
PLENTY, SOME = 1e-2, 1e-4
"""Tails of so much: the projection's own law shows, and is not drowned in what float16 rounds."""
OUT = Path(__file__).parent / "results" / "sketches"

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """Positions of several sequences, flat, and what is true of them.

    Attributes:
        rollout, trainer: [n, V] logits.
        known: sketches of the rollout with log-probabilities as float16, their vectors those of seed 0.
        logsumexp: [n] of the trainer's logits.
        tails: [n] the true squared distance of the tails' square roots.
        kl, tv, hellinger2: [n] exact.
    """

    rollout: Tensor
    trainer: Tensor
    known: Sketch
    logsumexp: Tensor
    tails: Floats
    kl: Floats
    tv: Floats
    hellinger2: Floats

    def sketched(self, m: int, seed: int) -> Sketch:
        """What `sketch` gives under another seed, by its own steps: the list does not depend on it."""
        vector = project_tail(self.rollout, self.known.topk_ids, m, seed).vector
        return replace(self.known, vector=(self.known.tail_mass.sqrt()[:, None] * vector).half())


@dataclass
class Draws:
    """Of each seed and position, [seeds, n]: measured distances over true ones, and what missed."""

    tails: list[Floats]
    hellinger2: list[Floats]
    misses: dict[str, list[Bools]]


def rows(responses: Sequence[Response]) -> Rows:
    """`POSITIONS` of each response, evenly spaced."""
    cut = [one.at(np.linspace(0, len(one.kl) - 1, POSITIONS).round().astype(int).tolist()) for one in responses]
    rollout, trainer = (torch.cat([getattr(one, side) for one in cut]) for side in ("rollout", "trainer"))
    known = sketch(rollout, K, 64, 0)
    whole = replace(cut[0], rollout=rollout, trainer=trainer)
    return Rows(
        rollout=rollout,
        trainer=trainer,
        known=replace(known, topk_logprobs=known.topk_logprobs.half()),
        logsumexp=row_statistics(trainer).logsumexp,
        tails=true_distances(whole, known.topk_ids),
        **{name: np.concatenate([getattr(one, name) for one in cut]) for name in ("kl", "tv", "hellinger2")},
    )


def limits(known: Sketch, measured: Floats, truth: Floats, positions: int) -> Bools:
    """Where the chi-square's limits of the tails' distance miss it, [2, n]: too high, too low."""
    m = known.vector.shape[1]
    low, high = chi_square_factors(m, np.full(len(measured), positions), CONFIDENCE)
    rounding = HALF * known.vector.double().norm(dim=1).numpy() / known.tail_mass.sqrt().numpy()
    least, most = (np.maximum(np.sqrt(measured) + move, 0) ** 2 for move in (-rounding, rounding))
    return np.stack([least * low > truth, np.minimum(most * high, 2) < truth])


def tail_distances(known: Sketch, trainer: Tensor, seed: int) -> Floats:
    """||a/sqrt(r) - b/sqrt(s)||^2 as measured, [n]."""
    unit = known.vector.double() / known.tail_mass.sqrt()[:, None]
    tail = project_tail(trainer, known.topk_ids, known.vector.shape[1], seed)
    measured: Floats = (unit - tail.vector).square().sum(1).numpy()
    return measured


def bounds(at: Rows, known: Sketch, seed: int, positions: int) -> tuple[Bools, Floats]:
    """Where a bound of KL or of TV does not hold, [2, n], and the estimate of hellinger2."""
    found = compare_sketch(
        known,
        at.trainer,
        seed=seed,
        positions=np.full(len(at.kl), positions),
        step=HALF,
        confidence=CONFIDENCE,
        logsumexp=at.logsumexp,
    )
    kl = (at.kl < found.kl_lower.numpy()) | (at.kl > found.kl_upper.numpy())
    tv = (at.tv < found.tv_lower.numpy()) | (at.tv > found.tv_upper.numpy())
    return np.stack([kl, tv]), found.hellinger2.numpy()


def draw(at: Rows, m: int, seeds: Sequence[int], *, misses: bool) -> Draws:
    """One m under several seeds; what missed only if asked for."""
    out = Draws([], [], {f"{name}, {over}": [] for name in ("low", "high", "kl", "tv") for over in ("one", "all")})
    for seed in seeds:
        known = at.sketched(m, seed)
        measured = tail_distances(known, at.trainer, seed)
        out.tails.append(measured / at.tails)
        for over, positions in (("one", 1), ("all", POSITIONS))[: 1 + misses]:
            wrong, whole = bounds(at, known, seed, positions)
            limit = limits(known, measured, at.tails, positions)
            for name, one in zip(("low", "high", "kl", "tv"), (*limit, *wrong), strict=True):
                out.misses[f"{name}, {over}"].append(one)
        out.hellinger2.append(whole / at.hellinger2)
    return out


def coverage(at: Rows, drawn: Draws, m: int) -> dict[str, Any]:
    """Misses by position at the confidence of one, by sequence at that of all; standard errors are over seeds."""
    missed = {name: np.array(values) for name, values in drawn.misses.items()}
    for over in ("one", "all"):
        missed[f"distance, {over}"] = missed[f"low, {over}"] | missed[f"high, {over}"]
    found: dict[str, Any] = {"m": m, "seeds": len(drawn.tails)}
    plenty = at.known.tail_mass.numpy() > PLENTY
    found["distance of 1 %, one"] = counted(missed["distance, one"][:, plenty])
    for name in ("distance", "kl", "tv"):
        found[f"{name}, one"] = counted(missed[f"{name}, one"])
        wrong = missed[f"{name}, all"]
        found[f"{name}, all"] = counted(wrong.reshape(len(wrong), -1, POSITIONS).any(2))
    return found


def counted(wrong: Any) -> dict[str, float]:
    """Of misses [seeds, places]: their share, and the most at one place beside what a binomial allows."""
    share, places = wrong.mean(1), wrong.shape[1]
    return {
        "share": share.mean(),
        "error": share.std(ddof=1) / np.sqrt(len(share)),
        "most": int(wrong.sum(0).max()),
        "allowed": int(binom.isf(0.01 / places, len(wrong), 1 - CONFIDENCE)),
        "of": places,
    }


def bias(at: Rows, drawn: Draws) -> dict[str, float]:
    """In relation to the truth: of hellinger2 on average over positions, and of the tails' distance at each."""
    off, tails = np.array(drawn.hellinger2) - 1, np.array(drawn.tails) - 1
    tails = tails[:, at.known.tail_mass.numpy() > SOME]
    root, together = np.sqrt(len(off)), off.mean(1)
    error = together.std(ddof=1) / root
    return {
        "seeds": len(off),
        "mean": together.mean(),
        "error": error,
        "z": together.mean() / error,
        "largest_z": float(np.abs(tails.mean(0) / (tails.std(0, ddof=1) / root)).max()),
        "positions": tails.shape[1],
    }


def errors(drawn: dict[int, Draws]) -> dict[str, Any]:
    """Relative error of the distances at each m, and the exponent of m: slope by position, with its standard error."""
    found: dict[str, Any] = {}
    for part in ("tails", "hellinger2"):
        spread = {m: np.array(getattr(one, part)).std(0, ddof=1) for m, one in drawn.items()}
        slopes = np.polyfit(np.log(list(spread)), np.log(np.stack(list(spread.values()))), 1)[0]
        found[part] = {
            "error": {m: float(np.sqrt(np.square(one).mean())) for m, one in spread.items()},
            "exponent": slopes.mean(),
            "exponent_error": slopes.std(ddof=1) / np.sqrt(len(slopes)),
        }
    return found | {"seeds": {m: len(one.tails) for m, one in drawn.items()}}


def measure(at: Rows, seeds: int) -> dict[str, Any]:
    """Everything, at all m."""
    whole, part = range(1, seeds + 1), range(1, max(2, seeds // 4) + 1)
    drawn = {m: draw(at, m, whole if m in COVERAGE else part, misses=m in COVERAGE) for m in ERROR}
    return {
        "k": K,
        "confidence": CONFIDENCE,
        "sequences": len(at.kl) // POSITIONS,
        "positions": POSITIONS,
        "coverage": [coverage(at, drawn[m], m) for m in COVERAGE],
        "bias": {m: bias(at, one) for m, one in drawn.items()},
        "errors": errors(drawn),
        "machine": machine(torch.device("cpu")),
    }


def main(folder: str, checkpoint: str, seeds: str = "200") -> None:
    """Measures, and writes the file."""
    longest = sorted(stored(Path(folder), Path(checkpoint)), key=lambda one: -len(one.kl))[:RESPONSES]
    ours = islice(sampled(Path(checkpoint), NOISE, samples=1, length=2 * POSITIONS), RESPONSES)
    found = measure(rows([*longest, *ours]), int(seeds))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "coverage.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
