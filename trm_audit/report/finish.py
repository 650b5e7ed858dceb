"""From totals to the summary: the only place where the report's numbers are computed."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trm_audit.errors import UsageError
from trm_audit.numerics.confidence import clopper_pearson_upper, clustered_mean
from trm_audit.numerics.ragged import Floats
from trm_audit.report import words
from trm_audit.report.bins import EDGES
from trm_audit.report.bound_blocks import bound_blocks
from trm_audit.report.breakdown import MAIN_DIVERGENCES
from trm_audit.report.decode import TokenText
from trm_audit.report.distributions import distribution, quantiles
from trm_audit.report.findings import evidence, findings
from trm_audit.report.horizons import bound_curves
from trm_audit.report.noise import differing, noise_floor
from trm_audit.report.rewards import PPO_CLIP, RewardTotals
from trm_audit.report.summary import (
    AuditSummary,
    Category,
    CategoryDivergence,
    CombinedAcceptance,
    Counts,
    PpoTerms,
    Rewards,
    SequenceTotal,
    Share,
    TokenMasking,
    Violations,
)
from trm_audit.report.totals import ClusterTotals
from trm_audit.report.widths import smallest_confidence
from trm_audit.report.worth import evidence_worth
from trm_audit.rollout import (
    EXACT_DIVERGENCES,
    GRADES,
    INTERVAL_DIVERGENCES,
    SAMPLED_DIVERGENCES,
    SKETCH_ESTIMATES,
)

if TYPE_CHECKING:
    from trm_audit.report.builder import SummaryBuilder

_RANKED = (*EXACT_DIVERGENCES, *SKETCH_ESTIMATES, *INTERVAL_DIVERGENCES, *SAMPLED_DIVERGENCES)
_STATISTICS = [f"seq_{kind}_{divergence}" for divergence in _RANKED for kind in ("max", "mean", "sum")]
_DRAWN = [
    *MAIN_DIVERGENCES,
    *(f"seq_{kind}_{divergence}" for kind in ("max", "mean") for divergence in MAIN_DIVERGENCES),
]
"""Quantities whose distribution is shown."""
_ORDER = {name: at for at, name in enumerate(_STATISTICS)}


@dataclass(frozen=True)
class Settings:
    """The arguments of `SummaryBuilder.finish`."""

    horizon: int | None
    reward_range: float | None
    target_acceptance: float | None
    tokenizer: TokenText | None
    num_skipped: int
    num_dropped: int
    runs: Sequence[Mapping[str, Any]]
    limits: Sequence[tuple[str, float]]


def summarize(builder: SummaryBuilder, settings: Settings) -> AuditSummary:
    """All numbers of the report."""
    counts = _counts(builder, _horizon(builder, settings.horizon), settings)
    decided = builder.counts["num_decided"] == builder.counts["n_total"] > 0
    n_kept = builder.counts["n_kept"] if decided else None
    whole = settings.num_dropped == 0  # otherwise only kept rows are here, and what is said of all would be false
    rewards = _rewards(builder.rewards, settings.reward_range, counts.n_total if decided else None, whole)
    metrics = builder.metrics.finish()
    if not (decided and whole):
        metrics.pop("acceptance", None)
    floor = noise_floor(settings.runs, settings.limits)
    summary = AuditSummary(
        verdict="",
        notes=[],
        counts=counts,
        run=dict(settings.runs[0]) if settings.runs else None,
        criteria=builder.criteria,
        thresholds=builder.thresholds,
        noise_floor=floor,
        n_kept=n_kept,
        acceptance=None if n_kept is None else n_kept / counts.n_total,
        reasons=dict(sorted(builder.reasons.items(), key=lambda entry: (-entry[1], entry[0]))),
        violations=_violations(builder, counts.num_groups is not None) if whole else None,
        evidence_worth=evidence_worth(settings.runs, builder.thresholds.delta_max, builder.thresholds.max_of),
        metrics=metrics,
        **_spreads(builder, settings),
        **(_choices(builder, counts, settings) if whole else {}),
        **_guarantees(builder, counts, rewards, settings),
        **_reasons(builder, decided and whole, settings.tokenizer),
        worst=builder.worst.finish(settings.tokenizer),
    )
    return _in_words(builder, summary, settings)


def _in_words(builder: SummaryBuilder, summary: AuditSummary, settings: Settings) -> AuditSummary:
    """The summary with its sentences: verdict, evidence, warnings, notes."""
    warnings = findings(
        builder.quality,
        counts=summary.counts,
        metrics=summary.metrics,
        acceptance=summary.acceptance,
        noise_floor=summary.noise_floor,
        violations=summary.violations,
        tokenizer=settings.tokenizer,
    )
    compared, sampled = summary.violations is not None, "seq_sum_k3" in summary.sequences
    notes = words.notes(summary.counts, summary.bounds, summary.bound_widths, compared, sampled)
    confidence = smallest_confidence(settings.runs)
    return replace(
        summary,
        verdict=words.verdict(summary.counts, summary.sequences, summary.n_kept, summary.criteria, confidence),
        evidence=evidence(summary.counts, confidence),
        num_warnings=len(warnings),
        warnings=warnings,
        notes=words.run_notes(differing(settings.runs)) + notes,
        token_masking=_token_masking(builder, summary.violations),
    )


def _spreads(builder: SummaryBuilder, settings: Settings) -> dict[str, Any]:
    """How far apart: quantiles and distributions, per token and per sequence."""
    sequences = {name: builder.sequences[name] for name in sorted(builder.sequences, key=_ORDER.__getitem__)}
    tokens = dict(sorted(builder.tokens.items()))
    drawn = {**tokens, **sequences}
    spreads = {name: quantiles(histogram) for name, histogram in sequences.items()}
    return {
        "tokens": {name: quantiles(histogram) for name, histogram in tokens.items()},
        "sequences": spreads,
        "distributions": {name: distribution(drawn[name]) for name in _DRAWN if name in drawn},
        "probabilities": builder.probabilities.finish(),
        "d_max": {name: spread.max for name, spread in spreads.items() if name.startswith("seq_max_")},
        "d_seq": _sequence_totals(builder.clusters, spreads),
        "bound_widths": builder.widths.finish(smallest_confidence(settings.runs)),
    }


def _choices(builder: SummaryBuilder, counts: Counts, settings: Settings) -> dict[str, Any]:
    """What thresholds would do; only where all sequences are there."""
    wanted = settings.target_acceptance
    return {
        "acceptance_curves": builder.deltas.curves(),
        "acceptance_combined": _combined(builder, counts.num_without_policy_tokens),
        "delta_tables": builder.deltas.tables(),
        "targets": [] if wanted is None else builder.deltas.targets(wanted),
        "acceptance_by_length": builder.lengths.finish(),
    }


def _guarantees(builder: SummaryBuilder, counts: Counts, rewards: Rewards, settings: Settings) -> dict[str, Any]:
    """Bounds and objectives; of the kept rows only where the others are not here."""
    whole, confidence = settings.num_dropped == 0, smallest_confidence(settings.runs)
    surrogate = None if rewards.surrogate is None else rewards.surrogate.mean
    blocks = bound_blocks(builder.evidence, counts, rewards.reward_range, surrogate, confidence)
    return {
        "bounds": blocks if whole else {subset: found for subset, found in blocks.items() if subset != "all"},
        "bounds_by_horizon": bound_curves(builder.evidence, counts, rewards.reward_range) if whole else {},
        "rewards": rewards if builder.rewards.num_advantages else None,
    }


def _reasons(builder: SummaryBuilder, decided: bool, tokenizer: TokenText | None) -> dict[str, Any]:
    """Where the divergence comes from."""
    by_row = {f"by_{name}": _categories(totals.rows(), decided) for name, totals in builder.breakdowns.items()}
    return {
        **by_row,
        **{f"by_{axis}": builder.bins.finish(axis) for axis in EDGES},
        "by_token": builder.token_ids.finish(tokenizer),
        "by_group": _categories(builder.by_group.rows(), decided),
        "impulses": builder.impulses.finish(),
        "routing": builder.routing.finish(),
        "ppo": _ppo(builder.rewards),
    }


def _horizon(builder: SummaryBuilder, given: int | None) -> int | None:
    seen = max([builder.longest, *(len(totals.by_position) for totals in builder.evidence.values())], default=0)
    if given is not None and given < seen:
        raise UsageError(
            f"horizon {given} is shorter than the longest response, {seen} policy tokens",
            place="--horizon",
            next_step=f"Give the longest response that the policies can produce, at least {seen}, or no horizon.",
        )
    return given or seen or None


def _counts(builder: SummaryBuilder, horizon: int | None, settings: Settings) -> Counts:
    known = builder.counts
    num_groups = len(builder.clusters.groups.index) + known["n_total"] - known["num_grouped"]
    return Counts(
        n_total=known["n_total"] + settings.num_dropped,
        grades={grade: builder.grades[grade] for grade in GRADES if grade in builder.grades},
        audited_policies=dict(sorted(builder.audited_policies.items())),
        num_tokens=known["num_tokens"],
        num_groups=num_groups if known["num_grouped"] else None,
        num_without_policy_tokens=known["num_without_policy_tokens"],
        num_disagreements=known["num_disagreements"],
        num_infinite=known["num_infinite"],
        num_skipped=settings.num_skipped,
        num_dropped=settings.num_dropped,
        horizon=horizon,
    )


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
    compared = words.deciding(builder.thresholds, builder.grades)
    return Violations(compared, delta, _share(n, builder.counts["num_violations"]), prompts)


def _sequence_totals(clusters: ClusterTotals, known: Collection[str]) -> dict[str, SequenceTotal]:
    """Those that some sequence has: the zeros of sequences without policy tokens alone are no figure."""
    out = {}
    for name in clusters.names:
        sizes, sums, singles = clusters.of(name)
        interval = clustered_mean(sizes, sums, singles)
        if name in known and interval.clusters:
            out[name] = SequenceTotal(interval, words.interval_method(len(sizes), singles.count))
    return out


def _rewards(totals: RewardTotals, given: float | None, n_decided: int | None, whole: bool) -> Rewards:
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
        surrogate=totals.surrogate() if whole else None,
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


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan


def _categories(found: list[tuple[Hashable, Floats, Floats]], decided: bool) -> list[Category]:
    out = []
    for value, sums, maxima in found:
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
