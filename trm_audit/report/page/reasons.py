"""The figures of the question why: one divergence by what may cause it."""

from __future__ import annotations

from collections.abc import Sequence

from trm_audit.report.blocks import ImpulseShare, TokenBin
from trm_audit.report.page.axes import Axis
from trm_audit.report.page.figures import Figure, figure
from trm_audit.report.page.plots import Panel, Series, chart
from trm_audit.report.shown import number, percent
from trm_audit.report.summary import AuditSummary, Category

_LEADING = ("kl", "kl_estimate", "k3", "kl_upper", "k2", "abs_log_ratio", "kl_lower", "tv")
_MOST = 200
"""Categories in a figure: the freshest where there are more; the JSON has all."""
_BINS = (
    ("by_position", "position", "By position in the response", "position", "tokens"),
    ("by_rollout_probability", "probability", "By rollout probability", "rollout probability", "tokens"),
    ("by_entropy", "entropy", "By entropy", "entropy (nats)", "tokens"),
    ("by_length", "lengths", "By length of the sequence", "policy tokens", "sequences"),
)


def reasons(summary: AuditSummary) -> list[Figure]:
    """Divergence by staleness, version, position, probability, entropy and length, and its isolated peaks."""
    out = _versions("staleness", "By staleness", "staleness", summary.by_staleness[:_MOST])
    if not (out and _mirrored(summary)):
        out += _versions("version", "By policy version", "policy version", summary.by_policy_version[-_MOST:])
    for field, name, title, label, unit in _BINS:
        out += _bins(name, title, label, unit, getattr(summary, field))
    return out + (_impulses(summary.impulses.divergence, summary.impulses.by_staleness) if summary.impulses else [])


def _mirrored(summary: AuditSummary) -> bool:
    """Whether each policy version has one staleness, so that a second figure would show the first from behind."""
    fresh = [(each.n, each.num_tokens) for each in summary.by_staleness]
    return fresh == [(each.n, each.num_tokens) for each in reversed(summary.by_policy_version)]


def leading(present: Sequence[str] | set[str]) -> str | None:
    """The divergence that says most of those that the data have."""
    return next((name for name in _LEADING if name in present), None)


def _versions(name: str, title: str, label: str, found: list[Category]) -> list[Figure]:
    """Of categories that are numbers, two or more."""
    points = [category for category in found if isinstance(category.value, int)]
    which = leading({d for category in points for d in category.divergences})
    points = [category for category in points if which in category.divergences]
    if which is None or len(points) < 2:
        return []
    x = [float(category.value) for category in points]
    of = [category.divergences[which] for category in points]
    first, last = points[0], points[-1]
    finding = f"Mean {which} {number(of[0].mean)} at {first.value}, {number(of[-1].mean)} at {last.value}."
    if first.acceptance is not None:
        finding += f" Kept: {percent(first.acceptance)} and {percent(last.acceptance)}."
    series = [
        Series("mean", x, [each.mean for each in of]),
        Series("largest", x, [each.max for each in of], "points", 1),
    ]
    panels = [Panel(Axis(f"{which} per token", "log"), series, 130)]
    if first.acceptance is not None:
        kept = Series("kept", x, [category.acceptance for category in points], style=2)
        panels.append(Panel(Axis("kept", percent=True, limits=(0, 1.05)), [kept], 60))
    return figure(
        name,
        title,
        finding,
        lambda own, alt: chart(own, alt, Axis(label, whole=True), panels),
        [label, "sequences", "tokens", "kept", f"mean {which}", f"largest {which}"],
        [
            [str(c.value), number(c.n), number(c.num_tokens), percent(c.acceptance), number(d.mean), number(d.max)]
            for c, d in zip(points, of, strict=True)
        ],
    )


