"""The summary on a terminal, in the order of a reader's questions; every number comes from the summary as it is.

Names in the data are hostile until shown otherwise. Whatever comes from it passes `safe_text` and is never read as
markup: cells are `Text`, which has none.
"""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from trm_audit.report.noise import AGAINST, NoiseFloor, sharing_rung
from trm_audit.report.summary import AuditSummary, BoundsBlock, Category, Rewards

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_CATEGORIES = 12
_SHOWN_DELTAS = (1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
_INTERVALS = ("kl_lower", "kl_upper", "tv_lower", "tv_upper")
_SHOWN_TOKENS = ("kl", "kl_reverse", "tv", *_INTERVALS, "k1", "k2", "k3", "abs_log_ratio", "ratio")
_SHOWN_CURVES = (
    "seq_max_kl",
    "seq_mean_kl",
    "seq_max_kl_lower",
    "seq_max_kl_upper",
    "seq_max_k2",
    "seq_mean_k3",
    "seq_max_tv",
    "seq_max_abs_log_ratio",
)
_NAMES_WIDTH = 16
_OBEYED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


_SHOWN_OF_RUN = ("model", "model_hash", "dtype", "head_dtype", "device")


def safe_text(text: str) -> str:
    """`text` without what a terminal obeys: control characters, escapes, format and bidirectional marks, surrogates."""
    return "".join(" " if c in "\n\t" else c for c in text if c in "\n\t" or unicodedata.category(c) not in _OBEYED)


def render(summary: AuditSummary, console: Console) -> None:
    """Print the summary to a console; readable from 80 columns on."""
    console.print(Text(safe_text(summary.verdict), style="bold"))
    for section in (_data, _decision, _tokens, _sequences, _acceptance, _bounds, _objectives, _breakdowns):
        for part in section(summary):
            console.print()
            console.print(part)
    for note in summary.notes:
        console.print()
        console.print(Text(f"Note: {safe_text(note)}", style="dim"))


def _table(*columns: str) -> Table:
    """A table without lines, names to the left and numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for at, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if at else "left", no_wrap=at > 0, overflow="fold")
    return table


def _titled(title: str, *parts: Table | Text) -> Group:
    return Group(Text(safe_text(title), style="bold"), *parts)


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(safe_text(cell if isinstance(cell, str) else _number(cell))) for cell in cells))


def _number(value: object) -> str:
    """Four significant digits for a float, all digits for a count, a dash for what is not known."""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value is None else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.2f} %"


def _data(summary: AuditSummary) -> list[Group]:
    counts = summary.counts
    table = _table("", "count")
    _row(table, "sequences (N)", counts.n_total)
    for name, count in counts.grades.items():
        _row(table, f"  grade {name}", count)
    for name, count in counts.audited_policies.items():
        _row(table, f"  audited policy {name}", count)
    for name in ("num_without_policy_tokens", "num_skipped", "num_dropped"):
        if getattr(counts, name):
            _row(table, name, getattr(counts, name))
    for name in ("num_groups", "num_tokens", "num_disagreements", "num_infinite"):
        _row(table, name, getattr(counts, name))
    _row(table, "horizon (policy tokens)", counts.horizon)
    run = summary.run or {}
    for name, value in [*((name, run.get(name)) for name in _SHOWN_OF_RUN), ("sharing", sharing_rung(run))]:
        if value:
            _row(table, f"scored with {name}", str(value)[:16])
    return [_titled("What was read", table)]


def _decision(summary: AuditSummary) -> list[Group]:
    parts = []
    if summary.reasons:
        table = _table("cause", "count")
        for cause, count in summary.reasons.items():
            _row(table, cause, count)
        parts.append(_titled("Why sequences were rejected", table))
    found = summary.violations
    if found is not None:
        table = _table("", "violations", "of", "share", "95 % upper limit")
        for name, share in (("sequences", found.sequences), ("prompts", found.prompts)):
            if share is not None:
                _row(table, name, share.violations, share.n, _percent(share.share), _percent(share.upper_95))
        parts.append(_titled(f"Above delta_max = {found.delta_max:g}, by {found.divergence}", table))
    if summary.noise_floor is not None and summary.noise_floor.num_measured:
        parts.append(_noise_floor(summary.noise_floor))
    return parts


def _noise_floor(floor: NoiseFloor) -> Group:
    table = _table("", "mean", "p99", "max")
    for against, words in AGAINST.items():
        noise = getattr(floor, against)
        for name in ("kl", "abs_delta_logprob") if noise is not None else ():
            spread = getattr(noise, name)
            _row(table, f"{name} {words}", spread.mean, spread.p99, spread.max)
    measured = f"{floor.num_rollouts:,} rollouts, {floor.num_tokens:,} tokens"
    largest = f", largest of {floor.num_measured} runs" if floor.num_measured > 1 else ""
    return _titled(f"Noise floor of the scoring ({' and '.join(floor.dtypes)}; {measured}{largest})", table)


def _tokens(summary: AuditSummary) -> list[Group]:
    table = _table("", "mean", "p50", "p99", "p99.9", "max")
    for name in _SHOWN_TOKENS:
        spread = summary.tokens.get(name)
        if spread is not None:
            _row(table, name, spread.mean, spread.p50, spread.p99, spread.p999, spread.max)
    return [_titled("How far apart, per token (nats; tv and ratio have no unit)", table)] if table.row_count else []


def _sequences(summary: AuditSummary) -> list[Group]:
    table = _table("", "mean", "p50", "p90", "p99", "max")
    for name in _SHOWN_CURVES:
        spread = summary.sequences.get(name)
        if spread is not None:
            _row(table, name, spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
    totals = _table("", "mean", "low", "high")
    for name, total in summary.d_seq.items():
        _row(totals, name, total.interval.mean, total.interval.low, total.interval.high)
    methods = (Text(safe_text(method)) for method in dict.fromkeys(total.method for total in summary.d_seq.values()))
    parts = [_titled("How far apart, per sequence", table)] if table.row_count else []
    return parts + ([_titled("D_seq: mean over sequences", totals, *methods)] if totals.row_count else [])


def _acceptance(summary: AuditSummary) -> list[Group]:
    """Share kept at round thresholds; the others are in the JSON."""
    curves, deltas = summary.acceptance_curves.curves, summary.acceptance_curves.deltas
    shown = [name for name in _SHOWN_CURVES if name in curves][:4]
    table = _table("delta", *(name.removeprefix("seq_") for name in shown))
    for delta in _SHOWN_DELTAS if shown else ():
        _row(table, f"{delta:g}", *(_percent(curves[name].share[deltas.index(delta)]) for name in shown))
    return [_titled("Share of sequences that a threshold alone would keep", table)] if shown else []


def _bounds(summary: AuditSummary) -> list[Group]:
    """One table for each kind of evidence that is the best of some row; the JSON has the others."""
    whole, kept = summary.bounds.get("all", {}), summary.bounds.get("kept", {})
    shown = [name for name in whole if name in summary.counts.grades] or list(whole)
    return [_bound_table(name, whole[name], kept.get(name)) for name in shown]


def _bound_table(name: str, whole: BoundsBlock, kept: BoundsBlock | None) -> Group:
    blocks = [whole] if kept is None else [whole, kept]
    heads = ["published", "sharp", "published\nkept", "sharp\nkept"][: 2 * len(blocks)]
    table = _table("", *heads)
    for key in whole.inputs:
        _row(table, f"  {key}", *(cell for block in blocks for cell in (block.inputs.get(key), "")))
    for key in whole.bounds:
        _row(table, key, *(cell for b in blocks for cell in (b.bounds[key].published, b.bounds[key].sharp)))
    if whole.minorizer is not None:
        _row(table, "minorizer: L' - minimum", whole.minorizer.published, whole.minorizer.sharp)
    basis = Text(safe_text(f"{whole.label[:1].upper()}{whole.label[1:]}; {whole.rows} rows."))
    title = f"Bounds on |J(theta) - J(roll) - L'| ({name}, T = {whole.horizon})"
    return _titled(title, table, Text(safe_text(whole.sentence)), basis)


def _objectives(summary: AuditSummary) -> list[Group]:
    table = _table("", "value")
    rewards, ppo, masking = summary.rewards, summary.ppo, summary.token_masking
    if rewards is not None:
        _rewards_rows(table, rewards)
    _row(table, "mean ratio", summary.importance.mean_ratio)
    _row(table, "effective sample size, tokens", _percent(summary.importance.ess_token))
    _row(table, "effective sample size, sequences", _percent(summary.importance.ess_seq))
    if ppo is not None:
        above, below, n = ppo.negative_advantage_above, ppo.positive_advantage_below, ppo.num_tokens
        _row(table, f"PPO unclipped, ratio > {1 + ppo.clip:g}, A < 0", f"{above} of {n} tokens")
        _row(table, f"PPO unclipped, ratio < {1 - ppo.clip:g}, A > 0", f"{below} of {n} tokens")
    if masking is not None:
        _row(table, "token masking would drop", f"{masking.num_dropped} of {masking.num_tokens} tokens")
        _row(table, "largest divergence then", f"{_number(masking.max_after)}, as before")
    return [_titled("Objectives and importance weights", table)]


def _rewards_rows(table: Table, rewards: Rewards) -> None:
    if rewards.surrogate is not None:
        mean, low, high = (_number(getattr(rewards.surrogate, name)) for name in ("mean", "low", "high"))
        _row(table, "surrogate L' (95 % interval)", f"{mean} ({low} to {high})")
    _row(table, "masked objective L_masked", rewards.masked_objective)
    _row(table, "reward range", f"{rewards.reward_range:g} ({rewards.reward_range_from})")


def _breakdowns(summary: AuditSummary) -> list[Group]:
    parts = []
    for name in ("engine", "policy_version", "staleness"):
        found: list[Category] = getattr(summary, f"by_{name}")
        more = [Text(f"{len(found) - SHOWN_CATEGORIES} more in the JSON report.")] * (len(found) > SHOWN_CATEGORIES)
        if found:
            parts.append(_titled(f"By {name}", _breakdown(name, found), *more))
    return parts


def _breakdown(name: str, found: list[Category]) -> Table:
    present = {divergence for category in found for divergence in category.divergences}
    main = [divergence for divergence in ("kl", "kl_upper", "k3", "k2") if divergence in present][:2]
    table = _table(name, "n", "kept", *(f"{kind}\n{d}" for d in main for kind in ("mean", "max")))
    for category in found[:SHOWN_CATEGORIES]:
        cells: list[object] = []
        for divergence in main:
            spread = category.divergences.get(divergence)
            cells += [None, None] if spread is None else [spread.mean, spread.max]
        label = safe_text(str(category.value))
        short = label if len(label) <= _NAMES_WIDTH else label[: _NAMES_WIDTH - 1] + "…"
        _row(table, short, category.n, _percent(category.acceptance), *cells)
    return table
