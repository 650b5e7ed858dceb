"""Flags that several commands share, and the values that they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
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
            self.fail(f"{text} is not above 0 and at most 100%: write 90% or 0.9", param, ctx)
        return share


class ShareOrNone(Percentage):
    """A share, or 0."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return 0.0 if str(value).removesuffix("%") == "0" else super().convert(value, param, ctx)


class Devices(click.ParamType):  # type: ignore[type-arg]  # generic in recent releases only
    """`0,1`: GPUs by number, or any devices by name."""

    name = "i,j,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in str(value).split(",")]
        if not all(name.isdigit() or name.partition(":")[0] in ("cpu", "cuda") for name in names):
            self.fail(f"{value!r} is not a list of GPUs like 0,1", param, ctx)
        return tuple(f"cuda:{name}" if name.isdigit() else name for name in names)


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
    divergence = (
        "kl, kl-reverse, tv, kl-estimate, abs-log-ratio, k2 or k3; the default depends on the grade and is printed."
    )
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
                help="Rows whose bounds of kl or tv enclose the threshold.",
            ),
            click.option(
                "--on-estimate",
                is_flag=True,
                help="Where kl is named, judge rows of grade sketch by its estimate, not by its bounds.",
            ),
        ]
    ):
        command = option(command)
    return command


DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:i].")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Precision of the forward; auto is float32 on a CPU, bfloat16 on a GPU.",
)
VOCAB_SIZE = click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Cut both sides to the first N tokens (padded vocabularies).",
)
MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens of one forward [default: 4096 CPU, 16384 GPU]."
)
CONFIDENCE = click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    help="That the bounds from sketches hold at all positions of a sequence.",
)
MEASURING_FLAGS = (DEVICE, DTYPE, VOCAB_SIZE, MAX_TOKENS, CONFIDENCE)

MODEL_FLAGS = (
    DEVICE,
    click.option(
        "--devices",
        type=Devices(),
        default=(),
        help="Score shards side by side, a process for each GPU: 0,1 (or cpu,cpu).",
    ),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="auto spreads a model that is larger than a GPU over all of them (needs accelerate).",
    ),
    DTYPE,
    click.option(
        "--head-dtype",
        type=click.Choice(["auto", "float32"]),
        default="auto",
        show_default=True,
        help="Precision of the head; auto is that of --dtype, float32 leaves its products unrounded.",
    ),
    VOCAB_SIZE,
    MAX_TOKENS,
    click.option(
        "--head-rows",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Positions whose logits exist at once.",
    ),
    CONFIDENCE,
    click.option(
        "--sharing",
        type=click.Choice(["auto", "tree", "fork", "packed", "padded"]),
        default="auto",
        show_default=True,
        help="How prefixes common to several rollouts are scored once; "
        "auto takes the best way that a check at the start finds exact.",
    ),
    click.option(
        "--batch-invariant",
        is_flag=True,
        help="Constant shapes: scores do not depend, to the bit, on who shared a batch with whom "
        "(slower; implies --sharing padded).",
    ),
    click.option("--compile", is_flag=True, help="torch.compile of the decoder layers (pays in long runs)."),
    click.option(
        "--noise-floor",
        type=ShareOrNone(),
        help="Measure the precision's noise on a share of the rollouts, as 1%; 0 measures nothing at the start, "
        "nor what other stored evidence would decide [default: on a few].",
    ),
)


def model_flags(command: F) -> F:
    """The flags of score that say where and how the model runs."""
    for option in reversed(MODEL_FLAGS):
        command = option(command)
    return command


SAMPLING_FLAGS = (
    click.option("--temperature", type=float, default=1.0, help="Of rows that do not state theirs [default: 1]."),
    click.option("--top-p", type=float, default=1.0, help="Of rows that do not state theirs [default: 1]."),
    click.option("--top-k", type=int, default=-1, help="Of rows that do not state theirs [default: off]."),
    click.option(
        "--logprobs-mode",
        type=click.Choice(["raw", "tempered", "processed"]),
        help="Stage of the stored values of rows that do not state it.",
    ),
)


