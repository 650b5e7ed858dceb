"""What every exporter starts from: the rows of training shards, checked.

    rows = TrainingRows(batches, must=("advantage",))
    for row in rows: ...

A rejected row keeps its place. What a trainer needs of a row that it trains on has to be there; of a rejected row it
may be missing, and zeros stand in that nothing reads. The gradient of the masked objective divides by N, the number of
all sequences; how a trainer is brought to do that is the business of each target (`Reject`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trm_audit.adapters.base import ExportInfo
from trm_audit.errors import BadInput, UsageError

EXPORT = b"trm_audit.export"
ROLLOUTS_FILE = "rollouts.parquet"
SLICE_ROWS = 64
LOGPROBS = ("rollout_logprobs", "trainer_logprobs")
NUMBERS = ("advantage", "reward")
INTS, FLOATS, FLAGS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())
STEPS = {
    "advantage": "trm-audit filter fills it from reward and group_id (--advantage auto).",
    "reward": "Store the reward of each rollout.",
    "rollout_logprobs": "Store the log-probability of each sampled token, and score and filter again.",
    "trainer_logprobs": "Score the rollouts with trm-audit score, and filter again.",
}

Reject = Literal["mask", "advantage"]
"""How a rejected sequence is taken out of a loss: by zeros in its mask, which is right where masked sequences count in
the denominator; or by an advantage of 0 under the mask of the sampled tokens, which every denominator counts, but which
terms without an advantage (a KL penalty, an entropy bonus) still see."""


@dataclass(frozen=True)
class TrainingRow:
    """One row of a training shard, as Python values.

    Attributes:
        prompt, response: token ids.
        policy_mask, loss_mask: [response tokens] what the policy sampled, and where to train.
        rollout_logprobs, trainer_logprobs: [response tokens], 0.0 outside `policy_mask`; None where no row has them.
        advantage: 0.0 where a rejected row has none; None where no row has one.
        reward: as stored.
        columns: every column of the row.
    """

    rollout_id: str
    group_id: str | None
    prompt: list[int]
    response: list[int]
    policy_mask: list[bool]
    loss_mask: list[bool]
    keep: bool
    rollout_logprobs: list[float] | None
    trainer_logprobs: list[float] | None
    advantage: float | None
    reward: float | None
    columns: Mapping[str, Any]

    def spread(self, values: Sequence[float] | float | None) -> list[float]:
        """Values of the response, or one for all of it, at every token of the sequence, 0.0 on the prompt."""
        each = values if isinstance(values, Sequence) else [values or 0.0] * len(self.response)
        return [0.0] * len(self.prompt) + list(each)

    def flags(self, mask: Sequence[bool]) -> list[bool]:
        """A mask of the response at every token of the sequence, False on the prompt."""
        return [False] * len(self.prompt) + list(mask)


class TrainingRows:
    """Iterates once over the rows of training shards.

    Args:
        batches: of training shards (schemas/training.md).
        must: columns that the target cannot do without.

    Attributes:
        there: which of `rollout_logprobs`, `trainer_logprobs`, `advantage`, `reward` the rows have. Log-probabilities
            that are there, and what the target must have, are needed of every kept row.
        groups: group -> its rows so far.

    Raises:
        BadInput: there are no rows, a column is missing, or null at a kept row (while iterating).
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], must: Sequence[str] = ()) -> None:
        first = next((batch for batch in batches if batch.num_rows), None)
        if first is None:
            raise BadInput("the training shards have no rows", next_step="Look at what trm-audit filter was given.")
        names = set(first.schema.names)
        for name in ("prompt_ids", "response_ids", "loss_mask", *must):
            if name not in names:
                step = STEPS.get(name, "The scores held statistics alone; filter scores that carry the rollouts.")
                raise BadInput(f"the training shards have no column {name!r}", next_step=step)
        self.there = frozenset(name for name in (*LOGPROBS, *NUMBERS) if name in names)
        self.groups: dict[str | None, int] = {}
        self._needed = {*must, *(name for name in LOGPROBS if name in names)}
        self._batches = chain([first], batches)

    def __iter__(self) -> Iterator[TrainingRow]:
        for batch in self._batches:
            for at in range(0, batch.num_rows, SLICE_ROWS):
                for columns in batch.slice(at, SLICE_ROWS).to_pylist():
                    row = self._row(columns)
                    self.groups[row.group_id] = self.groups.get(row.group_id, 0) + 1
                    yield row

    def _row(self, columns: dict[str, Any]) -> TrainingRow:
        missing = next((name for name in self._needed if columns.get(name) is None), None)
        if missing is not None and columns["keep"]:
            place = f"rollout_id={columns['rollout_id']}"
            raise BadInput(f"{missing} is null, and the row is kept", place=place, next_step=STEPS[missing])
        nothing = [0.0] * len(columns["response_ids"])
        logprobs = {name: (columns.get(name) or nothing) if name in self.there else None for name in LOGPROBS}
        return TrainingRow(
            rollout_id=columns["rollout_id"],
            group_id=columns.get("group_id"),
            prompt=columns["prompt_ids"],
            response=columns["response_ids"],
            policy_mask=columns["response_mask"],
            loss_mask=columns["loss_mask"],
            keep=bool(columns["keep"]),
            advantage=(columns["advantage"] or 0.0) if "advantage" in self.there else None,
            reward=columns.get("reward"),
            columns=columns,
            **logprobs,
        )


