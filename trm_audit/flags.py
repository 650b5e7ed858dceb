"""Flags that several commands share, and the values that they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Percentage(click.ParamType):  # type: ignore[type-arg]  # generic in recent releases only
    """A share as `1%` or `0.01`."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{text!r} is not a share like 1% or 0.01", param, ctx)
        if not 0 < share <= 1:
            self.fail(f"{text} is not above 0 and at most 100%", param, ctx)
        return share


class Part(click.ParamType):  # type: ignore[type-arg]  # generic in recent releases only
    """`i/n`: the i-th of n parts."""

    name = "i/n"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, _, second = str(value).partition("/")
        if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
            self.fail(f"{value!r} is not i/n with 1 <= i <= n, as 3/8", param, ctx)
        return int(first), int(second)


class Renames(click.ParamType):  # type: ignore[type-arg]  # generic in recent releases only
    """`ours=theirs`."""

    name = "ours=theirs"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        ours, equals, theirs = str(value).partition("=")
        if not (ours and equals and theirs):
            self.fail(f"{value!r} is not OURS=THEIRS", param, ctx)
        return ours, theirs


def columns_flag(command: F) -> F:
    return click.option(
        "--column",
        "columns",
        type=Renames(),
        multiple=True,
        help="Read the column THEIRS as OURS (schemas/rollout.md lists ours). Repeatable.",
    )(command)


def criteria_flags(command: F) -> F:
    """The flags that spell criteria, shared by filter and report."""
    divergence = "kl, kl-reverse, tv, abs-log-ratio, k2 or k3; the default depends on the grade and is printed."
    for option in reversed(
        [
            click.option(
                "--delta-max", type=float, help="Keep a sequence if the largest divergence of a token is at most this."
            ),
            click.option("--max-of", help=f"Divergence of --delta-max: {divergence}"),
            click.option("--delta-avg", type=float, help="Keep a sequence if its mean divergence is at most this."),
            click.option("--avg-of", help=f"Divergence of --delta-avg: {divergence}"),
            click.option(
                "--delta-total", type=float, help="Keep a sequence if the sum of its divergences is at most this."
            ),
            click.option("--total-of", help=f"Divergence of --delta-total: {divergence}"),
            click.option(
                "--keep", metavar="EXPR", help='Keep where this holds: "seq_max_kl<=0.05 and seq_mean_k3<=0.002".'
            ),
            click.option(
                "--undecided",
                type=click.Choice(["mask", "keep", "error"]),
                default="mask",
                show_default=True,
                help="Rows whose interval of kl or tv contains the threshold.",
            ),
        ]
    ):
        command = option(command)
    return command


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace another run's output in the same folder.")
ALLOW_PARTIAL = click.option("--allow-partial", is_flag=True, help="Take a score folder whose run has not finished.")
OUTPUT = click.option("-o", "--output", required=True, help="Output folder, or - for an Arrow stream on stdout.")
INPUTS = click.argument("inputs", nargs=-1, required=True)
