"""What filter and report share: score shards of finished runs, the grades in them, and verdicts on their batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trm_audit.criteria.thresholds import Criteria, needed_columns
from trm_audit.criteria.verdicts import Verdicts, decide
from trm_audit.errors import BadInput, UsageError
from trm_audit.shards import schema
from trm_audit.shards.read import Found, Shard, find_shards, read_batches

DECIDING = ("grade", "num_tokens")
"""Columns that every verdict needs."""


def find_score_shards(inputs: Sequence[str], allow_partial: bool) -> Found:
    """Score shards of finished runs.

    Raises:
        BadInput: a shard cannot be read, a run is not finished, or the shards are of several models.
    """
    found = find_shards(inputs, "scores")
    if found.bad:
        raise found.bad[0]
    if not allow_partial:
        check_finished(found.shards)
    leave_out_strangers(found)
    models = {str(shard.json(schema.RUN).get("model_hash")) for shard in found.shards}
    if len(models) > 1:
        raise BadInput(
            f"the shards were scored with {len(models)} different models",
            place=", ".join(inputs),
            next_step="A verdict is about one model: filter them apart.",
        )
    return found


def check_finished(shards: Sequence[Shard]) -> None:
    """Raises BadInput where a shard lies in the folder of a run that has not finished."""
    for folder in dict.fromkeys(shard.path.parent.parent for shard in shards if shard.path.parent.name == "data"):
        if (folder / "run.json").is_file() and not (folder / "_SUCCESS").is_file():
            raise BadInput(
                "its run is not finished (no _SUCCESS)",
                place=str(folder),
                next_step="Run the command that writes it again, it goes on where it was; "
                "--allow-partial takes what is there.",
            )


def leave_out_strangers(found: Found) -> None:
    """Passes over shards of input that is gone since: they lie in the folder and are not of the finished run."""
    for shard in tuple(found.shards):
        success = shard.path.parent.parent / "_SUCCESS"
        if shard.path.parent.name != "data" or not success.is_file():
            continue
        if shard.path.name not in json.loads(success.read_text("utf-8")).get("shards", [shard.path.name]):
            found.shards.remove(shard)
            found.passed_over.append((shard.path, "what it was made of is not among the finished run's input"))


def grades_of(batch: pa.RecordBatch) -> set[str]:
    """Grades of the rows that have policy tokens."""
    counted = pc.greater(batch.column("num_tokens"), 0)
    return set(pc.unique(batch.column("grade").filter(counted)).to_pylist())


def grades_in(shards: Sequence[Shard]) -> set[str]:
    """Grades of the rows that have policy tokens, over several shards."""
    columns = list(DECIDING)
    batches = (batch for shard in shards for batch in read_batches(shard.path, batch_rows=65536, columns=columns))
    return set().union(*(grades_of(batch) for batch in batches))


def judge(batch: pa.RecordBatch, criteria: Criteria, place: str = "-") -> Verdicts:
    """Verdicts on a batch of a score shard.

    Raises:
        UsageError: the criteria do not fit the grades, or name columns that are not there.
        BadInput: a column is missing.
    """
    names = needed_columns(criteria, grades_of(batch), set(batch.schema.names))

    def row_place(row: int) -> str:
        name = batch.column("rollout_id")[row].as_py() if "rollout_id" in batch.schema.names else row
        return f"{place}, rollout_id={name}"

    return decide(criteria, {name: _numbers(batch, name) for name in names}, row_place)


def _numbers(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    column = batch.column(name)
    if name == "grade":
        return np.asarray(column.to_pylist(), dtype=object)
    try:
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UsageError(f"column {name} is {column.type}, a number is needed", place="--keep") from None