def write_parquet(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType], file: Path, info: ExportInfo | None = None
) -> None:
    """Rows as a Parquet file. With `info`, the footer says how many sequences were judged, kept, and are there."""
    counts = json.dumps({name: getattr(info, name) for name in ("n_total", "n_kept", "num_rows")}) if info else None
    schema = pa.schema(list(columns.items()), metadata={EXPORT: counts} if counts else None)
    them = iter(rows)
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        while some := list(islice(them, 16 * SLICE_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(some, schema=schema))


def open_export(folder: str | os.PathLike[str]) -> tuple[pq.ParquetFile, ExportInfo]:
    """The exported rows, and how many sequences were judged, kept, and are there.

    Raises:
        BadInput: the folder holds no such export.
    """
    file = Path(folder) / ROLLOUTS_FILE
    if not file.is_file():
        raise BadInput("is not there", place=str(file), next_step="Give the folder that trm-audit export wrote.")
    opened = pq.ParquetFile(file, page_checksum_verification=True)
    counts = (opened.schema_arrow.metadata or {}).get(EXPORT)
    if counts is None:
        raise BadInput("was not written by trm-audit export", place=str(file))
    return opened, ExportInfo(**json.loads(counts))


def read_export(
    folder: str | os.PathLike[str], start: int = 0, count: int | None = None
) -> tuple[dict[str, list[Any]], ExportInfo]:
    """Columns of `count` rows from `start` on (all of them if None), as lists."""
    opened, info = open_export(folder)
    table = opened.read().slice(start, count)
    if table.num_rows == 0:
        raise UsageError(f"row {start} is beyond the end, there are {info.num_rows} rows", place=str(folder))
    return {name: table.column(name).to_pylist() for name in table.column_names}, info


def padded(
    rows: Sequence[Sequence[float]],
    fill: float,
    kind: type[np.generic],
    *,
    left: bool = False,
    length: int | None = None,
) -> NDArray[Any]:
    """[rows, length] with `fill` after each row, or before it (`left`); the longest row decides without `length`.

    Raises:
        UsageError: a row is longer than `length`; nothing is cut.
    """
    longest = max(map(len, rows), default=0)
    if length is not None and longest > length:
        raise UsageError(f"a sequence has {longest} tokens, {length} are allowed", next_step="Allow more; none is cut.")
    out = np.full((len(rows), longest if length is None else length), fill, dtype=kind)
    for at, row in enumerate(rows):
        if len(row):
            out[at, slice(-len(row), None) if left else slice(len(row))] = row
    return out


def dropped(info: ExportInfo) -> float:
    """n_kept / n_total where rejected rows are missing: what makes a mean over the others one over all N. Else 1."""
    return info.factor if info.num_rows < info.n_total else 1.0


def rejected(info: ExportInfo) -> str:
    """The sentence that every target begins with."""
    gone = f"{info.n_total - info.n_kept} of {info.n_total} sequences"
    if info.num_rows < info.n_total:
        return (
            f"{gone} were rejected and dropped: {info.num_rows} rows are there, and loading multiplies their "
            f"advantages by {info.factor:.6g}. Without --drop batches would be right one by one."
        )
    return f"{gone} are rejected, and keep their place."


def refuse_dropped(info: ExportInfo, target: str) -> None:
    """Raises BadInput if rejected rows are missing and the target has no place for n_kept / n_total."""
    if info.num_rows < info.n_total:
        raise BadInput(
            f"{info.n_total - info.num_rows} of {info.n_total} rows were dropped: {target} would divide by the rest, "
            f"and has no place for the factor {info.factor:.6g}",
            next_step="Run trm-audit filter without --drop, and export that.",
        )
