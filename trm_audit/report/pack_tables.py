"""What packing loses: figures of the same rollouts with their full logits and as they are packed, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from rich.console import Console
from rich.table import Table

from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.report.shown import MISSING, number, percent

ESTIMATE = {"sketch": "kl_estimate", "topk": "kl_lower", "sampled": "k2", "q16": "kl"}
"""What stands for KL, by what the logits are packed to."""
BOUNDS = (("kl_lower", "kl", 1), ("kl_upper", "kl", -1), ("tv_lower", "tv", 1), ("tv_upper", "tv", -1))
EXACT_ERROR, EXACT_LEAST = 2e-4, 1e-8
"""What the exact figures themselves may be off in float32, relative and absolute."""
SEQUENCES = tuple(f"seq_max_{name}" for name in ("kl", "tv", "k2", "kl_estimate", *(bound for bound, _, _ in BOUNDS)))
TOKENS = ("kl", "tv", *(bound for bound, _, _ in BOUNDS))
LEAST_WIDTH = 120
"""Columns of a table in a file, a pipe or a log, which have no width of their own."""
TIGHT = 1.1
"""A bound of TV that is at most this much above the truth, in median, is as good as the truth."""


@dataclass(frozen=True)
class Figures:
    """Scores of some rollouts: by name, of each sequence (`SEQUENCES`) and of each policy token (`TOKENS`)."""

    sequences: Mapping[str, Floats]
    tokens: Mapping[str, Floats]

    @classmethod
    def cat(cls, parts: Sequence[Figures]) -> Figures:
        """Those of several batches."""
        return cls(
            {name: np.concatenate([part.sequences[name] for part in parts]) for name in SEQUENCES},
            {name: np.concatenate([part.tokens[name] for part in parts]) for name in TOKENS},
        )


@dataclass(frozen=True)
class Spread:
    """Quantiles over sequences."""

    least: float
    q05: float
    median: float
    q95: float
    most: float

    @classmethod
    def of(cls, values: Floats) -> Spread | None:
        """None of nothing. A quantile is one of the values, so that an infinite one stays where it is."""
        there = values[~np.isnan(values)]
        if not len(there):
            return None
        return cls(*np.quantile(there, [0, 0.05, 0.5, 0.95, 1], method="closest_observation").tolist())


@dataclass(frozen=True)
class Verdicts:
    """Sequences that max KL <= delta decides.

    Attributes:
        delta: the threshold (nats).
        changed: decided otherwise than by the exact KL.
        undecided: the bounds of KL contain delta; None without bounds.
        undecided_tv: the bounds of TV contain sqrt(delta / 2), the largest TV that such a KL permits.
    """

    delta: float
    changed: int
    undecided: int | None
    undecided_tv: int | None


@dataclass(frozen=True)
class Loss:
    """What one way of packing loses on some rollouts.

    Attributes:
        to: what full logits were packed to.
        num_sequences, num_tokens: measured on.
        bytes_before, bytes_after: of evidence for a policy token.
        estimate_of: what stands for KL (`ESTIMATE`).
        estimate: it over KL, both a sequence's largest.
        tv_upper: the upper bound of TV over TV, both a sequence's largest; TV itself in place of the bound for q16.
        kl_width: upper minus lower bound of a sequence's largest KL (nats).
        num_bounds, num_violated: bounds at policy tokens, and those on the wrong side of the exact figure.
        verdicts: at each delta.
    """

    to: str
    num_sequences: int
    num_tokens: int
    bytes_before: float
    bytes_after: float
    estimate_of: str
    estimate: Spread | None
    tv_upper: Spread | None
    kl_width: Spread | None
    num_bounds: int
    num_violated: int
    verdicts: tuple[Verdicts, ...]

    @property
    def as_exact(self) -> bool:
        """Whether every verdict is the exact one (of lists: is decided), and TV is bounded tightly."""
        decides = self.estimate_of != "kl_lower"
        same = all(one.changed == 0 and (decides or one.undecided == 0) for one in self.verdicts)
        return same and self.tv_upper is not None and self.tv_upper.median <= TIGHT


def loss_of(
    to: str, exact: Figures, packed: Figures, deltas: Sequence[float], bytes_before: float, bytes_after: float
) -> Loss:
    """Compares.

    Args:
        to: as `pack --to` spells it.
        exact, packed: figures of the same rollouts, in one order.
        deltas: thresholds of the largest KL.
        bytes_before, bytes_after: of evidence for a policy token.
    """
    kind = to.partition(":")[0]
    mine, theirs = packed.sequences, exact.sequences
    tv_name = "seq_max_tv" if kind == "q16" else "seq_max_tv_upper"
    bounds = [_violated(packed.tokens[name], exact.tokens[of], sign) for name, of, sign in BOUNDS]
    with np.errstate(invalid="ignore"):
        width = mine["seq_max_kl_upper"] - mine["seq_max_kl_lower"]
    return Loss(
        to=to,
        num_sequences=int((~np.isnan(theirs["seq_max_kl"])).sum()),
        num_tokens=len(exact.tokens["kl"]),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        estimate_of=ESTIMATE[kind],
        estimate=Spread.of(_ratio(mine[f"seq_max_{ESTIMATE[kind]}"], theirs["seq_max_kl"])),
        tv_upper=Spread.of(_ratio(mine[tv_name], theirs["seq_max_tv"])),
        kl_width=Spread.of(width),
        num_bounds=sum(int((~np.isnan(packed.tokens[name])).sum()) for name, _, _ in BOUNDS),
        num_violated=sum(int(found.sum()) for found in bounds),
        verdicts=tuple(_verdicts(kind, theirs["seq_max_kl"], mine, delta) for delta in deltas),
    )


def _ratio(values: Floats, exact: Floats) -> Floats:
    """NaN where nothing is known, or the exact one is 0 or infinite."""
    usable = np.isfinite(exact) & (exact > 0)
    return np.where(usable, values, np.nan) / np.where(usable, exact, 1.0)


def _violated(bound: Floats, exact: Floats, sign: int) -> Bools:
    """Where a lower (sign 1) or upper (-1) bound is on the wrong side, beyond what the exact figure may be off."""
    slack = EXACT_ERROR * np.where(np.isfinite(exact), exact, 0.0) + EXACT_LEAST
    with np.errstate(invalid="ignore"):
        return (bound > exact + slack) if sign > 0 else (bound < exact - slack)


def _verdicts(kind: str, kl: Floats, mine: Mapping[str, Floats], delta: float) -> Verdicts:
    lower, upper = mine["seq_max_kl_lower"], mine["seq_max_kl_upper"]
    known = ~np.isnan(kl)
    open_kl = (lower <= delta) & (upper > delta)
    if kind == "topk":  # no estimate decides: a bound does, or nothing
        changed = known & ((upper <= delta) & (kl > delta) | (lower > delta) & (kl <= delta))
    else:
        changed = known & ((mine[f"seq_max_{ESTIMATE[kind]}"] <= delta) != (kl <= delta))
    farthest = (delta / 2) ** 0.5
    open_tv = (mine["seq_max_tv_lower"] <= farthest) & (mine["seq_max_tv_upper"] > farthest)
    has_bounds = kind in ("sketch", "topk")
    return Verdicts(
        delta,
        int(changed.sum()),
        int((known & open_kl).sum()) if has_bounds else None,
        int((known & open_tv).sum()) if has_bounds else None,
    )


def console_on(stream: IO[str]) -> Console:
    """A console that is wide enough for the tables where the stream is no terminal."""
    console = Console(file=stream)
    if not console.is_terminal:
        console.width = max(console.width, LEAST_WIDTH)
    return console


def render_loss(loss: Loss, console: Console) -> None:
    """Prints what one way of packing loses."""
    console.print(
        f"{loss.to} against the full logits, on {loss.num_sequences:,} rollouts of {loss.num_tokens:,} tokens:",
        markup=False,
        highlight=False,
    )
    quantiles = _table("of a sequence's largest", "least", "5 %", "median", "95 %", "most")
    for name, spread in (
        (f"{loss.estimate_of} / kl", loss.estimate),
        ("tv / tv" if loss.estimate_of == "kl" else "tv_upper / tv", loss.tv_upper),
        ("kl_upper - kl_lower (nats)", loss.kl_width),
    ):
        if spread is not None:
            values = (spread.least, spread.q05, spread.median, spread.q95, spread.most)
            quantiles.add_row(name, *(number(value) for value in values))
    console.print(quantiles)
    verdicts = _table("max KL", "verdicts that change", "undecided by KL", "undecided by TV at sqrt(KL / 2)")
    for one in loss.verdicts:
        shares = (_share(count, loss.num_sequences) for count in (one.changed, one.undecided, one.undecided_tv))
        verdicts.add_row(number(one.delta), *shares)
    console.print(verdicts)
    if loss.num_bounds:
        console.print(
            f"{loss.num_violated:,} of {loss.num_bounds:,} bounds at single tokens do not hold.", highlight=False
        )


def render_plan(losses: Sequence[Loss], console: Console) -> None:
    """Prints what each way of packing costs and loses, and which one to take."""
    first = losses[0]
    deltas = "/".join(number(one.delta) for one in first.verdicts)
    console.print(
        f"measured on {first.num_sequences:,} rollouts of {first.num_tokens:,} tokens, "
        f"{first.bytes_before:,.0f} bytes a token as they are\n"
        f"bytes: of a token, before compression; at max KL {deltas}, changed: rollouts decided otherwise than by the "
        "exact KL, open: rollouts that the bounds of KL, or of TV, leave undecided",
        highlight=False,
    )
    columns = ("times\nless", "KL / exact\n5-95 %", "TV bound\n/ exact", "changed", "open KL", "open TV")
    table = _table("--to", "bytes", *columns)
    for column, least in zip(table.columns, (len("sketch:256,256"), len("100,000")), strict=False):
        column.no_wrap, column.min_width = True, least
    for loss in losses:
        undecided = [one.undecided for one in loss.verdicts], [one.undecided_tv for one in loss.verdicts]
        table.add_row(
            loss.to,
            f"{loss.bytes_after:,.0f}",
            _times(loss.bytes_before / max(loss.bytes_after, 1e-9)),
            MISSING if loss.estimate is None else f"{loss.estimate.q05:.2f}-{loss.estimate.q95:.2f}",
            MISSING if loss.tv_upper is None else f"{loss.tv_upper.median:.3f}",
            "/".join(str(one.changed) for one in loss.verdicts),
            *("/".join(MISSING if count is None else str(count) for count in counts) for counts in undecided),
        )
    console.print(table)
    console.print(plan_sentence(losses), markup=False, highlight=False)


def plan_sentence(losses: Sequence[Loss]) -> str:
    """The cheapest way that decides as full logits do."""
    good = [loss for loss in losses if loss.as_exact]
    deltas = ", ".join(number(one.delta) for one in losses[0].verdicts)
    wanted = f"decides all {losses[0].num_sequences:,} rollouts at max KL {deltas} as their full logits do"
    if not good:
        return f"Nothing here {wanted} and bounds TV within {TIGHT - 1:.0%} in median: keep full logits."
    best = min(good, key=lambda loss: loss.bytes_after)
    return (
        f"{best.to}, {best.bytes_after:,.0f} bytes a token, is the cheapest that {wanted} and bounds TV within "
        f"{TIGHT - 1:.0%} in median."
    )


def _table(first: str, *others: str) -> Table:
    """Where there is little room its first column, which names the rows, stays whole, and no figure is cut off."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"


def _share(count: int | None, total: int) -> str:
    if count is None:
        return MISSING
    return f"{count:,} ({percent(count / total if total else None)})"
