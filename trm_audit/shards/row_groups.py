"""The column `data` of long tables (schemas/rollout.md), row group by row group, in bounded memory.

A row group is read whole and kept for the rows that are asked for next: at 64 to 256 MB it is what a disk likes, and
inside it Arrow cannot jump. A writer may have put everything into one row group, though; one that would fill the memory
by itself is streamed, and only the rows last passed are kept. (Arrow holds a compressed page, or a dictionary, whole:
such a file takes what its pages take.)

The file is memory-mapped while a row group is read, and not after: reading copies every value once, out of the page
cache into Arrow's memory, in the thread that reads, with the interpreter's lock released. Ordinary reads put a second
copy between the two, of a page, which may be the whole row group, and were slower by 10 to 40 % here. Most of the time
goes into the page checksum (1 GB/s a core with it, 3 without), which is why several threads may read at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit.errors import BadInput
from trm_audit.shards.read import ARROW_ERRORS, open_parquet

STREAMED_AT_ONCE = 16 << 20
"""Values decoded at once where a row group is streamed, if a row is not larger."""

Key = tuple[Path, int]


class Group(Protocol):
    """A row group that is being used: `num_bytes` is what it holds in memory, at most."""

    num_bytes: int

    def data(self, row: int) -> pa.Buffer | None:
        """`data` of one row of the group, None if it is null."""


class RowGroups:
    """Row groups of any number of files. May be used from several threads at once.

    Args:
        max_bytes: row groups are let go, least recently used first, above this; one is always kept. Groups that are
            being read come on top.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._lock = max_bytes, Lock()
        self._groups: OrderedDict[Key, Future[Group]] = OrderedDict()

    def data(self, file: Path, row_group: int, row: int) -> pa.Buffer | None:
        """`data` of one row, None if it is null. The buffer is Arrow's, not to be written to.

        Raises:
            BadInput: the row group is damaged.
        """
        return self._future((file, row_group), None).result().data(row)

    def read_soon(self, file: Path, row_group: int, submit: Callable[[Callable[[], Group]], Future[Group]]) -> None:
        """Begins to read a row group in another thread, unless it is there. `submit` is what an executor has."""
        self._future((file, row_group), submit)

    def num_bytes(self) -> int:
        """Memory held by row groups."""
        with self._lock:
            return sum(_size(future) for future in self._groups.values())

    def _future(self, key: Key, submit: Callable[[Callable[[], Group]], Future[Group]] | None) -> Future[Group]:
        """The row group, read by `submit`'s thread or by this one; a reading that failed is tried again."""
        with self._lock:
            known = self._groups.get(key)
            if known is not None and not _failed(known):
                self._groups.move_to_end(key)
                return known
            future: Future[Group] = submit(lambda: self._read(key)) if submit is not None else Future()
            self._groups[key] = future
        if submit is None:
            try:
                future.set_result(self._read(key))
            except BaseException as error:  # Ctrl-C too: another thread may wait for it
                future.set_exception(error)
        return future

    def _read(self, key: Key) -> Group:
        group = _open(*key, self._max_bytes // 2)
        with self._lock:
            used = group.num_bytes + sum(_size(future) for future in self._groups.values())
            for other in [other for other, future in self._groups.items() if _size(future)]:
                if used <= self._max_bytes:
                    break
                used -= _size(self._groups.pop(other))
        return group


def _failed(future: Future[Group]) -> bool:
    return future.cancelled() or (future.done() and future.exception() is not None)


def _size(future: Future[Group]) -> int:
    return future.result().num_bytes if future.done() and not _failed(future) else 0


def _open(file: Path, row_group: int, max_bytes: int) -> Group:
    table = open_parquet(file)
    about = table.metadata.row_group(row_group)
    size = next(c.total_uncompressed_size for c in map(about.column, range(about.num_columns)) if _is_data(c))
    if size > max_bytes:
        at_once = min(STREAMED_AT_ONCE, max_bytes // 4)
        return _Streamed(file, row_group, max_bytes, max(1, at_once * about.num_rows // size))
    try:
        rows = table.read_row_group(row_group, columns=["data"]).column("data")
    except ARROW_ERRORS as error:
        raise _damaged(file, row_group, error) from error
    if len(rows) != about.num_rows:
        raise _damaged(file, row_group, f"{len(rows)} rows, its footer says {about.num_rows}")
    return _Whole(rows)


def _is_data(column: pq.ColumnChunkMetaData) -> bool:
    return bool(column.path_in_schema == "data")


def _damaged(file: Path, row_group: int, what: object) -> BadInput:
    return BadInput(f"row group {row_group} is damaged ({what})", place=str(file))


class _Whole:
    """A row group in memory."""

    def __init__(self, rows: pa.ChunkedArray) -> None:
        self._rows = [value for chunk in rows.chunks for value in _values(chunk)]
        self.num_bytes = max(1, rows.nbytes)

    def data(self, row: int) -> pa.Buffer | None:
        return self._rows[row]


class _Streamed:
    """A row group too large to hold: read forwards, some rows at a time; a row passed long ago starts it again."""

    def __init__(self, file: Path, row_group: int, max_bytes: int, rows_at_once: int) -> None:
        self._file, self._row_group, self.num_bytes, self._rows_at_once = file, row_group, max_bytes, rows_at_once
        self._lock = Lock()
        self._kept: OrderedDict[int, pa.Buffer | None] = OrderedDict()
        self._kept_bytes = self._next = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def data(self, row: int) -> pa.Buffer | None:
        with self._lock:
            if row not in self._kept and (row < self._next or self._next == 0):
                self._begin()
            while row not in self._kept:
                self._go_on()
            return self._kept[row]

    def _begin(self) -> None:
        self._kept.clear()
        self._kept_bytes = self._next = 0
        table = open_parquet(self._file)
        self._batches = table.iter_batches(
            self._rows_at_once, row_groups=[self._row_group], columns=["data"], use_threads=False
        )

    def _go_on(self) -> None:
        """Reads some more rows and drops the oldest."""
        try:
            batch = next(self._batches, None)
        except ARROW_ERRORS as error:
            raise _damaged(self._file, self._row_group, error) from error
        if batch is None:
            raise _damaged(self._file, self._row_group, f"it ends after {self._next} rows")
        for value in _values(batch.column(0)):
            self._kept[self._next] = value
            self._kept_bytes += _length(value)
            self._next += 1
        while self._kept_bytes > self.num_bytes and len(self._kept) > batch.num_rows:
            self._kept_bytes -= _length(self._kept.popitem(last=False)[1])


def _values(array: pa.Array) -> Iterator[pa.Buffer | None]:
    """Each value's bytes where they lie; an Arrow scalar would be a copy."""
    _, offsets, data = array.buffers()
    width = np.int64 if array.type == pa.large_binary() else np.int32
    ends = np.frombuffer(offsets, width)[array.offset : array.offset + len(array) + 1].tolist()
    for valid, start, stop in zip(array.is_valid().to_pylist(), ends, ends[1:], strict=False):
        yield data.slice(start, stop - start) if valid else None


def _length(buffer: pa.Buffer | None) -> int:
    return 0 if buffer is None else int(buffer.size)
