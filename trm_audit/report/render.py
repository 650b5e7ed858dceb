"""A summary or a comparison as text, in the format that somebody asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from trm_audit.report.compare import Comparison
    from trm_audit.report.summary import AuditSummary

FORMATS = ("html", "md", "json")
"""What can be written to a file, by the suffix of its name; a terminal gets its own rendering."""


def render(found: AuditSummary | Comparison, form: str) -> str:
    """The report in one of `FORMATS`, with a line break at its end; each renderer is loaded when it is asked for."""
    if form == "html":
        from trm_audit.report.page.html import render_comparison_html, render_html
        from trm_audit.report.summary import AuditSummary

        return render_html(found) if isinstance(found, AuditSummary) else render_comparison_html(found)
    if form == "md":
        from trm_audit.report.markdown import render_markdown

        return render_markdown(found)
    return found.to_json() + "\n"


def render_to_terminal(found: AuditSummary | Comparison, file: TextIO, *, full: bool = False) -> None:
    """Print the report in the width of the terminal, or in 80 columns to anything else; `full` for all tables."""
    from rich.console import Console

    from trm_audit.report.side_by_side import render_comparison
    from trm_audit.report.summary import AuditSummary
    from trm_audit.report.terminal import render as render_summary

    console = Console(file=file)
    if isinstance(found, AuditSummary):
        render_summary(found, console, full=full)
    else:
        render_comparison(found, console)
