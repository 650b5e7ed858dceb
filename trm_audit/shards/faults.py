"""The columns of some rows while they are checked, and what was found wrong with which row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pyarrow as pa

from trm_audit.errors import RowError
from trm_audit.numerics.ragged import Ints


class Rows:
    """Columns of one batch, faults by row. The first fault of a row is the one that counts."""

    def __init__(self, columns: pa.RecordBatch, shard: str, row_numbers: Ints) -> None:
        self.columns, self.shard, self.row_numbers = columns, shard, row_numbers
        self.faults: dict[int, RowError] = {}

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def column(self, name: str) -> pa.Array | None:
        return self.columns.column(name) if name in self.columns.schema.names else None

    def place(self, row: int) -> str:
        name = self.columns.column("rollout_id")[row].as_py()
        return f"{self.shard}, row {self.row_numbers[row]} (rollout_id={name})"

    def fault(self, rows: Iterable[int], cause: str | Mapping[int, str], next_step: str) -> None:
        """Notes what is wrong with some rows: one cause for all, or each its own."""
        for row in map(int, rows):
            if row not in self.faults:
                text = cause if isinstance(cause, str) else cause[row]
                self.faults[row] = RowError(text, place=self.place(row), next_step=next_step)
