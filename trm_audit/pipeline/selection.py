"""Which rows a run is about: names seen twice, `--sample`, `--limit`, and what identifies the input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.errors import BadInput
from trm_audit.numerics.ragged import Bools
from trm_audit.shards import schema
from trm_audit.shards.read import Shard, read_batches

WHOLE_FILE = 256 << 20
PIECES, PIECE = 64, 1 << 16
KNOWN_FILES = 1 << 14


@dataclass
class Selection:
    """Rows of a run.

    Attributes:
        rows: shard name -> number of selected rows; a shard without any is not there.
        duplicates: ids that occur more than once -> (file, row) of the first.
        sample: share of groups that is taken, 1 for all.
        bad: errors of shards whose ids cannot be read; they are not in `rows`.
    """

    rows: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, tuple[str, int]] = field(default_factory=dict)
    sample: float = 1.0
    bad: list[BadInput] = field(default_factory=list)


def select(shards: Sequence[Shard], renames: Mapping[str, str], sample: float, limit: int | None) -> Selection:
    """Looks at the ids of all shards.

    Args:
        shards: in order.
        renames: ours -> theirs.
        sample: share to take, decided by a hash of `group_id` (of `rollout_id` without one), so that groups stay
            whole and every run takes the same.
        limit: at most so many rows, in order.
    """
    out = Selection(sample=sample)
    first: dict[int, tuple[str, int]] = {}
    left = limit if limit is not None else sum(shard.num_rows for shard in shards)
    for shard in shards:
        try:
            taken = _look_at(shard, renames, sample, first, out.duplicates)
        except BadInput as error:
            out.bad.append(error)
            continue
        if min(taken, left) > 0 or (shard.num_rows == 0 and left > 0):
            out.rows[shard.name] = min(taken, left)
        left -= min(taken, left)
    return out


def _look_at(
    shard: Shard,
    renames: Mapping[str, str],
    sample: float,
    first: dict[int, tuple[str, int]],
    duplicates: dict[str, tuple[str, int]],
) -> int:
    """Rows of a shard that the sample takes. Notes where each name (its hash) was first, and names that come again."""
    taken = row = 0
    for batch in _names(shard, renames, sample):
        for at, name in enumerate(batch.column("rollout_id").to_pylist(), start=row):
            place = (str(shard.path), at)
            if name is not None and first.setdefault(hash(str(name)), place) != place:
                duplicates.setdefault(str(name), first[hash(str(name))])
        row += batch.num_rows
        taken += int(sampled(sample_column(batch), sample).sum())
    return taken


def _names(shard: Shard, renames: Mapping[str, str], sample: float) -> Iterator[pa.RecordBatch]:
    """The columns that `select` looks at, under our names."""
    there = _column_names(shard)
    wanted = {
        renames.get(name, name): name for name in ("rollout_id", "group_id") if sample < 1 or name == "rollout_id"
    }
    columns = [theirs for theirs in wanted if theirs in there]
    if renames.get("rollout_id", "rollout_id") not in columns:
        raise BadInput(
            "column 'rollout_id' is missing",
            place=str(shard.path),
            next_step=f"--column rollout_id=THEIRS renames one of: {', '.join(there)} (schemas/rollout.md).",
        )
    for batch in read_batches(shard.path, batch_rows=65536, columns=columns):
        yield batch.rename_columns([wanted[theirs] for theirs in batch.schema.names])


def _column_names(shard: Shard) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(shard.path).names)


def sampled(names: pa.Array, sample: float) -> Bools:
    """Which rows a sample takes, by a hash of their names: [rows]."""
    if sample >= 1:
        return np.ones(len(names), dtype=np.bool_)
    bound = int(sample * 2**64)
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names.to_pylist())
    return np.array([int.from_bytes(digest, "little") < bound for digest in digests], dtype=np.bool_)


def sample_column(batch: pa.RecordBatch) -> pa.Array:
    """What `--sample` looks at: the group, or the rollout where it has none."""
    ids = pc.cast(batch.column("rollout_id"), pa.string())
    return pc.coalesce(pc.cast(batch.column("group_id"), pa.string()), ids) if "group_id" in batch.schema.names else ids


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_digest(files: Sequence[Path]) -> str:
    """SHA-256 over the content of some files.

    Files above 256 MB (full logits run to terabytes) are told apart by their size, their ends and 64 pieces between,
    which is what a rewrite changes; damage inside is what page checksums are for. A side file that many shards share
    is read once, until its size or time changes.
    """
    total = hashlib.sha256()
    for file in files:
        found = file.stat()
        total.update(_file_digest(file, found.st_size, found.st_mtime_ns))
    return total.hexdigest()


@lru_cache(maxsize=KNOWN_FILES)
def _file_digest(file: Path, size: int, mtime_ns: int) -> bytes:
    with open(file, "rb") as handle:
        if size <= WHOLE_FILE:
            return hashlib.file_digest(handle, "sha256").digest()
        total = hashlib.sha256(str(size).encode())
        for i in range(PIECES + 1):
            handle.seek((size - PIECE) * i // PIECES)
            total.update(handle.read(PIECE))
    return total.digest()


def shard_fingerprint(run: str, shard: Shard, rows: int) -> str:
    """Identifies one shard of a run: the run, the shard's content, how many of its rows are taken."""
    return digest([run, content_digest([shard.path, *shard.logits]), rows, schema.SCHEMA_VERSION])
