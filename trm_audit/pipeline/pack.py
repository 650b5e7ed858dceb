"""Packing rollouts: full logits beside the shards become sketches, lists, sampled values, or half as many bytes.

The input is never touched. What is written is rollout shards again (schemas/rollout.md), so that a killed run goes on:

out/data/*.parquet             the shards, named as those they were made of
out/logits/logits-*.parquet    q16 alone: full logits, whole before the shard whose footer names them
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.errors import UsageError
from trm_audit.pipeline.pack_loss import measure_loss
from trm_audit.pipeline.pack_options import PackOptions, PackResult
from trm_audit.pipeline.pack_shards import ShardPacker
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.score_shards import leave_out_strangers
from trm_audit.pipeline.selection import select
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import Found, find_shards


def pack(inputs: Sequence[str], output: str, options: PackOptions, *, progress: Progress | None = None) -> PackResult:
    """Writes rollouts with less evidence than their full logits, and says what that loses.

    Args:
        inputs: folders, files, globs of rollout shards.
        output: a folder.
        options: settings.
        progress: who watches.

    Raises:
        UsageError: the output is the input, or lies in it.
        AuditError: see `errors`; what was published before stays.
    """
    watch, result = progress or Silent(), PackResult()
    if options.model is not None:
        find_checkpoint(options.model)  # before anything is written, not when all of it is
    found = find_shards(inputs, "rollouts", options.columns)
    leave_out_strangers(found)
    check_apart(Path(output), inputs, found)
    selection = select(found.shards, options.columns, 1.0, None)
    bad = [*found.bad, *selection.bad]
    for path, reason in found.passed_over:
        watch.note(f"{path} is passed over: {reason}")
    if bad and not options.skip_bad:
        raise bad[0]
    result.bad_shards += len(bad)
    shards = [shard for shard in found.shards if shard.name in selection.rows]
    with OutputFolder(Path(output), options.run(), overwrite=options.overwrite) as folder:
        for error in bad:
            watch.note(f"left out: {error}")
            folder.skip(error)
        ShardPacker(options, selection, folder, watch, result).pack(shards)
    if options.model is not None:
        result.loss = measure_loss(shards, selection, options, watch)
    return result


def check_apart(output: Path, inputs: Sequence[str], found: Found) -> None:
    """Raises UsageError if the output is the input, or one lies in the other: input is never touched, nor added to."""
    out = output.resolve()
    files = [file.resolve() for shard in found.shards for file in (shard.path, *shard.logits)]
    folders = [Path(each).resolve() for each in inputs if Path(each).is_dir()]
    if any(out in file.parents for file in files) or any(each in (out, *out.parents) for each in folders):
        raise UsageError(
            "is the input, or lies in it, and the input is never touched",
            place=f"-o {output}",
            next_step="Give another -o, beside it.",
        )
