"""The noise floor of scoring below float32, and the thresholds that lie below it.

The same weights give other log-probabilities in another batch or in float32; what `score` measured of that stands in
the footers of its shards (schemas/score.md). Equal policies are as far apart as this floor says, so that a threshold
below it rejects them by rounding. A warning is given only where the floor tells that much:

    kl, kl_reverse,             the floor's kl, largest or mean (kl_reverse differs from it in third order only; what
    kl_estimate, kl_upper       a sketch's noise adds is in proportion to it)
    abs_log_ratio               its abs_delta_logprob, largest or mean; the largest for log_ratio and k1 too
    k2                          abs_delta_logprob^2 / 2; of the mean that is at most the mean of k2 (Jensen)
    k3                          largest: expm1(-a) + a of the largest a, the smaller of both signs; mean: kl = E[k3]
    a sum                       the mean times the tokens of a measured rollout

Nothing is said of tv and its bounds (sqrt(kl / 2) is an upper bound of it, which may be far above), of kl_lower (equal
policies may have 0), and of means of signed quantities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trm_audit.errors import BadInput
from trm_audit.rollout import Noise, NoiseSpread

AGAINST = {"composition": "in another batch", "float32": "against float32"}
"""What the run's precision was compared with."""
TOLD_OF_A_RUN = ("dtype", "head_dtype", "device", "sharing")


@dataclass(frozen=True)
class BelowFloor:
    """A threshold that equal policies can exceed.

    Worked instance: BelowFloor("seq_max_kl", 0.001, 0.0213, "float32", "The threshold 0.001 on seq_max_kl lies ...").
    """

    statistic: str
    delta: float
    floor: float
    against: str
    sentence: str


@dataclass(frozen=True)
class NoiseFloor:
    """The noise of the runs below float32; of several each figure is the largest.

    Attributes:
        dtypes: their precisions in words.
        num_runs: how many they are, and
        num_measured: how many of them measured it, on `num_rollouts` and `num_tokens` together.
        composition: the run's precision against itself in another batch, kl = KL(run || other); None if not measured.
        float32: the run's precision against float32, kl = KL(float32 || run).
        num_below, below: thresholds of the criteria that lie below it.
    """

    dtypes: list[str]
    num_runs: int
    num_measured: int
    num_rollouts: int
    num_tokens: int
    composition: Noise | None
    float32: Noise | None
    num_below: int
    below: list[BelowFloor]


@dataclass(frozen=True)
class _Measurement:
    """What one run measured: `noise` by what it was compared with (keys of `AGAINST`)."""

    num_rollouts: int
    num_tokens: int
    noise: dict[str, Noise]


def noise_floor(runs: Iterable[Mapping[str, Any]], limits: Iterable[tuple[str, float]] = ()) -> NoiseFloor | None:
    """The noise floor of the runs that scored some shards, None where none of them says that it was below float32.

    Args:
        runs: `trm_audit.run` of each shard; equal ones count once. Those of before the noise floor lack it.
        limits: column -> largest value kept, as (`seq_max_kl`, 0.05).

    Raises:
        BadInput: a run's noise floor is not what schemas/score.md says.
    """
    low = [run for run in distinct(runs) if precision(run)]
    if not low:
        return None
    measured = [measurement for run in low if (measurement := _measurement(run)) is not None]
    below = [found for limit in limits if (found := _below(measured, *limit)) is not None]
    return NoiseFloor(
        dtypes=sorted({precision(run) for run in low}),
        num_runs=len(low),
        num_measured=len(measured),
        num_rollouts=sum(each.num_rollouts for each in measured),
        num_tokens=sum(each.num_tokens for each in measured),
        composition=_largest(each.noise.get("composition") for each in measured),
        float32=_largest(each.noise.get("float32") for each in measured),
        num_below=len(below),
        below=below,
    )


