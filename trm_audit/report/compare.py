"""Two audits side by side, A and B, as before and after a kernel change: who is further from the trainer?

    comparison = compare(builder_a, builder_b, summary_a, summary_b, "before/", "after/")
    comparison.differences["mean_k3"].low > 0   # B is further away, and that is not chance

Differences are always B - A. Where both hold the same groups, these are drawn together, so that what a prompt does to
both of them cancels; otherwise the two are drawn independently.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trm_audit.numerics.bootstrap import bootstrap_difference
from trm_audit.report.metrics import statistics
from trm_audit.report.noise import precision
from trm_audit.report.shown import percent
from trm_audit.report.summary import AuditSummary, json_ready

if TYPE_CHECKING:
    from trm_audit.report.builder import SummaryBuilder

SCHEMA_VERSION = 1
FEW_CLUSTERS = 20
"""With fewer a percentile interval is noticeably too narrow."""
NO_INTERVALS = "There are no intervals: one of the two has fewer than two groups, or infinite values."
DECISIVE = ("mean_kl", "mean_kl_estimate", "mean_k3")
"""Which metric says who is further from the trainer: the first that both audits have."""
SHOWN = (
    *("acceptance", "mean_kl", "mean_kl_estimate", "mean_kl_lower", "mean_kl_upper", "mean_tv", "mean_tv_upper"),
    *(
        "mean_k1",
        "mean_k3",
        "mean_abs_log_ratio",
        "mean_ratio",
        "ess_token",
        "ess_seq",
        "chi2_token",
        "log_ppl_difference",
    ),
)
"""Metrics that a reader is shown; the JSON has all of them."""
SPREADS = (
    *(
        "seq_max_kl",
        "seq_mean_kl",
        "seq_max_kl_estimate",
        "seq_mean_kl_estimate",
        "seq_max_kl_lower",
        "seq_mean_kl_lower",
        "seq_max_kl_upper",
        "seq_mean_kl_upper",
    ),
    *("seq_max_tv", "seq_max_tv_upper", "seq_max_k2", "seq_mean_k3", "seq_max_abs_log_ratio"),
)
"""Sequence statistics whose quantiles are compared."""


@dataclass(frozen=True)
class Difference:
    """One figure of both audits.

    Attributes:
        a, b: the figure of each.
        difference: b - a.
        low, high: its 95 % percentile bootstrap interval over groups; NaN where there is none.
        paired: the same groups of both were drawn together.
        clusters: groups behind the figure, of the audit that has fewer; 0 without an interval.

    Worked instance: Difference(a=0.012, b=0.044, difference=0.032, low=0.021, high=0.043, paired=True, clusters=50).
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    paired: bool
    clusters: int

    @property
    def has_interval(self) -> bool:
        """Whether the data tell how far chance alone moves the difference."""
        return not math.isnan(self.low + self.high)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a comparison says, in the order of a reader's questions.

    Attributes:
        verdict: which of the two is further from the trainer, in one sentence.
        notes: what stands in the way of comparing them.
        name_a, name_b: what the user calls them.
        differences: by the metric's name; of sequence statistics `seq_max_kl_p50`, `seq_max_kl_p99`, `seq_max_kl_max`
            (the largest, d_max), and of D_seq `seq_sum_kl_mean`.
        a, b: the two reports.
    """

    verdict: str
    notes: list[str]
    name_a: str
    name_b: str
    differences: dict[str, Difference]
    a: AuditSummary
    b: AuditSummary

    def shown(self) -> tuple[dict[str, Difference], dict[str, Difference]]:
        """What fits a screen: the main metrics with their intervals, and other figures, which have none."""
        drawn = {name: found for name, found in self.differences.items() if name in SHOWN and found.has_interval}
        metrics = self.a.metrics.keys() - {"max_abs_log_ratio", *SHOWN}
        rest = {name: found for name, found in self.differences.items() if name not in metrics and name not in drawn}
        return drawn, rest

    def to_dict(self) -> dict[str, Any]:
        """The tree as JSON types: infinities are strings, NaN is None."""
        head: dict[str, Any] = {"kind": "comparison", "schema_version": SCHEMA_VERSION}
        head |= {"verdict": self.verdict, "notes": self.notes, "name_a": self.name_a, "name_b": self.name_b}
        differences = {name: json_ready(asdict(found)) for name, found in self.differences.items()}
        return head | {"differences": differences, "a": self.a.to_dict(), "b": self.b.to_dict()}

    def to_json(self) -> str:
        """The comparison for machines, as `schemas/comparison.schema.json` describes it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)


