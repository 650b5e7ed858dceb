"""miles: the columns that it writes for its dashboard (Parquet), and the `.pt` files that it shares with slime.

    sample_index, response_length, total_length, tokens list<i32>, loss_mask list<i8>, rollout_log_probs list<f32>

One row per sample, in `dashboard_columns/rollout_N.parquet` beside the `.pt` of `--save-debug-rollout-data`. There is
no reward and no group in it: the `.pt` has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit.adapters import slime
from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import need
from trm_audit.errors import BadInput

COLUMNS = ("tokens", "sample_index", "response_length", "loss_mask", "rollout_log_probs")
ROWS_AT_ONCE = 64


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of one `.parquet` or `.pt`, in its order.

    Raises:
        BadInput: the file has other columns, or text without token ids.
    """
    if path.suffix == ".pt":
        yield from slime.read(path, given)
        return
    try:
        with pq.ParquetFile(path) as file:
            need(file.schema_arrow.names, COLUMNS, str(path), SOURCE.about, slime.IDS)
            yield from _rows(file, path, given)
    except pa.ArrowException as error:
        raise BadInput(f"cannot be read as Parquet: {error}", place=str(path)) from error


def _rows(file: pq.ParquetFile, path: Path, given: Given) -> Iterator[Row]:
    """The samples under the names that they have in the `.pt`, read as those are."""
    times: dict[object, int] = {}
    at = 0
    stem = path.stem.removeprefix("rollout_")
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS)):
        for sample in batch.to_pylist():
            name = slime.name_of(stem, sample["sample_index"], at, times)
            row = slime.sampled(sample, stem, f"{path}, sample {at}", given)
            at += 1
            yield {"rollout_id": name, **{key: value for key, value in row.items() if key not in ABSENT}}


ABSENT = ("group_id", "reward", "policy_version", "weight_versions", "finish_reason", "routed_experts")

SOURCE = Source(
    name="miles",
    about="miles' dashboard_columns/*.parquet, and the .pt that it shares with slime",
    suffixes=(".parquet", ".pt"),
    grade="sampled",
    switch_on="--save-debug-rollout-data PATH (with miles[dashboard] installed it writes the Parquet too)",
    read=read,
)
