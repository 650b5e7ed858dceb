"""The kinds of figures on the page: charts of lines, steps and bars; grids of shades; pairs of values.

What stands in them is chosen in `figures`; how they become part of a page, in `svg`. No text of the data is drawn:
names of ours and numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.report.page.axes import LEFT, Axis, Mark, draw_legend, draw_mark, legend_columns, name_above, set_axis
from trm_audit.report.page.svg import COLOUR, NUM_SHADES, WIDTH, Alt, add_axes, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = (
    ("c0", "solid", "o"),
    ("c1", (0, (5, 1.5)), "s"),
    ("c2", (0, (1.2, 1.2)), "^"),
    ("c3", (0, (6, 1.5, 1.2, 1.5)), "D"),
    ("c4", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("c5", (0, (8, 2)), "P"),
    ("c6", (0, (2, 1)), "X"),
    ("c0", (0, (3, 0.8)), "p"),
    ("c4", (0, (5, 3)), "<"),
    ("c4", (0, (1, 2.5)), ">"),
)
"""Colour role, dash and marker: no two lines differ by colour alone."""

_RIGHT, _BOTTOM, _TOP, _ROW, _GAP = 12, 38, 6, 15, 16


@dataclass(frozen=True)
class Series:
    """Values to draw; what is not finite, or not above 0 on a logarithmic axis, is left out.

    Attributes:
        kind: `line` and `points` at x; `steps`, `bars` and `rungs` from x[i] to x[i] + width[i].
        style: index into `STYLES`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    kind: Literal["line", "points", "steps", "bars", "rungs"] = "line"
    style: int = 0
    width: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes; the panels of a chart stand below each other and share x."""

    y: Axis
    series: Sequence[Series]
    height: int = 180


@dataclass(frozen=True)
class Cells:
    """Shades, 0 (none) to `NUM_SHADES`: levels[i][j] in bin i of x and bin j of y; `first` and `last` name the ends.

    `points` are ringed, in units of bins.
    """

    levels: Sequence[Sequence[int]]
    first: str
    last: str
    diagonal: bool = False
    points: Sequence[tuple[float, float]] = ()


def chart(name: str, alt: Alt, x: Axis, panels: Sequence[Panel], marks: Sequence[Mark] = ()) -> str | None:
    """Lines, steps, bars over one x axis; None where no panel has anything to draw."""
    shown = [panel for panel in panels if any(_drawable(s, x, panel.y).any() for s in panel.series)]
    if not shown:
        return None
    columns = [legend_columns([s.name for s in panel.series]) for panel in shown]
    rows = [math.ceil(len(p.series) / n) if len(p.series) > 1 else 0 for p, n in zip(shown, columns, strict=True)]
    rows = [1 + legend for legend in rows]  # the name of the y axis lies above it
    height = _TOP + _BOTTOM + _ROW * sum(rows) + sum(p.height for p in shown) + _GAP * (len(shown) - 1)

    def paint(figure: Figure) -> None:
        top = float(height - _TOP)
        for panel, above, across in zip(shown, rows, columns, strict=True):
            top -= above * _ROW + panel.height
            ax = add_axes(figure, LEFT, top, WIDTH - LEFT - _RIGHT, panel.height)
            _paint_panel(ax, x, panel, marks)
            name_above(ax, panel.y.label, panel.height)
            if above > 1:
                draw_legend(ax, across, 1 + _ROW / panel.height)
            if panel is not shown[-1]:
                ax.set_xlabel("")
                ax.tick_params(axis="x", labelbottom=False)
            top -= _GAP

    return draw(name, alt, height, paint)


def grid(name: str, alt: Alt, x: Axis, y: Axis, cells: Cells) -> str | None:
    """Shaded cells over two binned axes with a key; None where all are empty."""
    if not any(map(any, cells.levels)):
        return None
    side = WIDTH - LEFT - 64

    def paint(figure: Figure) -> None:
        ax = add_axes(figure, LEFT, _BOTTOM, side, side)
        _rectangles(ax, cells.levels)
        set_axis(ax.xaxis, x)
        set_axis(ax.yaxis, y)
        name_above(ax, y.label, side)
        wide, high = len(cells.levels), len(cells.levels[0])
        ax.set_xlim(0, wide)
        ax.set_ylim(0, high)
        if cells.diagonal:
            ax.plot([0, wide], [0, high], color=COLOUR["ink"], lw=0.9, ls=(0, (4, 3)))
        for at in cells.points:
            ax.plot(*([each] for each in at), "o", mfc="none", mec=COLOUR["bg"], ms=8, mew=3)
            ax.plot(*([each] for each in at), "o", mfc="none", mec=COLOUR["ink"], ms=8, mew=1.4)
        _key(add_axes(figure, WIDTH - 56, _BOTTOM, 12, side), cells)

    return draw(name, alt, side + _BOTTOM + _ROW + _TOP, paint)


def pairs(
    name: str, alt: Alt, x: Axis, labels: Sequence[str], ends: Mapping[str, Sequence[tuple[float, float]]], mark: Mark
) -> str | None:
    """Two values for each label with a bar between them, hollow the first, full the second; x is logarithmic.

    Args:
        name, alt: of the figure.
        x: the axis of the values.
        labels: names of ours, from top to bottom.
        ends: series -> one pair for each label.
        mark: on x.
    """
    values = np.array(list(ends.values()), dtype=np.float64)
    good: Bools = np.asarray((np.isfinite(values) & (values > 0)).all(axis=2))
    if not good.any():
        return None
    left, row = 12 + 5.6 * max(map(len, labels)), 23
    height = _TOP + _ROW * (len(ends) > 1) + row * len(labels) + _BOTTOM

    def paint(figure: Figure) -> None:
        ax = add_axes(figure, left, _BOTTOM, WIDTH - left - _RIGHT, row * len(labels))
        for at, series in enumerate(ends):
            rows = np.flatnonzero(good[at])
            down = rows + 0.34 * (at - (len(ends) - 1) / 2)
            _paint_pairs(ax, series, at, down, values[at, rows])
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_yticks(range(len(labels)), labels)
        set_axis(ax.xaxis, x)
        ax.grid(axis="x")
        draw_mark(ax, mark)
        if len(ends) > 1:
            draw_legend(ax, len(ends), 1.0)

    return draw(name, alt, height, paint)


def _paint_pairs(ax: Axes, name: str, style: int, down: Any, values: Floats) -> None:
    colour, _, marker = STYLES[style]
    first, second = values.T
    look: dict[str, Any] = {"color": COLOUR[colour], "marker": marker, "ms": 5, "ls": "none"}
    ax.hlines(down, first, second, colors=COLOUR[colour], lw=1.5)
    ax.plot(first, down, mfc=COLOUR["bg"], **look)
    ax.plot(second, down, label=name, **look)


def _drawable(series: Series, x: Axis, y: Axis) -> Bools:
    """[n] the values that the axes can show."""
    along, up = _floats(series.x), _floats(series.y)
    known: Bools = np.isfinite(along) & np.isfinite(up)
    if x.scale == "log":
        known &= along > 0
    return known & (up > 0) if y.scale == "log" else known


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _paint_panel(ax: Axes, x: Axis, panel: Panel, marks: Sequence[Mark]) -> None:
    for series in panel.series:
        known = _drawable(series, x, panel.y)
        if known.any():
            _paint_series(ax, series, known)
    set_axis(ax.xaxis, x)
    set_axis(ax.yaxis, panel.y)
    ax.grid(axis="y")
    for mark in marks:
        draw_mark(ax, mark, all(mark.value <= other.value for other in marks))


def _paint_series(ax: Axes, series: Series, known: Bools) -> None:
    role, dash, marker = STYLES[series.style]
    colour: dict[str, Any] = {"color": COLOUR[role], "label": series.name}
    along, up = _floats(series.x), np.where(known, _floats(series.y), np.nan)
    if series.kind in ("line", "points"):
        few = series.kind == "points" or len(known) <= 16
        dash = "none" if series.kind == "points" else dash
        ax.plot(along, up, ls=dash, lw=1.7, marker=marker if few else "", ms=4.5, **colour)
        return
    width = _floats(series.width)
    if series.kind == "steps":
        edges, counts = np.append(along, along[-1] + width[-1]), np.nan_to_num(up)
        if not ax.patches:  # the first alone: two washes make a third colour
            ax.stairs(counts, edges, fill=True, color=COLOUR[role], alpha=0.12, lw=0)
        ax.stairs(counts, edges, ls=dash, lw=1.5, **colour)
    elif series.kind == "bars":
        ax.bar(along[known] + 0.08 * width[known], up[known], 0.84 * width[known], align="edge", **colour)
    else:
        ax.hlines(up[known], along[known], along[known] + width[known], lw=2.4, **colour)


def _rectangles(ax: Axes, levels: Sequence[Sequence[int]]) -> None:
    """One path for each shade; neighbours in a column share a rectangle."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shades: dict[int, list[Path]] = {}
    for i, column in enumerate(levels):
        j = 0
        while j < len(column):
            end = j
            while end < len(column) and column[end] == column[j]:
                end += 1
            shades.setdefault(column[j], []).append(
                Path([(i, j), (i + 1, j), (i + 1, end), (i, end), (i, j)], closed=True)
            )
            j = end
    for level in sorted(set(shades) - {0}):
        ax.add_patch(PathPatch(Path.make_compound_path(*shades[level]), fc=COLOUR[f"h{level}"], lw=0))


def _key(ax: Axes, cells: Cells) -> None:
    _rectangles(ax, [list(range(1, NUM_SHADES + 1))])
    ax.set_xlim(0, 1)
    ax.set_ylim(0, NUM_SHADES)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.set_yticks([0, NUM_SHADES], [cells.first, cells.last])
    ax.spines[:].set_visible(False)
