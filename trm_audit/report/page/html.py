"""The summary as one page for a browser: no script, no request, every text of the data inert.

The templates stand in `templates/`, one for each question; a content security policy forbids what they do not need.
Whatever a template prints passes `_print`: numbers become four digits, text is made visible and then escaped, so that
no place can forget it. Nothing is computed here but how things look.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from trm_audit.report.blocks import DeltaTable, ShownToken
from trm_audit.report.deltas import given_thresholds
from trm_audit.report.page import curves, figures, overlays, reasons
from trm_audit.report.shown import MISSING, SHADES, number, percent, shade, visible, visible_token

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from trm_audit.report.compare import Comparison
    from trm_audit.report.summary import AuditSummary, Quantiles

TITLE = "trm-audit report"
_NAME = 120
_UNBROKEN = 16
"""Characters of an outlined token that stay on one line, so that its frame is whole."""


def render_html(summary: AuditSummary, title: str = TITLE) -> str:
    """The page of one audit: the same bytes for the same summary.

    Args:
        summary: of `pipeline.report`.
        title: of the page, plain text.
    """
    drawn = {
        "distance": figures.distance(summary),
        "probabilities": figures.probabilities(summary),
        "deltas": curves.deltas(summary),
        "guarantees": curves.guarantees(summary),
        "reasons": reasons.reasons(summary),
    }
    page = _environment().get_template("page.html")
    return page.render(
        title=title,
        summary=summary,
        figures=drawn,
        delta_tables=_delta_tables(summary),
        yours=given_thresholds(summary.thresholds),
        spreads=_main_spreads(summary),
        main_evidence=curves.main_evidence(summary),
        shades=SHADES,
    )


def render_comparison_html(comparison: Comparison, title: str = "trm-audit comparison") -> str:
    """The page of two audits side by side, likewise.

    Args:
        comparison: of `compare`.
        title: of the page, plain text.
    """
    drawn, rest = comparison.shown()
    page = _environment().get_template("comparison.html")
    return page.render(
        title=title, comparison=comparison, drawn=drawn, rest=rest, figures=overlays.overlays(comparison)
    )


def _main_spreads(summary: AuditSummary) -> dict[str, Quantiles]:
    """Quantiles of what a reader looks for first; the others are folded."""
    tokens = {d: summary.tokens[d] for d in (*figures.DIVERGENCES, "ratio") if d in summary.tokens}
    names = (f"seq_{kind}_{d}" for kind in ("max", "mean") for d in curves.CURVES[kind])
    return tokens | {name: summary.sequences[name] for name in names if name in summary.sequences}


def _delta_tables(summary: AuditSummary) -> list[tuple[str, DeltaTable, bool]]:
    """Statistic, its table, and whether it stands open: the criteria's, and the leading divergence of each kind."""
    leading = {}
    for kind in ("max", "mean", "sum"):
        names = [f"seq_{kind}_{d}" for d in figures.DIVERGENCES]
        leading[kind] = next((name for name in names if name in summary.delta_tables), None)
    open_ones = {leading["max"], leading["mean"], *given_thresholds(summary.thresholds)}
    found = [(name, table, name in open_ones) for name, table in summary.delta_tables.items() if table.rows]
    return sorted(found, key=lambda entry: not entry[2])


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    out = Environment(
        loader=PackageLoader("trm_audit.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_print,
    )
    out.filters.update(percent=percent, name=_name, token=_piece, excerpt=_excerpt, svg=_svg)
    return out


def _print(value: Any) -> Any:
    """What a template's expression prints: Markup as it is, numbers in four digits, text made visible."""
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    return visible(str(value))


def _name(value: str | int) -> str:
    """Somebody else's name for something, as much of it as a cell has room for."""
    return str(value) if len(str(value)) <= _NAME else f"{str(value)[:_NAME]}…"


def _piece(text: str) -> Markup:
    """One token on one line."""
    from markupsafe import Markup

    return Markup(escape(visible_token(text, 40).replace("\n", "")))


def _svg(drawing: str) -> Markup:
    """A figure of `svg`, whose texts are escaped already."""
    from markupsafe import Markup

    return Markup(drawing)


def _excerpt(tokens: Sequence[ShownToken], divergence: str, at: int | None = None) -> Markup:
    """Tokens as text shaded by their divergence; the one at index `at` is outlined and followed by its value."""
    from markupsafe import Markup

    return Markup("".join(_token(token, divergence, i == at) for i, token in enumerate(tokens)))


def _token(token: ShownToken, divergence: str, largest: bool) -> str:
    text = f"[{token.id}]" if token.text is None else token.text
    shown = escape(visible_token(text))
    if token.value is None and not largest:
        return f"<i>{shown}</i>" if token.rollout_logprob is None else f"<span>{shown}</span>"
    said = [f"id {token.id}", f"{divergence} {number(token.value)}"]
    if token.rollout_logprob is not None or token.trainer_logprob is not None:
        said.append(
            f"log-probability: rollout {number(token.rollout_logprob)}, trainer {number(token.trainer_logprob)}"
        )
    classes = f"s{shade(token.value)}" + (" peak" if largest else "")
    span = f'<span class="{classes}" title="{escape("; ".join(said))}">{shown}</span>'
    value = MISSING if token.value is None else number(token.value)
    whole = ' class="short"' if len(shown) <= _UNBROKEN else ""
    return f"<mark{whole}>{span}<b>{escape(divergence)} {value}</b></mark>" if largest else span
