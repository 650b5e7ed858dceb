"""The figures of the questions which delta, and what it guarantees: acceptance and error bounds as curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from trm_audit.report.blocks import BoundCurves
from trm_audit.report.deltas import PAPER, given_thresholds
from trm_audit.report.page.axes import Axis, Mark
from trm_audit.report.page.figures import DIVERGENCES, STYLE, Figure, figure
from trm_audit.report.page.plots import Cells, Panel, Series, chart, grid, pairs
from trm_audit.report.page.svg import NUM_SHADES
from trm_audit.report.shown import number, percent
from trm_audit.report.summary import AuditSummary, BoundsBlock, CombinedAcceptance

CURVES = {
    "max": ("kl", "kl_estimate", "kl_lower", "kl_upper", "k2", "abs_log_ratio"),
    "mean": ("kl", "kl_estimate", "kl_lower", "kl_upper", "k3", "abs_log_ratio"),
    "sum": ("kl", "kl_estimate", "kl_lower", "kl_upper", "k3"),
}
"""Statistic -> the divergences that criteria take by default, or that logs show; the JSON has all."""


def deltas(summary: AuditSummary) -> list[Figure]:
    """Which delta: acceptance against it, of both criteria together, and by length."""
    limits = summary.thresholds
    titles = (
        ("max", "maximum", limits.delta_max),
        ("mean", "mean", limits.delta_avg),
        ("sum", "total", limits.delta_total),
    )
    return [
        *(found for kind, words, delta in titles for found in _acceptance(summary, kind, words, delta)),
        *(found for pair in sorted(summary.acceptance_combined, key=_order) for found in _combined(summary, pair)),
        *_by_length(summary),
    ]


def _order(found: CombinedAcceptance) -> int:
    return DIVERGENCES.index(found.max_of) if found.max_of in DIVERGENCES else len(DIVERGENCES)


def _acceptance(summary: AuditSummary, kind: str, words: str, delta: float | None) -> list[Figure]:
    grid_deltas, curves = summary.acceptance_curves.deltas, summary.acceptance_curves.curves
    shown = [name for name in curves if name in given_thresholds(summary.thresholds)]
    shown += [f"seq_{kind}_{d}" for d in CURVES[kind]]
    found = {d: curves[f"seq_{kind}_{d}"].share for d in DIVERGENCES if f"seq_{kind}_{d}" in {*shown} & {*curves}}
    if not found:
        return []
    marks = _marks(PAPER.get(kind), delta)
    low, high = _with_marks(grid_deltas, marks, _moving(found.values()))
    x = Axis("delta", "log", limits=(grid_deltas[low], grid_deltas[high]))
    at = next((at for at in (delta, PAPER.get(kind), 1.0) if at in grid_deltas), grid_deltas[low])
    kept = ", ".join(f"{percent(share[grid_deltas.index(at)])} by {d}" for d, share in found.items())
    series = [Series(d, grid_deltas, share, style=STYLE[d]) for d, share in found.items()]
    y = Axis("sequences kept", percent=True, limits=(0, 1.02))
    return figure(
        f"acceptance-{kind}",
        f"Kept by a threshold on the {words}",
        f"At delta {number(at)}: {kept}.",
        lambda name, alt: chart(name, alt, x, [Panel(y, series)], marks),
        ["delta", *found],
        [[number(d), *(percent(s[i]) for s in found.values())] for i, d in enumerate(grid_deltas) if low <= i <= high],
    )


def _marks(paper: float | None, yours: float | None) -> list[Mark]:
    """The thresholds of the paper and of the criteria; one where they are the same."""
    if paper is not None and paper == yours:
        return [Mark(paper, f"paper and yours {number(paper)}")]
    return [Mark(at, f"{name} {number(at)}") for name, at in (("paper", paper), ("yours", yours)) if at is not None]


def _with_marks(deltas: Sequence[float], marks: Sequence[Mark], shown: tuple[int, int]) -> tuple[int, int]:
    """`shown`, made wide enough for the marks among the deltas."""
    low, high = shown
    at = [i for i, delta in enumerate(deltas) if any(delta == mark.value for mark in marks)]
    return max(0, min([low, *(i - 1 for i in at)])), min(len(deltas) - 1, max([high, *(i + 1 for i in at)]))


def _moving(shares: Iterable[Sequence[float]]) -> tuple[int, int]:
    """The deltas between which some curve rises, with one before and one after."""
    rows = list(zip(*shares, strict=True))
    last = len(rows) - 1
    low = next((i for i, row in enumerate(rows) if row != rows[0]), 1)
    high = next((i for i in range(last, 0, -1) if rows[i - 1] != rows[last]), last)
    return max(0, low - 1), max(min(last, high + 1), low)


def _combined(summary: AuditSummary, found: CombinedAcceptance) -> list[Figure]:
    rows, columns = [list(column) for column in zip(*found.share, strict=True)], found.share
    wide, high = _moving(rows), _moving(columns)
    across, up = (slice(low, end + 1) for low, end in (wide, high))
    if not any(0 < share < 1 for column in found.share for share in column):
        return []  # all or none, everywhere: the curves say it
    levels = [[_share_shade(share) for share in row[up]] for row in found.share[across]]
    deltas_x, deltas_y = found.deltas[across], found.deltas[up]
    edges_x, edges_y = [number(d) for d in deltas_x], [number(d) for d in deltas_y]
    given = given_thresholds(summary.thresholds)
    at = (given.get(f"seq_max_{found.max_of}", -1.0), given.get(f"seq_mean_{found.avg_of}", -1.0))
    at = at if all(value in found.deltas for value in at) else (PAPER["max"], PAPER["mean"])
    finding, points = f"kept {percent(found.share[-1][-1])} at the largest thresholds.", []
    if all(value in found.deltas for value in at):
        i, j = (found.deltas.index(value) for value in at)
        finding = (
            f"seq_max_{found.max_of} up to {number(at[0])} and seq_mean_{found.avg_of} up to {number(at[1])} together "
            f"keep {percent(found.share[i][j])} (ringed); the first alone at most {percent(found.share[i][-1])}, "
            f"the second alone at most {percent(found.share[-1][j])}."
        )
        points = [(i - wide[0] + 0.5, j - high[0] + 0.5)]
    x = Axis(f"delta of seq_max_{found.max_of}", edges=_written(deltas_x))
    y = Axis(f"delta of seq_mean_{found.avg_of}", edges=_written(deltas_y))
    return figure(
        f"combined-{found.max_of}-{found.avg_of}",
        f"Kept by max {found.max_of} and mean {found.avg_of} together",
        finding,
        lambda name, alt: grid(name, alt, x, y, Cells(levels, "0 %", "100 %", points=points)),
        [f"max {found.max_of} ↓ mean {found.avg_of} →", *edges_y],
        [[edges_x[k], *map(percent, row[up])] for k, row in enumerate(found.share[across])],
    )


def _written(deltas: Sequence[float]) -> list[float]:
    """Edges of an axis that names the powers of ten, or all where there are fewer than two; the last bin has no end."""
    decades = [delta if f"{delta:e}".startswith("1.000000e") else math.nan for delta in deltas]
    few = sum(map(math.isfinite, decades)) < 2
    return [*(deltas if few else decades), math.nan]


def _share_shade(share: float) -> int:
    """Equal steps from 0 (none at all) to 1."""
    return min(NUM_SHADES, 1 + int(NUM_SHADES * min(share, 1.0))) if share > 0 else 0


def _by_length(summary: AuditSummary) -> list[Figure]:
    found = summary.acceptance_by_length
    some = [] if found is None else [i for i, n in enumerate(found.n) if n]
    if found is None or not found.curves or len(some) < 2:
        return []
    edges, centres = [number(edge) for edge in found.edges], [i + 0.5 for i in range(len(found.n))]
    series = [
        Series(f"{c.statistic} ≤ {number(c.delta)}", centres, c.share_kept, style=at)
        for at, c in enumerate(found.curves)
    ]
    said = [f"{c.statistic} {_between([percent(c.share_kept[i]) for i in some])}" for c in found.curves]
    y = Axis("sequences kept", percent=True, limits=(0, 1.02))
    return figure(
        "length",
        "Sequences kept by length",
        f"From the shortest to the longest they keep: {'; '.join(said)}.",
        lambda name, alt: chart(name, alt, Axis("policy tokens", edges=found.edges), [Panel(y, series)]),
        ["from", "to below", "sequences", *(f"{c.statistic} ≤ {number(c.delta)}" for c in found.curves)],
        [
            [edges[i], edges[i + 1], number(n), *(percent(c.share_kept[i]) for c in found.curves)]
            for i, n in enumerate(found.n)
        ],
    )


def _between(shares: Sequence[str]) -> str:
    """The first and the last; one where all are the same."""
    return shares[0] if len(set(shares)) == 1 else f"{shares[0]} to {shares[-1]}"


def main_evidence(summary: AuditSummary) -> list[str]:
    """The kinds of evidence whose bounds stand open: the grades that occur, otherwise what there is."""
    whole = summary.bounds.get("all") or summary.bounds.get("kept", {})
    return [name for name in whole if name in summary.counts.grades] or list(whole)


def guarantees(summary: AuditSummary) -> list[Figure]:
    """What it guarantees: the bounds beside the reward's range, and how they grow with the horizon."""
    out = []
    for evidence in main_evidence(summary):
        blocks = {name: block[evidence] for name, block in summary.bounds.items() if evidence in block}
        out += _bounds(summary, evidence, blocks)
        if evidence in summary.bounds_by_horizon:
            out += _horizons(summary, evidence, summary.bounds_by_horizon[evidence])
    return out


