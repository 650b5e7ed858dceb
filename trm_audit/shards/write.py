"""Writing shards: one interface for a Parquet file and an Arrow stream; a stage does not know where its output goes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit.errors import BadInput, OutputError
from trm_audit.shards import schema
from trm_audit.shards.read import LAST, TOTAL_ROWS

Metadata = Mapping[bytes, bytes]
GROUP_ROWS, GROUP_BYTES = 8192, 64 << 20  # a row group of the output ends at either


class Sink(Protocol):
    """Where a stage puts its batches."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends rows; the first batch fixes the schema."""

    def close(self, counts: Mapping[str, object]) -> None:
        """Ends the output with what is known only now."""


def head(kind: schema.Kind, **values: object) -> dict[bytes, bytes]:
    """Footer or stream metadata: the kind, the version, and `trm_audit.<name>` for each value (JSON if no string)."""
    out = {schema.KIND: kind.encode(), schema.VERSION: schema.SCHEMA_VERSION.encode()}
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        out[b"trm_audit." + name.encode()] = text.encode()
    return out


class ParquetSink:
    """A Parquet file with page checksums; the footer's keys are written when it is closed.

    Args:
        path: written in place; publishing it whole is the business of `shards.publish`.
        metadata: footer keys.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self._metadata, self.rows = dict(metadata), 0
        self._pending: list[pa.RecordBatch] = []
        self._writer: pq.ParquetWriter | None = None
        self._file = open(path, "wb")  # noqa: SIM115 - closed in close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._pending.append(batch)
        self.rows += batch.num_rows
        rows, size = sum(b.num_rows for b in self._pending), sum(b.nbytes for b in self._pending)
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._pending) if self._pending else pa.table({})
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._file, table.schema.remove_metadata(), compression="zstd", write_page_checksum=True
            )
        self._writer.write_table(table)
        self._pending = []

    def close(self, counts: Mapping[str, object]) -> None:
        if self._pending or self._writer is None:
            self._flush()
        assert self._writer is not None
        self._writer.add_key_value_metadata({**self._metadata, schema.COUNTS: json.dumps(counts, sort_keys=True)})
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        """Closes the file, without a footer if `close` was not reached."""
        if self._writer is not None and self._writer.is_open:
            with suppress(OSError, pa.ArrowException):
                self._writer.close()
        self._file.close()


class StreamSink:
    """An Arrow IPC stream that ends with the trailer of schemas/stream.md."""

    def __init__(self, target: BinaryIO, metadata: Metadata) -> None:
        self._target, self._metadata = target, dict(metadata)
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None
        self._schema = pa.schema([])
        self._rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            self._start(batch.schema)
        assert self._writer is not None
        if not batch.schema.equals(self._schema):
            raise BadInput(
                f"a stream has one schema, and a shard differs: {_difference(batch.schema, self._schema)}",
                place="-o -",
                next_step="Write to a folder, where each shard keeps its columns.",
            )
        with _piping():
            self._writer.write_batch(batch.replace_schema_metadata(self._metadata))
        self._rows += batch.num_rows

    def close(self, counts: Mapping[str, object]) -> None:
        if self._writer is None:
            self._start(pa.schema([]))
        assert self._writer is not None
        trailer = {LAST: b"true", TOTAL_ROWS: str(self._rows).encode(), schema.COUNTS: json.dumps(counts).encode()}
        empty = pa.RecordBatch.from_pylist([], schema=self._schema)
        with _piping():
            self._writer.write_batch(empty, custom_metadata=trailer)
            self._writer.close()
            self._target.flush()

    def _start(self, columns: pa.Schema) -> None:
        self._schema = columns.with_metadata(self._metadata)
        with _piping():
            self._writer = pa.ipc.new_stream(self._target, self._schema)


@contextmanager
def _piping() -> Iterator[None]:
    """A block whose OSErrors become an OutputError, but for the pipe that its reader has closed, which is no error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"the stream cannot be written ({error.strerror or error})",
            place="-o -",
            next_step="Make room, or write to a folder.",
        ) from error


def _difference(found: pa.Schema, first: pa.Schema) -> str:
    for name in dict.fromkeys([*found.names, *first.names]):
        mine, theirs = (s.field(name).type if name in s.names else "not there" for s in (found, first))
        if mine != theirs:
            return f"{name} is {mine}, was {theirs}"
    return "they come in another order"
