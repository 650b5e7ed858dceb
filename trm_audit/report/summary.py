"""The report as data: one tree of dataclasses, computed once, that every renderer reads and none adds to.

Names are those of the columns. `to_json` is what `schemas/report.schema.json` describes: keys in the order of the
fields, infinities as "inf" and "-inf", what is not known as null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trm_audit.numerics.bounds import Bound
from trm_audit.numerics.confidence import MeanInterval
from trm_audit.report.blocks import (
    AcceptanceByLength,
    BoundCurves,
    DeltaTable,
    Distribution,
    Finding,
    Impulses,
    Metric,
    ProbabilityDensity,
    Routing,
    Target,
    TokenBin,
    TokenRow,
    WorstSequence,
)
from trm_audit.report.noise import NoiseFloor
from trm_audit.report.worth import EvidenceWorth

SCHEMA_VERSION = 3
MAIN_METRICS = (
    "mean_kl",
    "mean_kl_estimate",
    "mean_kl_lower",
    "mean_kl_upper",
    "mean_tv",
    "mean_tv_upper",
    "mean_k3",
    "mean_abs_log_ratio",
    "mean_ratio",
    "ess_seq",
)


@dataclass(frozen=True)
class Thresholds:
    """The criteria's numbers and divergences; `*_of` None means the grade's default.

    That is kl where exact, kl_estimate where sketched, otherwise k2 for the maximum and k3 for mean and sum.

    Worked instance: Thresholds(delta_max=0.05, max_of="kl", delta_avg=0.002, avg_of="k3").
    """

    delta_max: float | None = None
    max_of: str | None = None
    delta_avg: float | None = None
    avg_of: str | None = None
    delta_total: float | None = None
    total_of: str | None = None


@dataclass(frozen=True)
class Counts:
    """What was read; `num_groups` is None without `group_id`, `horizon` where nothing tells the response lengths.

    `n_total` is N: rows read and, of training shards without their rejected rows, `num_dropped`.
    """

    n_total: int
    grades: dict[str, int]
    audited_policies: dict[str, int]
    num_tokens: int
    num_groups: int | None
    num_without_policy_tokens: int
    num_disagreements: int
    num_infinite: int
    num_skipped: int
    num_dropped: int
    horizon: int | None


@dataclass(frozen=True)
class Quantiles:
    """Spread of one quantity over `n` tokens or sequences; `min`, `max` exact, quantiles to 1/128 relative."""

    n: int
    min: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float
    mean: float


@dataclass(frozen=True)
class BoundWidths:
    """How far the bounds of one grade are apart; rigorous at grade `interval`.

    Attributes:
        confidence: with which those of a sketch hold at all positions of a sequence together, of several runs the
            smallest; None where they are rigorous, or the scores do not say.
        dims, seeds: sketched sequences by m and by the seed of the signs.
        tokens: `kl_width` and `tv_width`, upper less lower bound at each token.
        sequences: `seq_max_kl_width` and `seq_max_tv_width`, the same of a sequence's maximum.
    """

    confidence: float | None
    dims: dict[str, int]
    seeds: dict[str, int]
    tokens: dict[str, Quantiles]
    sequences: dict[str, Quantiles]


@dataclass(frozen=True)
class Curve:
    """Share of `n` sequences that each delta keeps; sequences without policy tokens are never kept."""

    n: int
    share: list[float]


@dataclass(frozen=True)
class AcceptanceCurves:
    """Exact acceptance by threshold, `curves` by the name of the statistic."""

    deltas: list[float]
    curves: dict[str, Curve]


@dataclass(frozen=True)
class CombinedAcceptance:
    """Exact acceptance of seq_max_{max_of} <= deltas[i] and seq_mean_{avg_of} <= deltas[j], at share[i][j]."""

    max_of: str
    avg_of: str
    n: int
    deltas: list[float]
    share: list[list[float]]


@dataclass(frozen=True)
class SequenceTotal:
    """Mean over sequences of a `seq_sum_*` (D_seq, nats) with its 95 % interval and how that was computed."""

    interval: MeanInterval
    method: str


@dataclass(frozen=True)
class Share:
    """`violations` among `n`, with a one-sided 95 % Clopper-Pearson upper limit of the share."""

    n: int
    violations: int
    share: float
    upper_95: float


@dataclass(frozen=True)
class Violations:
    """Sequences whose largest divergence exceeds delta_max, and prompts that have one (None without `group_id`)."""

    divergence: str
    delta_max: float
    sequences: Share
    prompts: Share | None


@dataclass(frozen=True)
class BoundsBlock:
    """All error bounds from one kind of evidence over one set of rows.

    Attributes:
        label: what the numbers rest on.
        rows: sequences with this evidence in the set.
        horizon: T.
        inputs: the quantities that went in, by the column they came from.
        bounds: name -> both constants; names end in `_upper` or `_estimate` where the evidence is not exact.
        minimum: name of the smallest.
        vacuous: even the smallest sharp bound reaches the reward's range.
        sentence: the same in words.
        minorizer: L' minus the smallest bound; None without rewards, for kept rows, or where the evidence does not
            cover all rows.
    """

    label: str
    rows: int
    horizon: int
    inputs: dict[str, float | None]
    bounds: dict[str, Bound]
    minimum: str
    vacuous: bool
    sentence: str
    minorizer: Bound | None


@dataclass(frozen=True)
class Rewards:
    """The surrogate objectives, in units of the reward.

    Attributes:
        num_rewards: rows with a reward.
        min, max: smallest and largest reward, None without any.
        reward_range: R_max - R_min as used for the bounds, and
        reward_range_from: `given`, `assumed [0, 1]` or `observed`.
        surrogate: L' with a 95 % interval; None where rejected rows were dropped, as it is over all rows.
        masked_objective: L_masked of the kept rows, divided by N.
    """

    num_rewards: int
    min: float | None
    max: float | None
    reward_range: float
    reward_range_from: str
    surrogate: MeanInterval | None
    masked_objective: float | None


@dataclass(frozen=True)
class PpoTerms:
    """Tokens on which PPO's min selects the unclipped term.

    `negative_advantage_above` (ratio > 1 + clip, A < 0) is unbounded; `positive_advantage_below` (ratio < 1 - clip,
    A > 0) is bounded by A.
    """

    clip: float
    num_tokens: int
    negative_advantage_above: int
    positive_advantage_below: int


@dataclass(frozen=True)
class TokenMasking:
    """What masking single tokens above delta_max would have dropped; the sequence's maximum stays as it was."""

    divergence: str
    delta_max: float
    num_tokens: int
    num_dropped: int
    share_dropped: float
    max_before: float
    max_after: float


