"""Advantages from rewards: reward minus the mean reward of the group, or of the data set without groups.

The mean needs every row of a group before the first can be written. Files are read twice; a stream has to bring the
rows of a group one after another, and is held back a group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from trm_audit.errors import UsageError
from trm_audit.numerics.ragged import Floats


class Baselines:
    """Mean reward by group, summed up batch by batch. Rows without a reward do not count.

    The baseline of a row without a group is the mean of the whole data set.
    """

    def __init__(self) -> None:
        self._sums: dict[object, tuple[float, int]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds the rewards of a batch with `reward` and perhaps `group_id`."""
        table = pa.table({"group": _groups(batch), "reward": batch.column("reward")})
        sums = table.group_by("group").aggregate([("reward", "sum"), ("reward", "count")])
        for group, total, count in zip(*(sums.column(i).to_pylist() for i in range(3)), strict=True):
            if count:
                before = self._sums.get(group, (0.0, 0))
                self._sums[group] = (before[0] + total, before[1] + count)

    def advantages(self, batch: pa.RecordBatch) -> Floats:
        """[rows] float64, NaN where the row has no reward."""
        nothing = (np.nan, 1)
        whole = sum(total for total, _ in self._sums.values()), max(1, sum(count for _, count in self._sums.values()))
        sums = [whole if group is None else self._sums.get(group, nothing) for group in _groups(batch).to_pylist()]
        baseline = np.array([total / count for total, count in sums], dtype=np.float64)
        return np.asarray(batch.column("reward").to_numpy(zero_copy_only=False), dtype=np.float64) - baseline


def _groups(batch: pa.RecordBatch) -> pa.Array:
    return batch.column("group_id") if "group_id" in batch.schema.names else pa.nulls(batch.num_rows, pa.string())


def whole_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The rows of a stream, cut so that no group is divided between two batches.

    Raises:
        UsageError: rows have no group, or one comes back after it ended.
    """
    held: pa.Table | None = None
    closed: set[int] = set()
    for batch in batches:
        if "group_id" not in batch.schema.names or batch.column("group_id").null_count:
            raise UsageError(
                "advantages need the mean reward of the data set, which a stream does not tell before its end",
                next_step="Use --advantage none, or filter files.",
            )
        table = pa.Table.from_batches([batch])
        held = table if held is None else pa.concat_tables([held, table])
        names = held.column("group_id").to_pylist()
        changes = [i for i in range(1, len(names)) if names[i] != names[i - 1]]
        if changes:
            _close(names[: changes[-1]], closed, names[changes[-1]])
            yield from held.slice(0, changes[-1]).combine_chunks().to_batches()
            held = held.slice(changes[-1])
    if held is not None:
        last = held.combine_chunks().to_batches()
        yield from last or [pa.RecordBatch.from_pylist([], schema=held.schema)]


def _close(names: list[str | None], closed: set[int], following: str | None) -> None:
    """Notes that the groups of some rows have ended."""
    for i, name in enumerate(names):
        if i and name == names[i - 1]:
            continue
        _refuse_again(name, closed)
        closed.add(hash(name))
    _refuse_again(following, closed)


def _refuse_again(name: str | None, closed: set[int]) -> None:
    if hash(name) in closed:
        raise UsageError(
            f"group {name!r} comes back after other groups: in a stream the rows of a group have to follow each other",
            next_step="Use --advantage none, sort by group_id, or filter files, which are read twice.",
        )