def sampling_flags(command: F) -> F:
    """How rows were sampled that do not say so; they arrive as `defaults` (a `Sampling`) and `mode_given`."""

    @wraps(command)
    def call(*args: Any, temperature: float, top_p: float, top_k: int, logprobs_mode: str | None, **rest: Any) -> Any:
        from trm_audit.rollout import Sampling

        defaults = Sampling(temperature, top_p, top_k, logprobs_mode or "raw")
        return command(*args, defaults=defaults, mode_given=logprobs_mode is not None, **rest)

    for option in reversed(SAMPLING_FLAGS):
        call = option(call)
    return call  # type: ignore[return-value]  # the same command, called with other arguments


PACK_FLAGS = (
    click.option(
        "--to",
        metavar="sketch:K,m | topk:K | sampled | q16",
        help="What full logits become: a sketch of each distribution, its top K, the sampled value alone, "
        "or log-probabilities of 16 bits.",
    ),
    click.option("-o", "--output", help="Output folder."),
    click.option("--plan", is_flag=True, help="Print what each choice of K and m costs and loses; write nothing."),
    click.option(
        "--tokens",
        type=click.IntRange(1),
        default=1000,
        show_default=True,
        help="Measure --plan on about so many tokens.",
    ),
    click.option("--seed", type=int, default=1, show_default=True, help="Of the sketches' signs."),
    click.option(
        "--model", type=click.Path(path_type=Path), help="Checkpoint folder to measure with what verdicts lose."
    ),
    click.option(
        "--delta",
        "deltas",
        type=click.FloatRange(min=0, min_open=True),
        multiple=True,
        default=(0.02, 0.05, 0.1),
        show_default=True,
        help="Threshold of a sequence's largest KL at which verdicts are compared. Repeatable.",
    ),
    click.option(
        "--measure", type=Percentage(), help="Measure the loss on a share of the groups, as 1% [default: 8 rollouts]."
    ),
)


def pack_flags(command: F) -> F:
    """The flags of pack, with those of the model that measures what is lost."""
    for option in reversed((*PACK_FLAGS, *MEASURING_FLAGS)):
        command = option(command)
    return command


REPORT_FLAGS = (
    click.option("--horizon", type=click.IntRange(1), help="T of the bounds [default: the longest response]."),
    click.option("--reward-range", type=float, help="R_max - R_min [default: from the data]."),
    click.option(
        "--target-acceptance", type=Percentage(), help="Say which thresholds keep this share of the sequences, as 90%."
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="Checkpoint folder whose tokenizer shows tokens as text [default: that of the run].",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File for the report: .html, .md or .json [default: the terminal].",
    ),
    click.option(
        "--format",
        "form",
        type=click.Choice(["terminal", "html", "md", "json"]),
        help="Format of the report [default: by the suffix of -o]; md fits a pull request.",
    ),
    click.option("--json", "form", flag_value="json", help="Short for --format json (schemas/report.schema.json)."),
    click.option("--overwrite", is_flag=True, help="Replace the file that -o names."),
    click.option("--full", is_flag=True, help="Print every table to the terminal, not the first screen alone."),
    click.option("--pool", is_flag=True, help="Take two folders as one data set instead of comparing them."),
    click.option(
        "--fail-on", "gates", multiple=True, metavar="COND", help='Exit 1 if this holds: "acceptance<0.7". Repeatable.'
    ),
    click.option("--wandb", metavar="PROJECT", help="Log the figures to a Weights & Biases project, too."),
    click.option("--trackio", metavar="PROJECT", help="Log the figures to a Trackio project, too."),
)


def report_flags(command: F) -> F:
    """The flags of report; those of the trackers arrive as one dict, tracker -> project."""

    @wraps(command)
    def call(*args: Any, wandb: str | None, trackio: str | None, **settings: Any) -> Any:
        named = {"wandb": wandb, "trackio": trackio}
        return command(*args, trackers={kind: project for kind, project in named.items() if project}, **settings)

    for option in reversed(REPORT_FLAGS):
        call = option(call)
    return call  # type: ignore[return-value]  # the same command, called with fewer arguments


SKIP_BAD = click.option(
    "--skip-bad", is_flag=True, help="Go on without bad rows and shards; exit code 4 if there were any."
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace another run's output in the same folder.")
ALLOW_PARTIAL = click.option("--allow-partial", is_flag=True, help="Take a score folder whose run has not finished.")
OUTPUT = click.option("-o", "--output", required=True, help="Output folder, or - for an Arrow stream on stdout.")
INPUTS = click.argument("inputs", nargs=-1, required=True)