def _reward_range(summary: AuditSummary) -> Mark:
    """Without rewards the bounds are those of a range of 1."""
    width = 1.0 if summary.rewards is None else summary.rewards.reward_range
    return Mark(width, "reward range")


def _short(bound: str) -> str:
    """Without what all of them end in."""
    return bound.partition("_bound")[0]


def _bounds(summary: AuditSummary, evidence: str, blocks: dict[str, BoundsBlock]) -> list[Figure]:
    first = next(iter(blocks.values()))
    names = list(first.bounds)
    ends = {subset: [(b.bounds[n].published, b.bounds[n].sharp) for n in names] for subset, b in blocks.items()}
    best = first.bounds[first.minimum]
    finding = (
        f"The smallest is {first.minimum}: {number(best.published)} as published, {number(best.sharp)} sharp, at a "
        f"horizon of {number(first.horizon)}. Hollow: published; full: sharp."
    )
    labels, mark = [_short(name) for name in names], _reward_range(summary)
    x = Axis("bound, in units of the reward", "log")
    heads = [f"{subset}, {constant}" for subset in blocks for constant in ("published", "sharp")]
    return figure(
        f"bounds-{evidence}",
        f"Bounds on the surrogate's error ({evidence})",
        finding,
        lambda name, alt: pairs(name, alt, x, labels, ends, mark),
        ["", *heads],
        [[n, *(number(v) for b in blocks.values() for v in (b.bounds[n].published, b.bounds[n].sharp))] for n in names],
    )


def _horizons(summary: AuditSummary, evidence: str, found: BoundCurves) -> list[Figure]:
    last = {name: values[-1] for name, values in found.published.items()}
    low, high = (choose(last, key=last.__getitem__) for choose in (min, max))
    series = [
        Series(_short(name), found.horizons, values, style=at)
        for at, (name, values) in enumerate(found.published.items())
    ]
    mark = _reward_range(summary)
    return figure(
        f"horizons-{evidence}",
        f"Bounds against the horizon, as published ({evidence})",
        f"At T = {number(found.horizons[-1])} they span {number(last[low])} ({low}) to {number(last[high])} ({high}).",
        lambda name, alt: chart(
            name,
            alt,
            Axis("horizon T", "log"),
            [Panel(Axis("bound", "log"), series)],
            [Mark(mark.value, mark.label, "y")],
        ),
        ["", *(f"T = {number(t)}" for t in found.horizons)],
        [
            [f"{name}, {constant}", *map(number, values)]
            for constant, curves in (("published", found.published), ("sharp", found.sharp))
            for name, values in curves.items()
        ],
    )