def _bins(name: str, title: str, label: str, unit: str, found: list[TokenBin]) -> list[Figure]:
    which = leading({d for each in found for d in each.divergences})
    bins = [each for each in found if which in each.divergences]
    if which is None or len(bins) < 2:
        return []
    bounds = sorted({_low(b) for b in bins} | {_high(b) for b in bins})
    place = {edge: at for at, edge in enumerate(bounds)}
    x = [float(place[_low(b)]) for b in bins]
    width = [place[_high(b)] - at for b, at in zip(bins, x, strict=True)]
    of = [b.divergences[which] for b in bins]
    centres = [at + w / 2 for at, w in zip(x, width, strict=True)]
    most = max(range(len(bins)), key=lambda i: (of[i].share if of[i].share == of[i].share else -1.0, bins[i].n))
    unit_of_most = unit.removesuffix("s") if bins[most].n == 1 else unit
    finding = (
        f"{percent(of[most].share)} of the summed {which}, the largest part, lies in {label} {_words(bins[most])} "
        f"({number(bins[most].n)} {unit_of_most}, mean {number(of[most].mean)})."
    )
    panels = [
        Panel(
            Axis(f"{which} per token", "log"),
            [
                Series("mean", x, [each.mean for each in of], "rungs", 0, width),
                Series("largest", centres, [each.max for each in of], "points", 1),
            ],
            130,
        ),
        Panel(Axis("share of sum", percent=True), [Series("share", x, [d.share for d in of], "bars", 0, width)], 60),
    ]
    return figure(
        name,
        title,
        finding,
        lambda own, alt: chart(own, alt, Axis(label, edges=bounds), panels),
        ["from", "to below", unit, f"mean {which}", f"largest {which}", "share of sum"],
        [
            [_edge(_low(b)), _edge(_high(b)), number(b.n), number(d.mean), number(d.max), percent(d.share)]
            for b, d in zip(bins, of, strict=True)
        ],
    )


def _low(found: TokenBin) -> float:
    return -float("inf") if found.low is None else found.low


def _high(found: TokenBin) -> float:
    return float("inf") if found.high is None else found.high


def _edge(value: float) -> str:
    """Whole numbers as counts, the unbounded without a word."""
    if value in (float("inf"), -float("inf")):
        return ""
    return number(int(value)) if float(value).is_integer() else number(value)


def _words(found: TokenBin) -> str:
    if found.high is None:
        return f"from {_edge(_low(found))}"
    return (
        f"below {_edge(_high(found))}" if found.low is None else f"{_edge(_low(found))} to below {_edge(_high(found))}"
    )


def _impulses(which: str, found: list[ImpulseShare]) -> list[Figure]:
    if len(found) < 2:
        return []
    x = [float(each.value) for each in found if each.value is not None]
    first, last = found[0], found[-1]
    finding = " ".join(
        f"Staleness {each.value}: {number(each.num_impulses)} impulses in {number(each.num_tokens)} tokens carry "
        f"{percent(each.share_of_sum)} of the {which}; median {number(each.median)}."
        for each in (first, last)
    )
    medians = Series("median of all tokens", x, [each.median for each in found])
    elsewhere = Series("mean elsewhere", x, [each.mean_elsewhere for each in found], style=1)
    carried = Series("share", x, [each.share_of_sum for each in found], style=2)
    panels = [
        Panel(Axis("by impulses", percent=True, limits=(0, 1.05)), [carried], 60),
        Panel(Axis(which, "log"), [medians, elsewhere], 130),
    ]
    return figure(
        "impulses",
        "Impulses against drift, by staleness",
        finding,
        lambda own, alt: chart(own, alt, Axis("staleness", whole=True), panels),
        ["staleness", "tokens", "impulses", "share of sum", "median", "mean elsewhere"],
        [
            [
                str(each.value),
                number(each.num_tokens),
                number(each.num_impulses),
                percent(each.share_of_sum),
                number(each.median),
                number(each.mean_elsewhere),
            ]
            for each in found
        ],
    )
