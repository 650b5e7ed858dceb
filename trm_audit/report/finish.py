"""From totals to the summary: the only place where the report's numbers are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trm_audit.errors import UsageError
from trm_audit.numerics.confidence import clopper_pearson_upper, clustered_mean
from trm_audit.numerics.histogram import LogHistogram
from trm_audit.report import words
from trm_audit.report.bound_blocks import bound_blocks
from trm_audit.report.breakdown import MAIN_DIVERGENCES, CategoryTotals
from trm_audit.report.noise import differing, noise_floor
from trm_audit.report.rewards import PPO_CLIP, RewardTotals
from trm_audit.report.summary import (
    AcceptanceCurves,
    AuditSummary,
    BoundsBlock,
    Category,
    CategoryDivergence,
    CombinedAcceptance,
    Counts,
    Curve,
    Importance,
    PpoTerms,
    Quantiles,
    Rewards,
    SequenceTotal,
    Share,
    TokenMasking,
    Violations,
)
from trm_audit.report.totals import ClusterTotals, ImportanceTotals
from trm_audit.rollout import EXACT_DIVERGENCES, GRADES, INTERVAL_DIVERGENCES, SAMPLED_DIVERGENCES

if TYPE_CHECKING:
    from trm_audit.report.builder import SummaryBuilder

_RANKED = (*EXACT_DIVERGENCES, *INTERVAL_DIVERGENCES, *SAMPLED_DIVERGENCES)
_STATISTICS = [f"seq_{kind}_{divergence}" for divergence in _RANKED for kind in ("max", "mean", "sum")]
_ORDER = {name: at for at, name in enumerate(_STATISTICS)}


def summarize(
    builder: SummaryBuilder,
    horizon: int | None,
    reward_range: float | None,
    num_skipped: int,
    num_dropped: int,
    runs: Sequence[Mapping[str, Any]],
    limits: Sequence[tuple[str, float]],
) -> AuditSummary:
    """All numbers of the report; the arguments are those of `SummaryBuilder.finish`."""
    counts = _counts(builder, _horizon(builder, horizon), num_skipped, num_dropped)
    decided = builder.counts["num_decided"] == builder.counts["n_total"] > 0
    rewards = _rewards(builder.rewards, reward_range, counts.n_total if decided else None)
    n_kept = builder.counts["n_kept"] if decided else None
    whole = num_dropped == 0  # otherwise only kept rows are here, and what is said of all of them would be false
    violations = _violations(builder, counts.num_groups is not None) if whole else None
    sequences = {
        name: _quantiles(builder.sequences[name]) for name in sorted(builder.sequences, key=_ORDER.__getitem__)
    }
    bounds = _bounds(builder, counts, rewards, whole)
    floor = noise_floor(runs, limits)
    notes = words.notes(counts, bounds, violations is not None, "seq_sum_k3" in builder.sequences)
    return AuditSummary(
        verdict=words.verdict(counts, sequences, n_kept, builder.criteria),
        notes=words.noise_notes(floor, differing(runs)) + notes,
        counts=counts,
        run=dict(runs[0]) if runs else None,
        criteria=builder.criteria,
        thresholds=builder.thresholds,
        noise_floor=floor,
        n_kept=n_kept,
        acceptance=None if n_kept is None else n_kept / counts.n_total,
        reasons=dict(sorted(builder.reasons.items(), key=lambda entry: (-entry[1], entry[0]))),
        tokens={name: _quantiles(histogram) for name, histogram in sorted(builder.tokens.items())},
        sequences=sequences,
        acceptance_curves=_curves(builder, counts.num_without_policy_tokens) if whole else AcceptanceCurves([], {}),
        acceptance_combined=_combined(builder, counts.num_without_policy_tokens) if whole else [],
        violations=violations,
        d_max={name: spread.max for name, spread in sequences.items() if name.startswith("seq_max_")},
        d_seq=_sequence_totals(builder.clusters),
        bounds=bounds,
        rewards=rewards if builder.rewards.num_advantages else None,
        ppo=_ppo(builder.rewards),
        token_masking=_token_masking(builder, violations),
        importance=_importance(builder),
        elsewhere=_elsewhere(builder),
        **{f"by_{name}": _categories(totals, decided and whole) for name, totals in builder.breakdowns.items()},
    )


def _bounds(
    builder: SummaryBuilder, counts: Counts, rewards: Rewards, whole: bool
) -> dict[str, dict[str, BoundsBlock]]:
    """Of the kept rows only where the others are not here."""
    surrogate = None if rewards.surrogate is None else rewards.surrogate.mean
    blocks = bound_blocks(builder.evidence, counts, rewards.reward_range, surrogate)
    return blocks if whole else {subset: found for subset, found in blocks.items() if subset != "all"}


def _horizon(builder: SummaryBuilder, given: int | None) -> int | None:
    seen = max([builder.longest, *(len(totals.by_position) for totals in builder.evidence.values())], default=0)
    if given is not None and given < seen:
        raise UsageError(
            f"horizon {given} is shorter than the longest response, {seen} policy tokens",
            place="--horizon",
            next_step=f"Give the longest response that the policies can produce, at least {seen}, or no horizon.",
        )
    return given or seen or None


def _counts(builder: SummaryBuilder, horizon: int | None, num_skipped: int, num_dropped: int) -> Counts:
    known = builder.counts
    num_groups = len(builder.clusters.groups.index) + known["n_total"] - known["num_grouped"]
    return Counts(
        n_total=known["n_total"] + num_dropped,
        grades={grade: builder.grades[grade] for grade in GRADES if grade in builder.grades},
        audited_policies=dict(sorted(builder.audited_policies.items())),
        num_tokens=known["num_tokens"],
        num_groups=num_groups if known["num_grouped"] else None,
        num_without_policy_tokens=known["num_without_policy_tokens"],
        num_disagreements=known["num_disagreements"],
        num_infinite=known["num_infinite"],
        num_skipped=num_skipped,
        num_dropped=num_dropped,
        horizon=horizon,
    )


def _quantiles(histogram: LogHistogram) -> Quantiles:
    inner = {name: histogram.quantile(q) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))}
    return Quantiles(n=histogram.count, min=histogram.min, max=histogram.max, mean=histogram.mean, **inner)


def _curves(builder: SummaryBuilder, num_empty: int) -> AcceptanceCurves:
    curves, deltas = {}, []
    for name in sorted(builder.curves, key=_ORDER.__getitem__):
        counts = builder.curves[name]
        n = int(counts.cells.sum()) + num_empty
        deltas = counts.grid.tolist()
        curves[name] = Curve(n, (counts.at_most / n).tolist())
    return AcceptanceCurves(deltas, curves)


def _combined(builder: SummaryBuilder, num_empty: int) -> list[CombinedAcceptance]:
    out = []
    for (max_of, avg_of), counts in sorted(builder.pairs.items()):
        n = int(counts.cells.sum()) + num_empty
        out.append(CombinedAcceptance(max_of, avg_of, n, counts.grid_a.tolist(), (counts.at_most / n).tolist()))
    return out


def _share(n: int, violations: int) -> Share:
    return Share(n, violations, violations / n if n else math.nan, clopper_pearson_upper(violations, n))


def _violations(builder: SummaryBuilder, grouped: bool) -> Violations | None:
    delta = builder.thresholds.delta_max
    n = builder.counts["num_compared"]
    if delta is None or not n:
        return None
    sizes, sums, singles = builder.clusters.of("violation")
    alone = round(singles.count * singles.mean)
    prompts = _share(len(sizes) + singles.count, int(np.count_nonzero(sums)) + alone) if grouped else None
    return Violations(words.deciding(builder.thresholds), delta, _share(n, builder.counts["num_violations"]), prompts)


def _sequence_totals(clusters: ClusterTotals) -> dict[str, SequenceTotal]:
    out = {}
    for name in clusters.names:
        sizes, sums, singles = clusters.of(name)
        interval = clustered_mean(sizes, sums, singles)
        if name != "violation" and interval.clusters:
            out[name] = SequenceTotal(interval, words.interval_method(len(sizes), singles.count))
    return out


def _rewards(totals: RewardTotals, given: float | None, n_decided: int | None) -> Rewards:
    low, high = totals.min_reward, totals.max_reward
    known = totals.num_rewards > 0
    if given is not None:
        width, origin = given, "given"
    elif not known or (low >= 0 and high <= 1):
        width, origin = 1.0, "assumed [0, 1]"
    else:
        width, origin = high - low, "observed"
    return Rewards(
        num_rewards=totals.num_rewards,
        min=low if known else None,
        max=high if known else None,
        reward_range=width,
        reward_range_from=origin,
        surrogate=totals.surrogate(),
        masked_objective=None if n_decided is None else totals.masked_objective(n_decided),
    )


def _ppo(totals: RewardTotals) -> PpoTerms | None:
    return PpoTerms(PPO_CLIP, totals.num_tokens, *totals.unclipped()) if totals.num_tokens else None


def _token_masking(builder: SummaryBuilder, violations: Violations | None) -> TokenMasking | None:
    n, dropped = builder.counts["num_maskable"], builder.counts["num_token_masked"]
    if violations is None or not n:
        return None
    peak = builder.largest_compared
    return TokenMasking(violations.divergence, violations.delta_max, n, dropped, dropped / n, peak, peak)


def _importance(builder: SummaryBuilder) -> Importance:
    totals = builder.importance
    n = totals.num_tokens
    mean_ratio = totals.ratio / n if n else _mean_ratio_from_sequences(builder)
    ess_token = _divide(totals.ratio, totals.ratio_squared) * mean_ratio if n else math.nan
    return Importance(mean_ratio, ess_token, _sequence_ess(totals))


def _mean_ratio_from_sequences(builder: SummaryBuilder) -> float:
    sums = builder.sequences.get("seq_sum_ratio")
    return math.nan if sums is None else _divide(sums.total, builder.counts["num_tokens"])


def _sequence_ess(totals: ImportanceTotals) -> float:
    """(sum w)^2 / (n sum w^2) of w = exp(seq_sum_log_ratio)."""
    exponent = 2 * totals.log_weights - totals.log_squares
    return math.exp(exponent) / totals.num_sequences if math.isfinite(exponent) else math.nan


def _elsewhere(builder: SummaryBuilder) -> dict[str, float]:
    """Metrics that other projects log, token means over all policy tokens."""
    totals, n = builder.importance, builder.importance.num_tokens
    sums = {
        name: builder.sequences[f"seq_sum_{name}"].total
        for name in ("k1", "k3")
        if f"seq_sum_{name}" in builder.sequences
    }
    named = {
        "verl_kl": _divide(sums.get("k1", math.nan), builder.counts["num_tokens"]),
        "verl_k3_kl": _divide(sums.get("k3", math.nan), builder.counts["num_tokens"]),
        "verl_log_ppl_abs_diff": _divide(totals.absolute_mean, totals.num_means),
        "verl_chi2_token": _divide(totals.ratio_squared, n) - 1,
        "verl_chi2_seq": _divide(_exp(totals.log_squares), totals.num_sequences) - 1,
        "nemo_rl_token_mult_prob_error": _divide(totals.multiplicative, n),
    }
    return {name: value for name, value in named.items() if not math.isnan(value)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def _categories(totals: CategoryTotals, decided: bool) -> list[Category]:
    out = []
    for value, sums, maxima in totals.rows():
        rows, tokens, kept = sums[:3]
        divergences = {
            name: CategoryDivergence(_divide(float(sums[4 + 2 * at]), float(sums[3 + 2 * at])), float(maxima[at]))
            for at, name in enumerate(MAIN_DIVERGENCES)
            if maxima[at] > -math.inf
        }
        acceptance = float(kept / rows) if decided else None
        label = value if isinstance(value, int) else str(value)
        out.append(Category(label, int(rows), int(tokens), acceptance, divergences))
    return out
