"""The figures of two audits side by side: what both have, A and B in one figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trm_audit.report.page.axes import Axis
from trm_audit.report.page.figures import DIVERGENCES, Figure, drawn_together, figure, steps
from trm_audit.report.page.plots import Panel, Series, chart
from trm_audit.report.shown import number, percent

if TYPE_CHECKING:
    from trm_audit.report.compare import Comparison
    from trm_audit.report.summary import AuditSummary

_KINDS = (
    ("", "token", "per token", "tokens"),
    ("seq_max_", "max", "largest in a sequence", "sequences"),
    ("seq_mean_", "mean", "mean of a sequence", "sequences"),
)


def overlays(comparison: Comparison) -> list[Figure]:
    """Distributions and acceptance of the leading divergence that both have, and its mean by staleness."""
    both = {"A": comparison.a, "B": comparison.b}
    out = [shown for kind in _KINDS for shown in _distribution(both, *kind)]
    out += [shown for prefix, name, title, _ in _KINDS[1:] for shown in _acceptance(both, prefix, name, title)]
    return out + _staleness(both)


def _common(names: Iterable[Iterable[str]], prefix: str = "") -> str | None:
    """The leading divergence that is in all of them."""
    found = [set(each) for each in names]
    return next((d for d in DIVERGENCES if all(prefix + d in each for each in found)), None)


def _distribution(both: dict[str, AuditSummary], prefix: str, name: str, title: str, unit: str) -> list[Figure]:
    which = _common((audit.distributions for audit in both.values()), prefix)
    if which is None:
        return []
    found = {key: audit.distributions[prefix + which] for key, audit in both.items()}
    together = drawn_together(found.values())
    series = [steps(key, each, together, at) for at, (key, each) in enumerate(found.items()) if each.counts]
    spreads = {key: (audit.sequences if prefix else audit.tokens).get(prefix + which) for key, audit in both.items()}
    said = [
        f"{key}: median {number(s.p50)}, p99 {number(s.p99)}, largest {number(s.max)}."
        for key, s in spreads.items()
        if s
    ]
    y = Axis(f"{unit} in a bin") if prefix else Axis(f"{unit} in a bin", "log")
    return figure(
        f"both-{name}",
        f"{which}, {title}",
        " ".join(said),
        lambda own, alt: chart(own, alt, Axis("nats", "log"), [Panel(y, series)]),
        ["", "from", "to below", unit],
        [
            [key, number(low), number(high), number(n)]
            for key, each in found.items()
            for low, high, n in zip(each.edges[:-1], each.edges[1:], each.counts, strict=True)
        ],
    )


def _acceptance(both: dict[str, AuditSummary], prefix: str, name: str, title: str) -> list[Figure]:
    which = _common((audit.acceptance_curves.curves for audit in both.values()), prefix)
    if which is None:
        return []
    column = prefix + which
    deltas = sorted({delta for audit in both.values() for delta in audit.acceptance_curves.deltas})
    kept = {
        key: dict(zip(audit.acceptance_curves.deltas, audit.acceptance_curves.curves[column].share, strict=True))
        for key, audit in both.items()
    }
    moving = [d for d in deltas if any(0 < share.get(d, 0) < 1 for share in kept.values())]
    series = [Series(key, list(share), list(share.values()), style=at) for at, (key, share) in enumerate(kept.items())]
    limits = (moving[0] / 2, moving[-1] * 2) if moving else None
    x, y = Axis("delta", "log", limits=limits), Axis("sequences kept", percent=True, limits=(0, 1.02))
    at = moving[len(moving) // 2] if moving else deltas[0]
    said = ", ".join(f"{percent(share.get(at))} of {key}" for key, share in kept.items())
    return figure(
        f"both-kept-{name}",
        f"Kept by a threshold on {column}",
        f"At delta {number(at)}: {said}.",
        lambda own, alt: chart(own, alt, x, [Panel(y, series)]),
        ["delta", *kept],
        [[number(delta), *(percent(share.get(delta)) for share in kept.values())] for delta in moving],
    )


def _staleness(both: dict[str, AuditSummary]) -> list[Figure]:
    found = {
        key: {c.value: c.divergences for c in audit.by_staleness if isinstance(c.value, int)}
        for key, audit in both.items()
    }
    which = _common(divergences for each in found.values() for divergences in each.values())
    if which is None or any(len(each) < 2 for each in found.values()):
        return []
    means = {key: {value: spreads[which].mean for value, spreads in each.items()} for key, each in found.items()}
    series = [Series(key, list(each), list(each.values()), style=at) for at, (key, each) in enumerate(means.items())]
    values = sorted({value for each in means.values() for value in each})
    ends = "; ".join(
        f"{key}: {number(each[min(each)])} at {min(each)}, {number(each[max(each)])} at {max(each)}"
        for key, each in means.items()
    )
    return figure(
        "both-staleness",
        f"Mean {which} by staleness",
        f"{ends}.",
        lambda own, alt: chart(own, alt, Axis("staleness", whole=True), [Panel(Axis(f"mean {which}", "log"), series)]),
        ["staleness", *means],
        [[str(value), *(number(each.get(value)) for each in means.values())] for value in values],
    )
