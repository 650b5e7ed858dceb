"""Axes of the page's figures: scales, about six ticks, names that lie level above the axis, marks, legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trm_audit.report.page.svg import COLOUR, HALO, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT = 44
"""Room for the numbers of the y axis, in units of the viewBox."""
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """One axis: `edges` are what the boundaries 0, 1, 2, ... of bins stand for, NaN where that is not written.

    Without them values are numbers.
    """

    label: str
    scale: Literal["linear", "log"] = "linear"
    edges: Sequence[float] = ()
    percent: bool = False
    whole: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Mark:
    """A straight line across the panels with a word at it."""

    value: float
    label: str
    axis: Literal["x", "y"] = "x"


def set_axis(axis: Any, given: Axis) -> None:
    """Label, scale, limits and about six ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    upright = axis.axis_name == "y"
    if not upright:
        axis.set_label_text(given.label)
    if given.edges:
        known = [i for i, edge in enumerate(given.edges) if math.isfinite(edge)]
        at = known[:: max(1, math.ceil(len(known) / (12 if upright else 9)))]
        axis.set_ticks(at, [_tick(given.edges[i], given.percent) for i in at])
    if given.scale == "log":
        (axis.axes.set_yscale if upright else axis.axes.set_xscale)("log")
    limits = (0, len(given.edges) - 1) if given.edges else given.limits
    if limits and math.isfinite(limits[1] - limits[0]) and limits[0] < limits[1]:
        (axis.axes.set_ylim if upright else axis.axes.set_xlim)(*limits)
    if given.edges:
        return
    low, high = axis.get_view_interval()
    if given.scale == "log" and 0 < low < high < 10 * low and not (limits or upright):
        aside = math.sqrt(10 * low / high)  # a decade at least, or the ticks would crowd
        low, high = low / aside, high * aside
        axis.axes.set_xlim(low, high)
    if given.scale == "log":
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 80 * low else (1.0,), numticks=7))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5, integer=given.whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, given.percent)))


def _tick(value: float, percent: bool) -> str:
    """Few characters."""
    if 0 < abs(value) < 0.001 and not percent:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if percent:
        return f"{100 * value:g} %"
    for size, unit in _UNITS:
        if size <= abs(value) < 1000 * size:
            return f"{value / size:g}{unit}"
    mantissa, _, exponent = f"{value:g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def name_above(ax: Axes, name: str, height: float) -> None:
    """The name of the y axis, level, above its left end."""
    ax.text(4 / WIDTH, 1 + 4 / height, name, transform=_beside(ax), va="bottom")


def _beside(ax: Axes) -> Any:
    """x in figures, y in axes."""
    from matplotlib.transforms import blended_transform_factory

    return blended_transform_factory(ax.figure.transFigure, ax.transAxes)


def draw_mark(ax: Axes, mark: Mark, before: bool = True) -> None:
    """Nothing where it lies outside the axes; the word stands before the line or after it."""
    low, high = ax.get_xlim() if mark.axis == "x" else ax.get_ylim()
    if not low < mark.value < high:
        return
    look: dict[str, Any] = {"color": COLOUR["muted"], "lw": 1.0, "ls": (0, (2, 2))}
    word: dict[str, Any] = {"gid": HALO, "fontsize": 9}
    if mark.axis == "x":
        ax.axvline(mark.value, **look)
        place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "rotation": 90, "va": "top"}
        place["ha"] = "right" if before else "left"
        ax.text(mark.value, 0.99, mark.label, **word, **place)
    else:
        ax.axhline(mark.value, **look)
        ax.text(0.01, mark.value, mark.label, transform=ax.get_yaxis_transform(), va="bottom", **word)


def legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), int((WIDTH - LEFT) / (36 + 5.4 * max(map(len, names))))))


def draw_legend(ax: Axes, columns: int, bottom: float) -> None:
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, bottom), "borderpad": 0.2, "borderaxespad": 0.1}
    look: dict[str, Any] = {
        "frameon": False,
        "handlelength": 2.4,
        "labelspacing": 0.3,
        "columnspacing": 1.2,
        "fontsize": 9.5,
    }
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=columns, **look, **place)
