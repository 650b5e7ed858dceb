"""Which figures the page has of a summary: what is drawn, what it says in words, and the numbers behind it.

A figure that has nothing to show is left out. Sentences and tables hold numbers of the summary only. Here are those of
the question how far apart the policies are; `curves` and `reasons` have the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from trm_audit.report.blocks import Distribution
from trm_audit.report.page.axes import Axis, Mark
from trm_audit.report.page.plots import Cells, Panel, Series, chart, grid
from trm_audit.report.page.svg import NUM_SHADES, Alt
from trm_audit.report.shown import number
from trm_audit.report.summary import AuditSummary, Quantiles

DIVERGENCES = (
    *("kl", "kl_estimate", "kl_lower", "kl_upper", "k3", "k2", "abs_log_ratio"),
    *("tv", "tv_lower", "tv_upper"),
)
"""In the order in which a reader wants them; the first that the data have leads."""
STYLE = {
    "kl": 0,
    "k3": 1,
    "abs_log_ratio": 2,
    "k2": 3,
    "tv": 4,
    "kl_lower": 5,
    "kl_upper": 6,
    "kl_estimate": 7,
    "tv_lower": 8,
    "tv_upper": 9,
}
"""Divergence -> its style in every figure."""
_DISTRIBUTED = ("kl", "kl_estimate", "kl_lower", "kl_upper", "k3", "abs_log_ratio")
_DRAWN_BINS = 30
_PROBABILITIES = (0.0, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Ticks of the density."""


@dataclass(frozen=True)
class Figure:
    """One figure: `finding` says in numbers what it shows, `columns` and `rows` are its table."""

    name: str
    title: str
    finding: str
    svg: str
    columns: list[str]
    rows: list[list[str]]


def figure(
    name: str,
    title: str,
    finding: str,
    draw: Callable[[str, Alt], str | None],
    columns: list[str],
    rows: Iterable[list[str]],
) -> list[Figure]:
    """The figure, or nothing where there is nothing to draw."""
    svg = draw(name, Alt(title, finding))
    return [] if svg is None else [Figure(name, title, finding, svg, columns, list(rows))]


def distance(summary: AuditSummary) -> list[Figure]:
    """How far apart: distributions per token and per sequence."""
    limits = summary.thresholds
    return [
        *_distribution(summary, "", "Divergence per token", "tokens", None),
        *_distribution(summary, "seq_max_", "Largest divergence in a sequence", "sequences", limits.delta_max),
        *_distribution(summary, "seq_mean_", "Mean divergence of a sequence", "sequences", limits.delta_avg),
    ]


def _distribution(summary: AuditSummary, prefix: str, title: str, unit: str, delta: float | None) -> list[Figure]:
    """The leading divergences; of tokens with a logarithmic axis of counts, because their tail is the finding."""
    spreads = summary.sequences if prefix else summary.tokens
    names = [d for d in _DISTRIBUTED[: 5 if prefix else 6] if prefix + d in summary.distributions][:3]
    found = {d: summary.distributions[prefix + d] for d in names}
    together = drawn_together(found.values())
    series = [steps(d, x, together, STYLE[d]) for d, x in found.items() if x.counts]
    marks = [Mark(delta, f"threshold {number(delta)}")] if delta else []
    y = Axis(f"{unit} in a bin") if prefix else Axis(f"{unit} in a bin", "log")
    return figure(
        f"distribution-{prefix.strip('_') or 'token'}",
        title,
        " ".join(_spread(d, spreads.get(prefix + d), found[d], unit) for d in names[:2]),
        lambda name, alt: chart(name, alt, Axis("nats", "log"), [Panel(y, series)], marks),
        ["", "from", "to below", unit],
        [row for d, x in found.items() for row in _distribution_rows(d, x)],
    )


def drawn_together(found: Iterable[Distribution]) -> int:
    """How many bins are drawn as one, so that few values do not look like a comb."""
    return max((math.ceil(len(each.counts) / _DRAWN_BINS) for each in found), default=1)


def steps(name: str, found: Distribution, together: int, style: int) -> Series:
    """Counts of one distribution, `together` bins drawn as one; all distributions share their edges."""
    at = [round(2 * math.log2(edge)) // together for edge in found.edges[:-1]]
    first = at[0]
    counts = [0] * (at[-1] - first + 1)
    for place, count in zip(at, found.counts, strict=True):
        counts[place - first] += count
    edges = [2.0 ** ((first + i) * together / 2) for i in range(len(counts) + 1)]
    return Series(name, edges[:-1], counts, "steps", style, [b - a for a, b in pairwise(edges)])


def _spread(name: str, spread: Quantiles | None, found: Distribution, unit: str) -> str:
    said = f"{name}:"
    if spread is not None:
        said += f" median {number(spread.p50)}, p99 {number(spread.p99)}, largest {number(spread.max)}"
        said += f" ({number(spread.n)} {unit if spread.n != 1 else unit.removesuffix('s')})"
    hidden = [f"{number(n)} {what}" for n, what in ((found.num_zero, "exact zeros"), (found.num_inf, "infinite")) if n]
    return f"{said}; not drawn: {', '.join(hidden)}." if hidden else f"{said}."


def _distribution_rows(name: str, found: Distribution) -> list[list[str]]:
    rows = [[name, "0", "", number(found.num_zero)]] if found.num_zero else []
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts, strict=True):
        rows.append([name, number(low), number(high), number(count)])
    return rows + ([[name, "inf", "", number(found.num_inf)]] if found.num_inf else [])


def probabilities(summary: AuditSummary) -> list[Figure]:
    """Sampled tokens by their probability under both policies."""
    found = summary.probabilities
    largest = max(map(max, found.counts), default=0) if found else 0
    if found is None or not largest:
        return []
    edges, counts = [number(edge) for edge in found.edges], found.counts
    cells = [(i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n]
    i, j = max(cells, key=lambda at: (abs(at[0] - at[1]), counts[at[0]][at[1]]))
    finding = (
        f"Sampled tokens; on the diagonal both policies agree. Farthest from it: {number(counts[i][j])} with rollout "
        f"probability {edges[i]} to {edges[i + 1]} and trainer probability {edges[j]} to {edges[j + 1]}."
    )
    levels = [[_count_shade(n, largest) for n in row] for row in counts]
    picture = Cells(levels, "1", number(largest), diagonal=True)
    ticks = [edge if edge in _PROBABILITIES else math.nan for edge in found.edges]
    x, y = Axis("rollout probability", edges=ticks), Axis("trainer probability", edges=ticks)
    return figure(
        "probabilities",
        "Rollout against trainer probability",
        finding,
        lambda name, alt: grid(name, alt, x, y, picture),
        ["rollout ↓ trainer →", *(f"to {edge}" for edge in edges[1:])],
        [[f"to {edges[k + 1]}", *(number(n) if n else "" for n in row)] for k, row in enumerate(counts)],
    )


def _count_shade(count: int, largest: int) -> int:
    """Shades of equal ratio from 1 to the largest count."""
    if count <= 0:
        return 0
    return min(NUM_SHADES, 1 + int(NUM_SHADES * math.log(count) / math.log(max(2, largest))))
