"""Training shards into the format of a trainer: written whole beside the final name, then moved there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from trm_audit.adapters import load_target
from trm_audit.adapters.base import ExportInfo
from trm_audit.criteria.thresholds import Criteria, describe
from trm_audit.errors import AuditError, BadInput, OutputError, UsageError
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.score_shards import check_finished, grades_in
from trm_audit.shards import schema
from trm_audit.shards.publish import publish_text, sync_file, sync_folder
from trm_audit.shards.read import Shard, find_shards, read_batches, rows_at_once

BATCH_BYTES = 32 << 20
EXPORT_FILE = "export.json"


@dataclass(frozen=True)
class ExportOptions:
    """Settings of an export.

    Attributes:
        target: name of the trainer's format (`adapters.TARGETS`).
        allow_partial: take a training folder whose run has not finished.
        overwrite: replace an earlier export.
    """

    target: str
    allow_partial: bool = False
    overwrite: bool = False


@dataclass
class ExportResult:
    """What was exported.

    Attributes:
        info: sequences and criteria.
        remarks: how the trainer divides, and what has to be set there.
    """

    info: ExportInfo
    remarks: list[str] = field(default_factory=list)


def export(
    inputs: Sequence[str], output: str, options: ExportOptions, *, progress: Progress | None = None
) -> ExportResult:
    """Writes training shards (schemas/training.md) as what a trainer takes in.

    Args:
        inputs: folders, files, globs of training shards.
        output: a folder that is not there yet, or is empty, or holds an earlier export (`overwrite`).
        options: settings.
        progress: who watches.

    Raises:
        AuditError: see `errors`; then nothing is under the output's name that was not there before.
    """
    watch, target = progress or Silent(), load_target(options.target)
    shards = _training_shards(inputs, options, watch)
    info = _info(shards)
    final = Path(output)
    _check_output(final, options.overwrite)
    watch.start(sum(shard.num_tokens for shard in shards))
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        remarks = target.write(_batches(shards, watch), temporary, info)
        publish_text(temporary / EXPORT_FILE, _about(options.target, info, remarks))
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        _replace(temporary, final)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", place=output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ExportResult(info, remarks)


def _about(target: str, info: ExportInfo, remarks: Sequence[str]) -> str:
    """What lies beside the exported files."""
    numbers = {"target": target, "n_total": info.n_total, "n_kept": info.n_kept, "factor": info.factor}
    return json.dumps({**numbers, "criteria": info.criteria, "remarks": remarks}, indent=1) + "\n"


def _training_shards(inputs: Sequence[str], options: ExportOptions, watch: Progress) -> list[Shard]:
    found = find_shards(inputs, "training")
    if found.bad:
        raise found.bad[0]
    for path, reason in found.passed_over:
        watch.note(f"{path} is passed over: {reason}")
    if not options.allow_partial:
        check_finished(found.shards)
    return found.shards


def _info(shards: Sequence[Shard]) -> ExportInfo:
    counts = [shard.json(schema.COUNTS) for shard in shards]
    for shard, each in zip(shards, counts, strict=True):
        if not {"n_total", "n_kept"} <= set(each):
            raise BadInput(
                "its footer does not say n_total and n_kept",
                place=str(shard.path),
                next_step="Run trm-audit filter again: without N the trainer's mean cannot be right.",
            )
    n_total, n_kept = (sum(int(str(each[name])) for each in counts) for name in ("n_total", "n_kept"))
    return ExportInfo(n_total, n_kept, sum(shard.num_rows for shard in shards), tuple(_criteria(shards)))


def _criteria(shards: Sequence[Shard]) -> list[str]:
    """What was decided by, in words, of the first shard; empty where its footer does not say."""
    stated = shards[0].json(schema.FILTER).get("criteria")
    try:
        return describe(Criteria.from_json(json.dumps(stated)), grades_in(shards)) if stated else []
    except AuditError:
        return []


def _check_output(final: Path, overwrite: bool) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not (final / EXPORT_FILE).is_file():
        raise BadInput(
            "is there and was not written by trm-audit export", place=str(final), next_step="Give another -o."
        )
    if not overwrite:
        raise UsageError("holds an export", place=str(final), next_step="Use --overwrite, or another -o.")


def _replace(temporary: Path, final: Path) -> None:
    """Puts a folder in the place of an older one, which goes only when the new one is there."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _batches(shards: Sequence[Shard], watch: Progress) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
            yield batch
            if "response_ids" in batch.schema.names:
                watch.advance(len(batch.column("response_ids").flatten()))
