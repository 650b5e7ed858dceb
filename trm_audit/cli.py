"""The command line: the only place that prints and exits. Commands are a thin skin over functions of the library."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from trm_audit import __version__
from trm_audit.commands import convert, export, pack
from trm_audit.console import duration, printable, say, watching
from trm_audit.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    EXIT_USAGE,
    AuditError,
    GateFailed,
    UsageError,
)
from trm_audit.flags import (
    ALLOW_PARTIAL,
    INPUTS,
    OUTPUT,
    OVERWRITE,
    SKIP_BAD,
    Part,
    Percentage,
    columns_flag,
    criteria_flags,
    model_flags,
    report_flags,
    sampling_flags,
)

if TYPE_CHECKING:
    from trm_audit.report.compare import Comparison
    from trm_audit.report.summary import AuditSummary

EXIT_PIPE_CLOSED = 141
SHOWN_ERRORS = 20


class _PipeClosed(Exception):
    """Whoever read stdout has gone."""


class _Commands(click.Group):
    """Keeps a closed pipe from click, which would exit with 1: that is a failed gate."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _PipeClosed from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="trm-audit")
def cli() -> None:
    """How far is the policy that sampled your rollouts from the one you train?

    score rollouts with the training model, filter out sequences outside the trust region, report what was found.
    INPUTS are folders, files, globs, or - for an Arrow stream on stdin.
    """


@cli.command()
@INPUTS
@click.option("-o", "--output", help="Output folder, or - for an Arrow stream on stdout.")
@click.option("--model", type=click.Path(path_type=Path), help="Checkpoint folder of the training model (safetensors).")
@click.option(
    "--trainer-logprobs",
    type=click.Choice(["model", "stored"]),
    default="model",
    show_default=True,
    help="Score with --model, or take the trainer's own values from the column trainer_logprobs.",
)
@model_flags
@sampling_flags
@click.option("--trainer-version", type=int, help="Policy version of the model, for staleness.")
@click.option(
    "--logits", type=click.Path(path_type=Path), multiple=True, help="Further side files with full logits. Repeatable."
)
@columns_flag
@click.option("--limit", type=click.IntRange(1), help="Score the first N rows only.")
@click.option("--sample", type=Percentage(), default="100%", help="Score a share of the groups, as 1%.")
@click.option(
    "--part", type=Part(), default="1/1", help="Score the i-th of n parts of the shards (Slurm arrays), as 3/8."
)
@SKIP_BAD
@OVERWRITE
@click.option("--dry-run", is_flag=True, help="Count, time a few rows, and say how long it would take.")
def score(
    inputs: tuple[str, ...],
    output: str | None,
    columns: tuple[tuple[str, str], ...],
    dry_run: bool,
    **settings: Any,
) -> None:
    """Score rollouts again with the training model."""
    from trm_audit.pipeline.dry_run import dry_run as estimate
    from trm_audit.pipeline.score import score as run
    from trm_audit.pipeline.trainer import ScoreOptions

    options = ScoreOptions(columns=dict(columns), **settings)
    if dry_run:
        found = estimate(inputs, options)
        of_all = f" of {found.devices:,} devices (one was measured)" if found.devices > 1 else ""
        click.echo(
            f"{found.rows:,} rollouts in {found.shards:,} shards, {found.num_tokens:,} response tokens, "
            f"{found.logits_bytes / 1e9:.2f} GB of stored logits: about {duration(found.seconds)} "
            f"at {found.tokens_per_second:,.0f} tokens/s{of_all}"
        )
        return
    if output is None:
        raise UsageError("an output is needed", place="-o", next_step="Give a folder, or - for an Arrow stream.")
    with watching("score") as watch:
        result = run(inputs, _target(output), options, source=_source(inputs), progress=watch)
    say(_score_line(result, output))
    if result.num_skipped or result.bad_shards:
        sys.exit(EXIT_PARTIAL)


