"""Writing the input format: what a recorder or a script needs to turn its rollouts into a rollout shard.

The table of rollouts goes to one Parquet file (`write_rollout_table`), full logits to a long table beside it
(`LogitsTableWriter`). Both are described in schemas/rollout.md. Logits are checked as they are added; the rows of the
rollout table are not, which is what `trm-audit validate` is for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from trm_audit.errors import BadInput, UsageError
from trm_audit.shards import q16
from trm_audit.shards.schema import KIND, LOGITS, SCHEMA_VERSION, VERSION

BLOCK_POSITIONS = 64
ROW_GROUP_BYTES = 64 * 2**20
"""Row groups of the long table are closed at this size: large enough to stream, small enough to hold."""

Encoding = Literal["float32", "float16", "bfloat16", "q16"]
STORED_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "q16": np.dtype("u1"),  # a row is its three numbers and V codes
}

LOGITS_SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("start", pa.int32()),
        ("count", pa.int32()),
        ("vocab_size", pa.int32()),
        ("encoding", pa.string()),
        ("data", pa.large_binary()),
    ],
    metadata={KIND: "logits", VERSION: SCHEMA_VERSION},
)
SMALL_COLUMNS = [name for name in LOGITS_SCHEMA.names if name != "data"]


def write_rollout_table(path: str | os.PathLike[str], table: pa.Table, *, logits: Sequence[str] = ()) -> None:
    """Write `table`, one row per rollout, as a rollout shard with its footer and page checksums.

    Args:
        path: the file; its folder exists.
        table: columns of schemas/rollout.md and any others; metadata of its schema is kept.
        logits: paths of the files with full logits, relative to the shard's folder. Left empty, readers take every
            `logits-*` file of that folder.
    """
    footer = {KIND: "rollouts", VERSION: SCHEMA_VERSION}
    if logits:
        footer[LOGITS] = json.dumps(list(logits))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **footer})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


class LogitsTableWriter:
    """Context manager that writes full logits as the long table of schemas/rollout.md, in bounded memory.

    The file appears under its name when the block ends without an exception; until then it is `<name>.partial`.

        with LogitsTableWriter("rollouts/logits-00000.parquet") as writer:
            writer.add("sum-07/s2", logits)  # numpy [T, V]

    Args:
        path: the file, to be called `logits-*.parquet`.
        encoding: how values are stored. `q16` takes two bytes a value, as halves do, and loses less.
            For `float16`, subtract each row's maximum first: halves are finest near 0.
        row_group_bytes: a row group is closed once it holds this many bytes of logits.
    """

    def __init__(
        self, path: str | os.PathLike[str], encoding: Encoding = "float16", *, row_group_bytes: int = ROW_GROUP_BYTES
    ) -> None:
        if encoding not in STORED_AS:
            raise UsageError(f"unknown encoding {encoding!r}", next_step=f"Use one of {', '.join(STORED_AS)}.")
        self.path = Path(path)
        self.encoding = encoding
        self._row_group_bytes = row_group_bytes
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._added: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> LogitsTableWriter:
        self._writer = pq.ParquetWriter(
            self._partial,
            LOGITS_SCHEMA,
            compression={name: "zstd" if name in SMALL_COLUMNS else "none" for name in LOGITS_SCHEMA.names},
            use_dictionary=SMALL_COLUMNS,
            write_statistics=SMALL_COLUMNS,
            write_page_checksum=True,
        )
        return self

    def add(self, rollout_id: str, logits: NDArray[Any], *, start: int = 0) -> None:
        """Append logits of one rollout, all at once or in pieces; a response without tokens adds nothing.

        Args:
            rollout_id: names the rollout; once per file.
            logits: [T, V], row t the distribution that `response_ids[start + t]` was drawn from. float32 or float16
                values; for the encoding `bfloat16`, bit patterns as uint16; `q16` takes any of these.
            start: response position of the first row; pieces of a long response follow one another without a gap.

        Raises:
            BadInput: the rollout was added before, a piece does not follow the one before it, the shape or type does
                not fit, rule 11 forbids a value, or the values of a row span more than q16 holds.
        """
        if self._writer is None:
            raise UsageError("LogitsTableWriter is used outside its with block")
        place = f"{self.path.name} (rollout_id={rollout_id})"
        if start == 0 and rollout_id in self._added:
            raise BadInput("logits of this rollout were added before", place=place, next_step="Add each rollout once.")
        if start != self._added.get(rollout_id, 0):
            raise BadInput(f"a piece begins at {start}, {self._added.get(rollout_id, 0)} is next", place=place)
        stored = _encode(logits, self.encoding, place)
        self._added[rollout_id] = start + len(stored)
        for at in range(0, len(stored), BLOCK_POSITIONS):
            self._append(rollout_id, start + at, logits.shape[1], stored[at : at + BLOCK_POSITIONS])

    def _append(self, rollout_id: str, start: int, vocab_size: int, block: NDArray[Any]) -> None:
        data = block.tobytes()
        self._rows.append(
            {
                "rollout_id": rollout_id,
                "start": start,
                "count": len(block),
                "vocab_size": vocab_size,
                "encoding": self.encoding,
                "data": data,
            }
        )
        self._bytes += len(data)
        if self._bytes >= self._row_group_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows and self._writer is not None:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=LOGITS_SCHEMA))
        self._rows, self._bytes = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if kind is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


ACCEPTED = {"float32": ("float32", "float16"), "bfloat16": ("uint16",), "q16": ("float32", "float16", "uint16")}
"""Types of values that are stored so; uint16 are bit patterns of bfloat16."""


def _encode(logits: NDArray[Any], encoding: str, place: str) -> NDArray[Any]:
    """[T, V] values as they are stored, little-endian, checked against rule 11."""
    accepted = ACCEPTED.get(encoding, ACCEPTED["float32"])
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype.name not in accepted:
        raise BadInput(
            f"logits are {logits.dtype}{list(logits.shape)}, {encoding} is written from [T, V] {' or '.join(accepted)}",
            place=place,
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(logits, dtype=logits.dtype if encoding == "q16" else STORED_AS[encoding])
    values = (stored.astype(np.uint32) << 16).view(np.float32) if logits.dtype == np.uint16 else stored
    bad = np.flatnonzero(~(values < np.inf).all(axis=1) | (values == -np.inf).all(axis=1))
    if len(bad):
        raise BadInput(
            f"position {bad[0]} holds NaN or +inf (after rounding to {encoding}), or -inf throughout",
            place=place,
            next_step="Store finite logits; -inf alone means a probability of 0 (schemas/rollout.md, rule 11).",
        )
    if encoding == "float16" and bool((np.isneginf(values) & ~np.isneginf(logits)).any()):
        raise BadInput(
            "a finite logit below -65504 would become -inf in float16", place=place, next_step='Use encoding="float32".'
        )
    return q16.encode(values, place) if encoding == "q16" else stored
