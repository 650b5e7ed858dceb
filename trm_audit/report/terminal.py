"""The summary on a terminal, in the order of a reader's questions; every number comes from the summary as it is.

Names in the data are hostile until shown otherwise. Whatever comes from it passes `visible` and is never read as
markup: cells are `Text`, which has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trm_audit.report.blocks import Metric
from trm_audit.report.deltas import given_thresholds
from trm_audit.report.noise import AGAINST, NoiseFloor, sharing_rung
from trm_audit.report.shown import number, percent, visible
from trm_audit.report.summary import AuditSummary, BoundsBlock, BoundWidths, Category, Rewards
from trm_audit.report.words import at_confidence
from trm_audit.report.worth import EvidenceWorth

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_CATEGORIES = 12
_SHOWN_DELTAS = (1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_INTERVALS = ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
_SHOWN_TOKENS = (
    "kl",
    "kl_reverse",
    "tv",
    "kl_estimate",
    "hellinger2",
    *_INTERVALS,
    "k1",
    "k2",
    "k3",
    "abs_log_ratio",
    "ratio",
)
_SHOWN_CURVES = (
    "seq_max_kl",
    "seq_mean_kl",
    "seq_max_kl_estimate",
    "seq_mean_kl_estimate",
    "seq_max_kl_lower",
    "seq_max_kl_upper",
    "seq_max_k2",
    "seq_mean_k3",
    "seq_max_tv",
    "seq_max_tv_lower",
    "seq_max_tv_upper",
    "seq_max_abs_log_ratio",
)
NAMES_WIDTH = 16
SHOWN_WORST = 5


_SHOWN_OF_RUN = ("model", "model_hash", "dtype", "head_dtype", "device")


def render(summary: AuditSummary, console: Console, *, full: bool = False) -> None:
    """Print the summary to a console; readable from 80 columns on.

    Args:
        full: all tables and notes, not the first screen alone.
    """
    console.print(Text(visible(summary.verdict), style="bold"))
    if summary.evidence:
        console.print(Text(visible(summary.evidence)))
    for finding in summary.warnings:
        console.print(Text("Warning: ", style="bold yellow"), Text(visible(finding.sentence)), sep="")
    for section in SECTIONS if full else FIRST_SCREEN:
        for part in section(summary):
            console.print()
            console.print(part)
    for note in summary.notes if full else ():
        console.print()
        console.print(Text(f"Note: {visible(note)}", style="dim"))
    if not full and summary.counts.n_total:
        console.print()
        console.print(Text(MORE, style="dim"))


def table_of(*columns: str) -> Table:
    """A table without lines, names to the left and numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return table


def _targets(summary: AuditSummary) -> list[Group]:
    """What was asked for with --target-acceptance."""
    table = table_of("threshold on", "delta", "keeps")
    for target in summary.targets:
        row(table, target.statistic, target.delta, percent(target.share_kept))
    title = "" if not summary.targets else f"Thresholds that keep {100 * summary.targets[0].target:g} %"
    return [titled(title, table)] if summary.targets else []


def titled(title: str, *parts: Table | Text) -> Group:
    return Group(Text(visible(title), style="bold"), *parts)


def row(table: Table, *cells: float | str | None) -> None:
    table.add_row(*(Text(visible(number(cell))) for cell in cells))


def _data(summary: AuditSummary) -> list[Group]:
    counts = summary.counts
    table = table_of("", "count")
    row(table, "sequences (N)", counts.n_total)
    for name, count in counts.grades.items():
        row(table, f"  grade {name}", count)
    for name, count in counts.audited_policies.items():
        row(table, f"  audited policy {name}", count)
    for name in ("num_without_policy_tokens", "num_skipped", "num_dropped"):
        if getattr(counts, name):
            row(table, name, getattr(counts, name))
    for name in ("num_groups", "num_tokens", "num_disagreements", "num_infinite"):
        row(table, name, getattr(counts, name))
    row(table, "horizon (policy tokens)", counts.horizon)
    run = summary.run or {}
    for name, value in [*((name, run.get(name)) for name in _SHOWN_OF_RUN), ("sharing", sharing_rung(run))]:
        if value:
            row(table, f"scored with {name}", str(value)[:16])
    return [titled("What was read", table)]


def _decision(summary: AuditSummary) -> list[Group]:
    parts = []
    if summary.reasons:
        table = table_of("cause", "count")
        for cause, count in summary.reasons.items():
            row(table, cause, count)
        parts.append(titled("Why sequences were rejected", table))
    found = summary.violations
    if found is not None:
        table = table_of("", "violations", "of", "share", "95 % upper limit")
        for name, share in (("sequences", found.sequences), ("prompts", found.prompts)):
            if share is not None:
                row(table, name, share.violations, share.n, percent(share.share), percent(share.upper_95))
        parts.append(titled(f"Above delta_max = {found.delta_max:g}, by {found.divergence}", table))
    if summary.noise_floor is not None and summary.noise_floor.num_measured:
        parts.append(_noise_floor(summary.noise_floor))
    return parts