def _score_line(result: Any, output: str) -> str:
    parts = [f"scored {result.rows:,} rollouts, {result.num_tokens:,} tokens in {result.shards:,} shards"]
    if result.done:
        parts.append(f"{result.done:,} were there already")
    parts.append(f"{duration(result.seconds)}, {result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s")
    parts += [f"{count:,} {grade}" for grade, count in sorted(result.grades.items())]
    if result.num_disagreements:
        parts.append(f"{result.num_disagreements:,} sampled log-probabilities do not fit the stored distribution")
    if result.num_infinite:
        parts.append(f"{result.num_infinite:,} tokens with infinite KL")
    for policy in ("raw", "tempered"):
        if result.audited_policies.get(policy):
            parts.append(f"{result.audited_policies[policy]:,} rollouts compared as {policy} values only")
    if result.num_skipped or result.bad_shards:
        parts.append(f"left out {result.num_skipped:,} rows and {result.bad_shards:,} shards")
    if not result.complete:
        parts.append("other parts are still missing")
    return "; ".join(parts) + ("" if output == "-" else f" -> {output}")


@cli.command(name="filter")
@INPUTS
@OUTPUT
@criteria_flags
@click.option("--drop", is_flag=True, help="Leave rejected rows out; n_total and n_kept travel with the output.")
@click.option(
    "--advantage",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="Fill an absent advantage from reward and group.",
)
@ALLOW_PARTIAL
@OVERWRITE
def filter_command(
    inputs: tuple[str, ...],
    output: str,
    drop: bool,
    advantage: str,
    allow_partial: bool,
    overwrite: bool,
    **criteria: Any,
) -> None:
    """Mask sequences outside the trust region."""
    from trm_audit.criteria.thresholds import Criteria
    from trm_audit.pipeline.filter import FilterOptions, filter_scores

    options = FilterOptions(Criteria(**criteria), drop, advantage, allow_partial, overwrite)
    with watching("filter") as watch:
        result = filter_scores(inputs, _target(output), options, source=_source(inputs), progress=watch)
    share = result.n_kept / result.n_total if result.n_total else 0.0
    reasons = "".join(f"; {count:,} {cause}" for cause, count in result.reasons.most_common())
    say(
        f"kept {result.n_kept:,} of {result.n_total:,} sequences ({share:.1%}), {result.tokens_kept:,} of "
        f"{result.tokens_total:,} tokens{reasons}" + ("" if output == "-" else f" -> {output}")
    )


@cli.command()
@INPUTS
@criteria_flags
@report_flags
@ALLOW_PARTIAL
def report(
    inputs: tuple[str, ...],
    form: str | None,
    output: Path | None,
    overwrite: bool,
    pool: bool,
    full: bool,
    gates: tuple[str, ...],
    trackers: dict[str, str],
    **settings: Any,
) -> None:
    """Say how far apart the policies are, and what that permits to claim.

    Two folders are two audits, shown side by side with their differences; anything else is one data set.
    """
    from trm_audit.pipeline.report import compare, report_options, summarize, write_report
    from trm_audit.report.gates import check, parse_gate
    from trm_audit.report.render import render, render_to_terminal
    from trm_audit.report.tracking import log_to

    conditions = [parse_gate(gate) for gate in gates]
    form = form or _format_of(output)
    options = report_options(**settings)
    with watching("report") as watch:
        if len(inputs) == 2 and not pool and all(Path(each).is_dir() for each in inputs):
            found: AuditSummary | Comparison = compare(*inputs, options, progress=watch)
        else:
            found = summarize(inputs, options, source=_source(inputs), progress=watch)
    if output is not None:
        write_report(render(found, form), output, overwrite=overwrite)
        say(f"{found.verdict} -> {output}")
    elif form == "terminal":
        render_to_terminal(found, sys.stdout, full=full)
    else:
        click.echo(render(found, form), nl=False)
    for kind, project in trackers.items():
        log_to(kind, project, found)
    failed = check(conditions, found)
    if failed:
        raise GateFailed("; ".join(failed), place="--fail-on")


def _format_of(output: Path | None) -> str:
    """The format that a file's suffix asks for; the terminal's without a file."""
    from trm_audit.report.render import FORMATS

    suffix = "terminal" if output is None else output.suffix.removeprefix(".")
    if output is not None and suffix not in FORMATS:
        raise UsageError(
            f"{output.name} does not say which format is wanted",
            place="-o",
            next_step=f"Let it end in .{', .'.join(FORMATS)}, or give --format.",
        )
    return suffix