def distinct(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each run once, in the order in which they come."""
    return list({json.dumps(run, sort_keys=True): run for run in runs}.values())


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of precision, device and way of sharing is not the same in all runs."""
    return [name for name in TOLD_OF_A_RUN if len({_told(run, name) for run in runs}) > 1]


def _told(run: Mapping[str, Any], name: str) -> str:
    return sharing_rung(run) if name == "sharing" else str(run.get(name))


def sharing_rung(run: Mapping[str, Any]) -> str:
    """How the run shared prefixes (`tree`, ...); empty where it does not say."""
    sharing = run.get("sharing")
    return str(sharing.get("rung") or "") if isinstance(sharing, Mapping) else ""


def precision(run: Mapping[str, Any]) -> str:
    """`bfloat16`, or `bfloat16 (head float32)`; empty where all was float32 or the run does not say."""
    dtype, head = (str(run.get(name) or "float32") for name in ("dtype", "head_dtype"))
    if run.get("dtype") is None or dtype == head == "float32":
        return ""
    return dtype if "head_dtype" not in run or head == dtype else f"{dtype} (head {head})"


def _measurement(run: Mapping[str, Any]) -> _Measurement | None:
    found = run.get("noise_floor")
    if found is None:
        return None
    try:
        noise = {name: _noise(found[name]) for name in AGAINST if found.get(name) is not None}
        return _Measurement(int(found["num_rollouts"]), int(found["num_tokens"]), noise)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"the noise floor in trm_audit.run cannot be read: {type(error).__name__} {error}",
            next_step="Score the rollouts again (schemas/score.md).",
        ) from error


def _noise(found: Mapping[str, Mapping[str, float]]) -> Noise:
    return Noise(_spread(found["abs_delta_logprob"]), _spread(found["kl"]))


def _spread(found: Mapping[str, float]) -> NoiseSpread:
    mean, p99, largest = (float(found[name]) for name in ("mean", "p99", "max"))
    if math.isnan(mean + p99 + largest):
        raise ValueError(f"mean {mean:g}, p99 {p99:g}, max {largest:g}")
    return NoiseSpread(mean, p99, largest)


def _largest(found: Iterable[Noise | None]) -> Noise | None:
    """Figure by figure."""
    known = [noise for noise in found if noise is not None]
    if not known:
        return None
    return Noise(_worst([n.abs_delta_logprob for n in known]), _worst([n.kl for n in known]))


def _worst(spreads: Sequence[NoiseSpread]) -> NoiseSpread:
    return NoiseSpread(max(s.mean for s in spreads), max(s.p99 for s in spreads), max(s.max for s in spreads))


def _below(measured: Sequence[_Measurement], column: str, delta: float) -> BelowFloor | None:
    levels = [found for measurement in measured for found in _levels(column, measurement)]
    floor, against = max(levels, default=(-math.inf, ""))
    if floor <= delta:
        return None
    sentence = (
        f"The threshold {delta:g} on {column} lies below the noise floor of the scoring, {floor:.3g} "
        f"({AGAINST[against]}): sequences on which both policies agree can exceed it. "
        "Take a larger one, or score in float32 (--dtype, --head-dtype)."
    )
    return BelowFloor(column, delta, floor, against, sentence)


def _levels(column: str, measurement: _Measurement) -> Iterator[tuple[float, str]]:
    """The floor of a column such as `seq_max_kl`, by what it was measured against, as far as the figures tell it."""
    prefix, _, rest = column.partition("_")
    statistic, _, divergence = rest.partition("_")
    if prefix != "seq" or statistic not in ("max", "mean", "sum"):
        return
    for against, noise in measurement.noise.items():
        level = _level(divergence, noise, statistic == "max")
        if level is not None and statistic == "sum":
            level *= measurement.num_tokens / max(1, measurement.num_rollouts)
        if level is not None:
            yield level, against


def _level(divergence: str, noise: Noise, largest: bool) -> float | None:
    """A divergence between equal policies, largest or mean over tokens; None where the figures do not tell it."""
    distance, kl = noise.abs_delta_logprob, noise.kl
    a = distance.max if largest else distance.mean
    if divergence in ("kl", "kl_reverse", "kl_estimate", "kl_upper"):
        return kl.max if largest else kl.mean
    if divergence == "k3":
        return math.expm1(-a) + a if largest else kl.mean
    if divergence == "k2":
        return a * a / 2
    if divergence == "abs_log_ratio" or (largest and divergence in ("log_ratio", "k1")):
        return a
    return None
