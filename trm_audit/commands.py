"""Commands that turn files into files of another form: pack, convert, export. `cli` adds them to its group."""

from __future__ import annotations

import sys
from typing import Any

import click

from trm_audit.adapters import SOURCES, TARGETS
from trm_audit.console import duration, say, watching
from trm_audit.errors import EXIT_PARTIAL, UsageError
from trm_audit.flags import ALLOW_PARTIAL, INPUTS, OVERWRITE, SKIP_BAD, columns_flag, pack_flags, sampling_flags


@click.command()
@INPUTS
@pack_flags
@sampling_flags
@columns_flag
@SKIP_BAD
@OVERWRITE
def pack(
    inputs: tuple[str, ...],
    to: str | None,
    output: str | None,
    plan: bool,
    tokens: int,
    seed: int,
    columns: tuple[tuple[str, str], ...],
    **settings: Any,
) -> None:
    """Turn full logits into a few hundred bytes a token, and say what that loses.

    The input is never touched. The output is rollout shards again, which score reads.
    """
    from trm_audit.pipeline.pack import pack as run
    from trm_audit.pipeline.pack_loss import plan as measure
    from trm_audit.pipeline.pack_options import PackOptions, Target
    from trm_audit.report.pack_tables import console_on, render_loss, render_plan

    if plan == (to is not None) or plan == (output is not None):
        raise UsageError(
            "give --to and -o to pack, or --plan alone", place="pack", next_step="See trm-audit pack --help."
        )
    options = PackOptions(to=Target.parse(to or "sketch:20,64", seed), columns=dict(columns), **settings)
    with watching("pack") as watch:
        if plan:
            losses = measure(inputs, options, tokens=tokens, progress=watch)
        else:
            result = run(inputs, str(output), options, progress=watch)
    if plan:
        render_plan(losses, console_on(sys.stdout))
        return
    for sentence in result.sentences(options):
        say(sentence)
    if result.loss is not None:
        render_loss(result.loss, console_on(sys.stderr))
    say(f"packed {result.packed:,} of {result.rows:,} rollouts in {duration(result.seconds)} -> {output}")
    if result.num_skipped or result.bad_shards:
        sys.exit(EXIT_PARTIAL)


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("--from", "source", type=click.Choice(sorted(SOURCES)), required=True, help="Format of the files.")
@click.option("-o", "--output", required=True, help="Output folder.")
@click.option("--temperature", type=float, help="Of rollouts whose file does not say.")
@click.option("--top-p", type=float, help="Of rollouts whose file does not say.")
@click.option("--top-k", type=int, help="Of rollouts whose file does not say.")
@click.option(
    "--logprobs-mode",
    type=click.Choice(["raw", "tempered", "processed"]),
    help="Stage of the log-probabilities, where the file does not say.",
)
@SKIP_BAD
@OVERWRITE
def convert(inputs: tuple[str, ...], source: str, output: str, skip_bad: bool, overwrite: bool, **given: Any) -> None:
    """Turn raw outputs of engines and dumps of trainers into rollout shards.

    INPUTS are files and folders.
    """
    from trm_audit.adapters.base import Given
    from trm_audit.pipeline.convert import ConvertOptions
    from trm_audit.pipeline.convert import convert as run

    with watching("convert") as watch:
        result = run(inputs, output, ConvertOptions(source, Given(**given), skip_bad, overwrite), progress=watch)
    for sentence in result.assumed:
        say(f"Assumed: {sentence}")
    grades = "".join(f"; {count:,} {grade}" for grade, count in sorted(result.grades.items()))
    left_out = f"; left out {result.num_skipped:,} rows and {result.bad_files:,} files" * bool(
        result.num_skipped or result.bad_files
    )
    say(
        f"{result.rows:,} rollouts, {result.num_tokens:,} policy tokens in {result.shards + result.done:,} "
        f"shards{grades}{left_out} -> {output}"
    )
    if left_out:
        sys.exit(EXIT_PARTIAL)


@click.command()
@INPUTS
@click.option("--to", "target", type=click.Choice(sorted(TARGETS)), required=True, help="Whose format is written.")
@click.option("-o", "--output", required=True, help="Output folder.")
@ALLOW_PARTIAL
@OVERWRITE
def export(inputs: tuple[str, ...], target: str, output: str, allow_partial: bool, overwrite: bool) -> None:
    """Write training shards as what a trainer takes in."""
    from trm_audit.pipeline.export import ExportOptions
    from trm_audit.pipeline.export import export as run

    with watching("export") as watch:
        result = run(inputs, output, ExportOptions(target, allow_partial, overwrite), progress=watch)
    for sentence in result.remarks:
        say(sentence)
    info = result.info
    say(f"exported {info.num_rows:,} sequences, {info.n_kept:,} of {info.n_total:,} kept -> {output}")