def _noise_floor(floor: NoiseFloor) -> Group:
    table = table_of("", "mean", "p99", "max")
    for against, words in AGAINST.items():
        noise = getattr(floor, against)
        for name in ("kl", "abs_delta_logprob") if noise is not None else ():
            spread = getattr(noise, name)
            row(table, f"{name} {words}", spread.mean, spread.p99, spread.max)
    measured = f"{floor.num_rollouts:,} rollouts, {floor.num_tokens:,} tokens"
    largest = f", largest of {floor.num_measured} runs" if floor.num_measured > 1 else ""
    return titled(f"Noise floor of the scoring ({' and '.join(floor.dtypes)}; {measured}{largest})", table)


def _tokens(summary: AuditSummary) -> list[Group]:
    table = table_of("", "mean", "p50", "p99", "p99.9", "max")
    for name in _SHOWN_TOKENS:
        spread = summary.tokens.get(name)
        if spread is not None:
            row(table, name, spread.mean, spread.p50, spread.p99, spread.p999, spread.max)
    return [titled("How far apart, per token (nats; tv and ratio have no unit)", table)] if table.row_count else []


def _sequences(summary: AuditSummary) -> list[Group]:
    table = table_of("", "mean", "p50", "p90", "p99", "max")
    for name in _SHOWN_CURVES:
        spread = summary.sequences.get(name)
        if spread is not None:
            row(table, name, spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    totals = table_of("", "mean", "low", "high")
    for name, total in summary.d_seq.items():
        row(totals, name, total.interval.mean, total.interval.low, total.interval.high)
    methods = (Text(visible(method)) for method in dict.fromkeys(total.method for total in summary.d_seq.values()))
    parts = [titled("How far apart, per sequence", table)] if table.row_count else []
    return parts + ([titled("D_seq: mean over sequences", totals, *methods)] if totals.row_count else [])


def _widths(summary: AuditSummary) -> list[Group]:
    """How far the bounds are apart; each grade for itself."""
    return [_width_table(grade, found) for grade, found in summary.bound_widths.items()]


def _width_table(grade: str, found: BoundWidths) -> Group:
    table = table_of("", "mean", "p50", "p90", "p99", "max")
    for name, spread in {**found.tokens, **found.sequences}.items():
        row(table, name, spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    sure = "rigorous" if grade == "interval" else at_confidence(found.confidence)
    return titled(f"Width of the bounds, upper less lower ({grade}, {sure})", table)


def _worth(summary: AuditSummary) -> list[Group]:
    """What storing other evidence would have decided."""
    return [] if summary.evidence_worth is None else [_worth_table(summary.evidence_worth)]


def _worth_table(found: EvidenceWorth) -> Group:
    at = f"KL {number(found.delta_kl)}", f"TV {number(found.delta_tv)}"
    table = table_of(
        "stored", "bytes\na token", *(f"{where}\n{of}" for where in at for of in ("positions", "sequences"))
    )
    for name, kind in found.kinds.items():
        shares = (share for each in (kind.kl, kind.tv) for share in (each.positions, each.sequences))
        row(table, name, kind.bytes_per_token, *map(percent, shares))
    row(table, "full logits", found.full_bytes, *[percent(1.0)] * 4)
    title = f"Verdicts that other evidence would make certain (sketches {at_confidence(found.confidence)})"
    return titled(title, table, Text(visible(found.sentence)), Text(visible(found.basis)))


def _acceptance(summary: AuditSummary) -> list[Group]:
    """Share kept at round thresholds, of the criteria's statistics first; the others are in the JSON."""
    curves, deltas = summary.acceptance_curves.curves, summary.acceptance_curves.deltas
    own = given_thresholds(summary.thresholds)
    shown = [name for name in sorted(_SHOWN_CURVES, key=lambda name: name not in own) if name in curves][:4]
    table = table_of("delta", *(name.removeprefix("seq_") for name in shown))
    for delta in _SHOWN_DELTAS if shown else ():
        row(table, f"{delta:g}", *(percent(curves[name].share[deltas.index(delta)]) for name in shown))
    return [titled("Share of sequences that a threshold alone would keep", table)] if shown else []


def _smallest_bound(summary: AuditSummary) -> list[Text]:
    shown = [(name, blocks[0]) for name, blocks in summary.main_bounds().items()]
    return [Text(visible(f"Bound on the surrogate's error ({name}): {block.sentence}")) for name, block in shown[:1]]


def _by_staleness(summary: AuditSummary) -> list[Group]:
    return [titled("By staleness", _breakdown("staleness", summary.by_staleness))] if summary.by_staleness else []


def _bounds(summary: AuditSummary) -> list[Group]:
    """One table for each kind of evidence that is the best of some row; the JSON has the others."""
    return [_bound_table(name, blocks) for name, blocks in summary.main_bounds().items()]


def _bound_table(name: str, blocks: Sequence[BoundsBlock]) -> Group:
    """Over all rows and over the kept, or over the kept alone: the label says which."""
    whole = blocks[0]
    heads = ["published", "sharp", "published\nkept", "sharp\nkept"][: 2 * len(blocks)]
    table = table_of("", *heads)
    for key in whole.inputs:
        row(table, f"  {key}", *(cell for block in blocks for cell in (block.inputs.get(key), "")))
    for key in whole.bounds:
        row(table, key, *(cell for b in blocks for cell in (b.bounds[key].published, b.bounds[key].sharp)))
    if whole.minorizer is not None:
        row(table, "minorizer: L' - minimum", whole.minorizer.published, whole.minorizer.sharp)
    basis = Text(visible(f"{whole.label[:1].upper()}{whole.label[1:]}; {whole.rows} rows."))
    title = f"Bounds on |J(theta) - J(roll) - L'| ({name}, T = {whole.horizon})"
    return titled(title, table, Text(visible(whole.sentence)), basis)


def _objectives(summary: AuditSummary) -> list[Group]:
    table = table_of("", "value")
    rewards, ppo, masking = summary.rewards, summary.ppo, summary.token_masking
    if rewards is not None:
        _rewards_rows(table, rewards)
    if ppo is not None:
        above, below, n = ppo.negative_advantage_above, ppo.positive_advantage_below, ppo.num_tokens
        row(table, f"PPO unclipped, ratio > {1 + ppo.clip:g}, A < 0", f"{above} of {n} tokens")
        row(table, f"PPO unclipped, ratio < {1 - ppo.clip:g}, A > 0", f"{below} of {n} tokens")
    if masking is not None:
        row(table, "token masking would drop", f"{masking.num_dropped} of {masking.num_tokens} tokens")
        row(table, "largest divergence then", f"{number(masking.max_after)}, as before")
    return [titled("Objectives", table)] if table.row_count else []


def _main_metrics(summary: AuditSummary) -> list[Group]:
    return _metric_table(summary, summary.main_metrics())


def _metrics(summary: AuditSummary) -> list[Group]:
    """What training logs show too; definitions, and the names that they have elsewhere, are in the page."""
    return _metric_table(summary, summary.metrics)


def _metric_table(summary: AuditSummary, metrics: Mapping[str, Metric]) -> list[Group]:
    table = table_of("", "value", "low", "high")
    for name, found in metrics.items():
        row(table, name, found.value, found.low, found.high)
    clusters = max((found.clusters for found in metrics.values()), default=0)
    units = "sequences" if summary.counts.num_groups is None else "groups"
    title = f"Figures of training logs (95 % bootstrap intervals over {clusters} {units})"
    return [titled(title, table)] if table.row_count else []


def _rewards_rows(table: Table, rewards: Rewards) -> None:
    if rewards.surrogate is not None:
        mean, low, high = (number(getattr(rewards.surrogate, name)) for name in ("mean", "low", "high"))
        row(table, "surrogate L' (95 % interval)", f"{mean} ({low} to {high})")
    row(table, "masked objective L_masked", rewards.masked_objective)
    row(table, "reward range", f"{rewards.reward_range:g} ({rewards.reward_range_from})")


def _worst(summary: AuditSummary) -> list[Group]:
    table = table_of("sequence", "statistic", "value", "at token", "of")
    for found in summary.worst[:SHOWN_WORST]:
        row(table, short(found.rollout_id), found.statistic, found.value, found.position, found.response_length)
    return [titled("Worst sequences", table)] if summary.worst else []


def _breakdowns(summary: AuditSummary) -> list[Group]:
    parts = []
    for name in ("engine", "policy_version", "staleness"):
        found: list[Category] = getattr(summary, f"by_{name}")
        more = [Text(f"{len(found) - SHOWN_CATEGORIES} more in the JSON report.")] * (len(found) > SHOWN_CATEGORIES)
        if found:
            parts.append(titled(f"By {name}", _breakdown(name, found), *more))
    return parts


def _breakdown(name: str, found: list[Category]) -> Table:
    present = {divergence for category in found for divergence in category.divergences}
    main = [divergence for divergence in ("kl", "kl_estimate", "kl_upper", "k3", "k2") if divergence in present][:2]
    table = table_of(name, "n", "kept", *(f"{kind}\n{d}" for d in main for kind in ("mean", "max")))
    for category in found[:SHOWN_CATEGORIES]:
        cells: list[float | None] = []
        for divergence in main:
            spread = category.divergences.get(divergence)
            cells += [None, None] if spread is None else [spread.mean, spread.max]
        row(table, short(str(category.value)), category.n, percent(category.acceptance), *cells)
    return table


def short(name: str) -> str:
    """A name from the data, inert and no wider than a column."""
    label = visible(name)
    return label if len(label) <= NAMES_WIDTH else label[: NAMES_WIDTH - 1] + "…"


FIRST_SCREEN = (_decision, _targets, _main_metrics, _acceptance, _smallest_bound, _by_staleness)
"""What a reader needs first; the page has the rest."""
MORE = "More: -o report.html writes the whole page, --full prints all tables here."
SECTIONS = (
    _data,
    _decision,
    _targets,
    _tokens,
    _sequences,
    _widths,
    _worth,
    _metrics,
    _acceptance,
    _bounds,
    _objectives,
    _breakdowns,
    _worst,
)
"""In the order of a reader's questions."""