@dataclass(frozen=True)
class CategoryDivergence:
    """Mean over tokens and largest value of one divergence."""

    mean: float
    max: float


@dataclass(frozen=True)
class Category:
    """One engine, policy version or staleness."""

    value: str | int
    n: int
    num_tokens: int
    acceptance: float | None
    divergences: dict[str, CategoryDivergence]


@dataclass(frozen=True, kw_only=True)
class AuditSummary:
    """Everything a report says. The fields stand in the order of a reader's questions; each type explains itself.

    Attributes:
        verdict: the outcome in one sentence.
        evidence: the grade in words and what it permits to claim.
        warnings: what a reader must know before the numbers; `num_warnings` counts them.
        notes: what the numbers do and do not claim.
        run: what scored the rollouts (model, hash, precision), as the first shard's footer says; None if none does.
        criteria: the criteria in words, as given.
        noise_floor: of the runs below float32; None where there is none.
        acceptance: n_kept / n_total; None where nothing was decided.
        reasons: rejected rows by cause (a row with several causes counts once for each).
        bound_widths: how far the bounds of KL and TV are apart, by grade.
        evidence_worth: what other stored evidence would have decided; None where no run measured it.
        metrics: figures that training logs show too, by our name.
        d_max: largest `seq_max_*` seen; d_seq: mean `seq_sum_*`.
        delta_tables: what thresholds on a statistic would do, by statistic.
        targets: thresholds for the wanted acceptance.
        bounds: `all` and, where there are verdicts, `kept` -> evidence -> block.
        bounds_by_horizon: evidence -> the bounds over all rows as functions of the horizon.
        by_token: the token ids that carry most of the divergence; by_group: the groups.
        worst: the sequences with the largest divergences.
    """

    verdict: str
    evidence: str = ""
    num_warnings: int = 0
    warnings: list[Finding] = field(default_factory=list)
    notes: list[str]
    counts: Counts
    run: dict[str, Any] | None
    criteria: list[str]
    thresholds: Thresholds
    noise_floor: NoiseFloor | None
    n_kept: int | None
    acceptance: float | None
    reasons: dict[str, int]
    violations: Violations | None
    tokens: dict[str, Quantiles]
    sequences: dict[str, Quantiles]
    distributions: dict[str, Distribution] = field(default_factory=dict)
    bound_widths: dict[str, BoundWidths] = field(default_factory=dict)
    evidence_worth: EvidenceWorth | None = None
    probabilities: ProbabilityDensity | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    acceptance_curves: AcceptanceCurves = field(default_factory=lambda: AcceptanceCurves([], {}))
    acceptance_combined: list[CombinedAcceptance] = field(default_factory=list)
    delta_tables: dict[str, DeltaTable] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    acceptance_by_length: AcceptanceByLength | None = None
    d_max: dict[str, float]
    d_seq: dict[str, SequenceTotal]
    bounds: dict[str, dict[str, BoundsBlock]]
    bounds_by_horizon: dict[str, BoundCurves] = field(default_factory=dict)
    rewards: Rewards | None
    ppo: PpoTerms | None
    token_masking: TokenMasking | None = None
    by_engine: list[Category] = field(default_factory=list)
    by_policy_version: list[Category] = field(default_factory=list)
    by_staleness: list[Category] = field(default_factory=list)
    by_position: list[TokenBin] = field(default_factory=list)
    by_rollout_probability: list[TokenBin] = field(default_factory=list)
    by_entropy: list[TokenBin] = field(default_factory=list)
    by_length: list[TokenBin] = field(default_factory=list)
    by_token: list[TokenRow] = field(default_factory=list)
    by_group: list[Category] = field(default_factory=list)
    impulses: Impulses | None = None
    routing: Routing | None = None
    worst: list[WorstSequence] = field(default_factory=list)

    def main_metrics(self) -> dict[str, Metric]:
        """The metrics of a first screen, as far as the data have them."""
        return {name: self.metrics[name] for name in MAIN_METRICS if name in self.metrics}

    def main_bounds(self) -> dict[str, list[BoundsBlock]]:
        """Of each kind of evidence that is the best of some row: the block over all rows, then that over the kept.

        The kept alone where the others were dropped.
        """
        blocks = [self.bounds[subset] for subset in ("all", "kept") if subset in self.bounds]
        first = blocks[0] if blocks else {}
        names = [name for name in first if name in self.counts.grades] or list(first)
        return {name: [block[name] for block in blocks if name in block] for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON types: infinities are strings, NaN is None."""
        head: dict[str, Any] = {"kind": "report", "schema_version": SCHEMA_VERSION}
        head.update(json_ready(dataclasses.asdict(self)))
        return head

    def to_json(self) -> str:
        """The report for machines, as `schemas/report.schema.json` describes it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)


def json_ready(value: Any) -> Any:
    """`value` with infinities as "inf" and "-inf" and NaN as None, at any depth; JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def numbers(report: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float | int | None]]:
    """Path and value of every number of a JSON report; infinities as floats, None for what is not known.

    Lists are left out: curves, tables and excerpts.
    """
    if isinstance(report, Mapping):
        for key, entry in report.items():
            yield from numbers(entry, (*path, key))
    elif report in ("inf", "-inf"):
        yield path, float(report)
    elif report is None or (isinstance(report, int | float) and not isinstance(report, bool)):
        yield path, report
