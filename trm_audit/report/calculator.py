"""The bounds of given divergences, as a table and as JSON: what `trm-audit bounds` prints."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from trm_audit.numerics.bounds import ErrorBounds
from trm_audit.report.summary import json_ready

INPUTS = ("horizon", "kl_max", "kl_seq", "tv_max", "tv_seq", "reward_range")


def render_bounds(found: ErrorBounds, console: Console) -> None:
    """Prints what the bounds were computed from, the bounds, and a sentence about the smallest."""
    console.print(", ".join(f"{name} {getattr(found, name):.6g}" for name in INPUTS), highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bound")
    table.add_column("published", justify="right")
    table.add_column("sharp", justify="right")
    for name, bound in found.bounds.items():
        table.add_row(
            name, f"{bound.published:.6g}", f"{bound.sharp:.6g}", style="bold" if name == found.minimum else None
        )
    console.print(table)
    console.print(found.sentence, markup=False, highlight=False)


def bounds_json(found: ErrorBounds) -> str:
    """The same for machines; infinities are the strings "inf" and "-inf"."""
    values = {**asdict(found), "minimum": found.minimum, "vacuous": found.vacuous, "sentence": found.sentence}
    return json.dumps(json_ready(values), indent=2)
