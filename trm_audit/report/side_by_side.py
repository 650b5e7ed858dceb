"""Two audits on a terminal: what differs, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from trm_audit.report.compare import Comparison, Difference
from trm_audit.report.shown import number, visible
from trm_audit.report.terminal import row, table_of, titled

if TYPE_CHECKING:
    from rich.console import Console


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Print the comparison to a console; readable from 80 columns on."""
    console.print(Text(visible(comparison.verdict), style="bold"))
    for name, called, summary in (("A", comparison.name_a, comparison.a), ("B", comparison.name_b, comparison.b)):
        console.print(Text(visible(f"{name}: {called}")))
        for finding in summary.warnings:
            console.print(Text(f"Warning ({name}): ", style="bold yellow"), Text(visible(finding.sentence)), sep="")
    drawn, rest = comparison.shown()
    parts = [titled("What was read", _read(comparison))]
    parts += [titled("Differences, with 95 % intervals over groups", _difference_table(drawn))] if drawn else []
    parts += [titled("Differences without an interval", _difference_table(rest))] if rest else []
    for part in parts:
        console.print()
        console.print(part)
    for note in comparison.notes:
        console.print()
        console.print(Text(f"Note: {visible(note)}", style="dim"))


def _read(comparison: Comparison) -> Table:
    table = table_of("", "A", "B")
    a, b = comparison.a, comparison.b
    row(table, "sequences (N)", a.counts.n_total, b.counts.n_total)
    for grade in dict.fromkeys((*a.counts.grades, *b.counts.grades)):
        row(table, f"  grade {grade}", a.counts.grades.get(grade, 0), b.counts.grades.get(grade, 0))
    for name in ("num_groups", "num_tokens", "horizon"):
        row(table, name, getattr(a.counts, name), getattr(b.counts, name))
    for name in ("model_hash", "dtype", "head_dtype"):
        cells = [str((each.run or {}).get(name) or "-")[:16] for each in (a, b)]
        row(table, f"scored with {name}", *cells)
    whole_a, whole_b = a.bounds.get("all", {}), b.bounds.get("all", {})
    for name in (name for name in whole_a if name in whole_b):
        for form in ("published", "sharp"):
            least = (getattr(block.bounds[block.minimum], form) for block in (whole_a[name], whole_b[name]))
            row(table, f"smallest bound ({name}, {form})", *least)
    return table


def _difference_table(found: dict[str, Difference]) -> Table:
    drawn = any(each.has_interval for each in found.values())
    table = table_of("", "A", "B", "B - A", *["95 % interval"] * drawn)
    for name, each in found.items():
        interval = [f"{number(each.low)} to {number(each.high)}"] * drawn
        row(table, name, *(number(value) for value in (each.a, each.b, each.difference)), *interval)
    return table