@cli.command()
@INPUTS
@click.option("--vocab-size", type=click.IntRange(1), help="Token ids have to be below this.")
@click.option("--no-logits", is_flag=True, help="Do not read the values of stored full logits, only where they lie.")
@columns_flag
def validate(
    inputs: tuple[str, ...], vocab_size: int | None, no_logits: bool, columns: tuple[tuple[str, str], ...]
) -> None:
    """Check rollout shards against the schema, without a model."""
    from trm_audit.pipeline.validate import ValidateOptions, ValidateResult
    from trm_audit.pipeline.validate import validate as run

    options = ValidateOptions(vocab_size, dict(columns), not no_logits)
    with watching("validate") as watch:
        result: ValidateResult = run(inputs, options, source=_source(inputs), progress=watch)
    for error in result.errors[:SHOWN_ERRORS]:
        click.echo(printable(_message(error)))
    if len(result.errors) > SHOWN_ERRORS:
        click.echo(f"... and {len(result.errors) - SHOWN_ERRORS:,} more errors")
    for sentence, rows in result.warnings.most_common():
        click.echo(f"Warning: {sentence} ({rows:,} rows)")
    grades = ", ".join(f"{count:,} {grade}" for grade, count in sorted(result.grades.items()))
    click.echo(
        f"{result.rows:,} rollouts in {result.shards:,} shards, {result.num_tokens:,} policy tokens"
        f"{': ' + grades if grades else ''}; {len(result.errors):,} errors, {len(result.warnings):,} warnings"
    )
    if result.errors:
        sys.exit(EXIT_BAD_INPUT)


@cli.command()
@click.option("--horizon", type=click.IntRange(1), required=True, help="T, the longest response.")
@click.option("--kl-max", type=float, help="delta, the largest KL of a context (nats).")
@click.option("--kl-seq", type=float, help="D_seq, the expected sum of KL over a response (nats).")
@click.option("--tv-max", type=float, help="eps, the largest total variation of a context.")
@click.option("--tv-seq", type=float, help="D_TV_seq, total variation between the laws of whole responses.")
@click.option("--reward-range", type=float, default=1.0, show_default=True, help="R_max - R_min.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def bounds(as_json: bool, **values: Any) -> None:
    """The bounds on the surrogate's error, as a calculator."""
    from trm_audit.numerics.bounds import error_bounds
    from trm_audit.report.calculator import bounds_json, render_bounds

    try:
        found = error_bounds(values.pop("horizon"), **values)
    except ValueError as error:
        raise UsageError(str(error), next_step="See trm-audit bounds --help.") from error
    if as_json:
        click.echo(bounds_json(found))
        return
    from rich.console import Console

    render_bounds(found, Console(file=sys.stdout))


@cli.command()
@click.argument("name", type=click.Choice(["rollout", "score", "training", "stream", "report"]))
def schema(name: str) -> None:
    """Print a page of the file formats."""
    from importlib.resources import files

    click.echo(files("trm_audit.schemas").joinpath(f"{name}.md").read_text("utf-8"), nl=False)


for command in (pack, convert, export):
    cli.add_command(command)


def _target(output: str) -> str | BinaryIO:
    if output != "-":
        return output
    if sys.stdout.isatty():
        raise UsageError(
            "an Arrow stream is binary and this is a terminal", place="-o -", next_step="Pipe it somewhere."
        )
    return sys.stdout.buffer


def _source(inputs: tuple[str, ...]) -> BinaryIO | None:
    if "-" not in inputs:
        return None
    if inputs != ("-",):
        raise UsageError("- cannot be mixed with files")
    if sys.stdin.isatty():
        raise UsageError("nothing is piped into -", next_step="Pipe the output of another command, or name files.")
    return sys.stdin.buffer


def _message(error: AuditError) -> str:
    return "Error: " + str(error).replace("\n", "\n       ")


def main() -> None:
    """Entry point of `trm-audit`: runs a command; what goes wrong becomes a message and an exit code (see `errors`)."""
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()
    except AuditError as error:
        say(_message(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        say("\nInterrupted. The same command goes on where it was.")
        sys.exit(EXIT_INTERRUPTED)
    except (_PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE_CLOSED)
    except Exception as error:
        if os.environ.get("TRM_AUDIT_TRACEBACK"):
            traceback.print_exc()
        say(
            f"Internal error: {type(error).__name__}: {error}\n"
            "       This is a bug in trm-audit. TRM_AUDIT_TRACEBACK=1 shows where; what was published stays."
        )
        sys.exit(EXIT_INTERNAL)