def compare(
    builder_a: SummaryBuilder,
    builder_b: SummaryBuilder,
    summary_a: AuditSummary,
    summary_b: AuditSummary,
    name_a: str,
    name_b: str,
) -> Comparison:
    """The comparison of two audits.

    Args:
        builder_a, builder_b: what the summaries were made of; their metrics by group give the intervals.
        summary_a, summary_b: of each.
        name_a, name_b: what the user calls them.
    """
    (keys_a, sums_a), (keys_b, sums_b) = builder_a.metrics.clusters(), builder_b.metrics.clusters()
    shared = _overlap(builder_a, builder_b)
    if 2 * shared.both < shared.both + shared.only_a + shared.only_b and len(keys_a):
        keys_b = keys_b + keys_a.max() + 1  # other groups may have the same hash
    intervals, paired = bootstrap_difference(keys_a, sums_a, keys_b, sums_b, statistics)
    differences = _differences(summary_a, summary_b, intervals, paired)
    has_intervals = any(found.has_interval for found in differences.values())
    drawn = _on_intervals(shared, paired) if has_intervals else [NO_INTERVALS]
    return Comparison(
        verdict=_verdict(summary_a, summary_b, differences, paired),
        notes=_notes(summary_a, summary_b) + drawn,
        name_a=name_a,
        name_b=name_b,
        differences=differences,
        a=summary_a,
        b=summary_b,
    )


def _differences(
    a: AuditSummary, b: AuditSummary, intervals: dict[str, tuple[float, float]], paired: bool
) -> dict[str, Difference]:
    """What both have, acceptance first."""
    figures_a, figures_b = _figures(a), _figures(b)
    out = {}
    for name in (name for name in figures_a if name in figures_b):
        difference = figures_b[name] - figures_a[name]
        measured = name in a.metrics and name in b.metrics
        low, high = intervals.get(name, (math.nan, math.nan)) if measured else (math.nan, math.nan)
        if math.isnan(low + high):
            out[name] = Difference(figures_a[name], figures_b[name], difference, math.nan, math.nan, False, 0)
        else:
            clusters = min(a.metrics[name].clusters, b.metrics[name].clusters)
            out[name] = Difference(figures_a[name], figures_b[name], difference, low, high, paired, clusters)
    return out


def _figures(summary: AuditSummary) -> dict[str, float]:
    """Every figure that can be compared, by the name of its difference."""
    out = {} if summary.acceptance is None else {"acceptance": summary.acceptance}
    out |= {name: metric.value for name, metric in summary.metrics.items() if name != "acceptance"}
    for name in SPREADS:
        spread = summary.sequences.get(name)
        if spread is not None:
            out |= {f"{name}_p50": spread.p50, f"{name}_p99": spread.p99}
            out |= {f"{name}_max": summary.d_max[name]} if name in summary.d_max else {}
    return out | {f"{name}_mean": total.interval.mean for name, total in summary.d_seq.items()}


def _verdict(a: AuditSummary, b: AuditSummary, differences: dict[str, Difference], paired: bool) -> str:
    """Who is further from the trainer, whether chance alone could have done it, and what else could have."""
    missing = [name for name, summary in (("A", a), ("B", b)) if not summary.counts.n_total]
    if missing:
        return f"No rollouts were read in {' and '.join(missing)}."
    name = next((name for name in DECISIVE if name in differences), None)
    kept = differences.get("acceptance")
    tail = f"; A keeps {percent(kept.a)}, B {percent(kept.b)} of its sequences." if kept is not None else "."
    unlike = [name for name, differs in (_unlike(a, b) | {"prompts": not paired}).items() if differs]
    tail += f" They are not like for like: {', '.join(unlike)} differ." if unlike else ""
    if name is None:
        return f"A and B have no mean divergence in common{tail}"
    return _distance(name, differences[name]) + tail


def _distance(name: str, found: Difference) -> str:
    figures = f"{name} is {found.a:.4g} in A and {found.b:.4g} in B"
    if math.isnan(found.difference):
        return f"A and B cannot be told apart: {figures}"
    side = "further from" if found.difference > 0 else "nearer to"
    if not found.has_interval:
        if found.difference == 0:
            return f"No difference is shown: {figures}"
        return f"B is {side} the trainer than A, but there is no interval, so it may be chance: {figures}"
    figures += f", difference {found.difference:.4g} with a 95 % interval {found.low:.4g} to {found.high:.4g}"
    if found.low <= 0 <= found.high:
        return f"No difference is shown: {figures}, which contains 0"
    return f"B is {side} the trainer than A: {figures}, which excludes 0"


def _unlike(a: AuditSummary, b: AuditSummary) -> dict[str, bool]:
    """What can make a difference besides the sampling policies."""
    return {
        "audited policies": a.counts.audited_policies.keys() != b.counts.audited_policies.keys(),
        "models": (a.run or {}).get("model_hash") != (b.run or {}).get("model_hash"),
        "precisions": _precision(a) != _precision(b),
        "rejected rows (dropped before)": a.counts.num_dropped != b.counts.num_dropped,
    }


def _notes(a: AuditSummary, b: AuditSummary) -> list[str]:
    """What a reader must know before the differences; only what applies."""
    grades = (", ".join(f"{count} {grade}" for grade, count in each.counts.grades.items()) for each in (a, b))
    codes_a, codes_b = (", ".join(dict.fromkeys(finding.code for finding in each.warnings)) for each in (a, b))
    unlike, confidences = _unlike(a, b), [_confidence(each) for each in (a, b)]
    said = {
        f"Read the warnings of A first: {codes_a}.": bool(a.warnings),
        f"Read the warnings of B first: {codes_b}.": bool(b.warnings),
        "Grades of evidence differ (A: {}; B: {}): only figures that both have are compared.".format(*grades): (
            list(a.counts.grades) != list(b.counts.grades)
        ),
        "Bounds from sketches hold at different confidences (A: {}, B: {}): the surer ones are wider.".format(
            *map(percent, confidences)
        ): None not in confidences and confidences[0] != confidences[1],
        "The audited policies differ (raw, tempered or sampling): the figures do not speak of the same policy.": (
            unlike["audited policies"]
        ),
        f"Horizons differ (A: {a.counts.horizon}, B: {b.counts.horizon} policy tokens): sums and error bounds grow "
        "with the length; give both one --horizon to compare bounds.": a.counts.horizon != b.counts.horizon,
        "The models that scored them differ: each is compared with its own trainer.": unlike["models"],
        f"They were scored in different precision (A: {_precision(a)}, B: {_precision(b)}): a difference may be "
        "rounding; score both in the same.": unlike["precisions"],
        "The criteria differ: acceptance says something of the thresholds, too.": (
            (a.criteria, a.thresholds) != (b.criteria, b.thresholds)
        ),
        "Rejected rows were dropped before: what is compared is the rows that are left.": (
            a.counts.num_dropped + b.counts.num_dropped > 0
        ),
    }
    return [sentence for sentence, applies in said.items() if applies]


def _confidence(summary: AuditSummary) -> float | None:
    """Of the bounds from sketches; None without any, or where the scores do not say."""
    found = summary.bound_widths.get("sketch")
    return None if found is None else found.confidence


def _precision(summary: AuditSummary) -> str:
    """`bfloat16`, or `bfloat16 (head float32)`."""
    run = summary.run or {}
    return precision(run) or str(run.get("dtype") or "not known")


@dataclass(frozen=True)
class _Overlap:
    """How many groups (sequences where neither audit has any) occur where."""

    unit: str
    both: int
    only_a: int
    only_b: int


def _overlap(a: SummaryBuilder, b: SummaryBuilder) -> _Overlap:
    """By name where every row has a group; otherwise by the hashes of groups and rollouts, a few of which coincide."""
    named = all(each.counts["num_grouped"] == each.counts["n_total"] for each in (a, b))
    if named:
        of_a, of_b = (set(map(str, each.clusters.groups.index)) for each in (a, b))
    else:
        of_a, of_b = (set(map(str, each.metrics.clusters()[0].tolist())) for each in (a, b))
    grouped = a.counts["num_grouped"] + b.counts["num_grouped"]
    return _Overlap("groups" if grouped else "sequences", len(of_a & of_b), len(of_a - of_b), len(of_b - of_a))


def _on_intervals(shared: _Overlap, paired: bool) -> list[str]:
    """What the intervals rest on."""
    unit, both, only_a, only_b = shared.unit, shared.both, shared.only_a, shared.only_b
    said = ["Each interval holds at 95 % for itself: of twenty equal figures one is expected to exclude 0 by chance."]
    if not paired:
        said.append(
            f"The prompts are not the same ({both} {unit} in both, {only_a} only in A, {only_b} only in B): the two "
            "were drawn independently, and other prompts alone can make a difference."
        )
    elif only_a or only_b:
        said.append(
            f"{both} {unit} are in both and were drawn together; {only_a} only in A and {only_b} only in B can make a "
            "difference by themselves."
        )
    if min(only_a, only_b) + both < FEW_CLUSTERS:
        said.append(f"With {min(only_a, only_b) + both} {unit} the intervals are narrower than they should be.")
    return said
