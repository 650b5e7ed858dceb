"""Finding shards, and reading them batch by batch so that damage is noticed.

Some damaged Parquet files "succeed" with no rows, and a cut Arrow stream looks complete; so rows are counted against
the footer or the trailer, page checksums are verified, and what came from outside is validated before anything looks
into it.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trm_audit.errors import BadInput, UsageError
from trm_audit.shards import schema

LAST, TOTAL_ROWS = b"trm_audit.last", b"trm_audit.total_rows"
ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a data set.

    Attributes:
        path: the file.
        name: what its output shard is called, unique within a run.
        num_rows: rows by the footer.
        num_tokens: response tokens by the footer, 0 where the column is not there.
        num_bytes: of its columns in memory, about.
        metadata: the footer's keys.
        logits: side files with full logits.
    """

    path: Path
    name: str
    num_rows: int
    num_tokens: int
    num_bytes: int
    metadata: Mapping[bytes, bytes]
    logits: tuple[Path, ...] = ()

    def json(self, key: bytes) -> dict[str, object]:
        """A JSON value of the footer, {} where the key is not there."""
        value = _footer_json(self.metadata, key, str(self.path))
        return value if isinstance(value, dict) else {}


def rows_at_once(shard: Shard, num_bytes: int) -> int:
    """Rows of a batch that takes about so much memory, by the shard's mean row."""
    mean = max(1, shard.num_bytes // max(1, shard.num_rows))
    return max(1, min(16384, num_bytes // mean))


@dataclass
class Found:
    """What a search for shards gave: shards in order, files passed over with the reason, files that cannot be read."""

    shards: list[Shard] = field(default_factory=list)
    passed_over: list[tuple[Path, str]] = field(default_factory=list)
    bad: list[BadInput] = field(default_factory=list)


def find_shards(inputs: Sequence[str], kind: schema.Kind, renames: Mapping[str, str] | None = None) -> Found:
    """Shards of one kind in folders (searched to any depth), files and globs.

    Args:
        inputs: paths and glob patterns, in the order the output is to have; a folder's files are sorted by name.
        kind: `rollouts`, `scores` or `training`.
        renames: ours -> theirs, so that foreign columns are recognised.

    Raises:
        BadInput: a path does not exist, or nothing was found.
        UsageError: two shards would get one name.
    """
    found = Found()
    for path, name, named in _candidates(inputs):
        try:
            _sort_in(found, path, name, kind, named, renames or {})
        except BadInput as error:
            found.bad.append(error)
    names = Counter(shard.name for shard in found.shards)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UsageError(
            f"two inputs are called {twice}", next_step="Give the folder above them, or score them into two -o folders."
        )
    if not found.shards and not found.bad:
        others = "".join(f"\n{path}: {reason}" for path, reason in found.passed_over[:5])
        steps = {"scores": "Score rollouts first (trm-audit score ROLLOUTS --model CKPT -o scores/)."}
        raise BadInput(
            f"no {kind} shards found",
            place=", ".join(inputs),
            next_step=f"{steps.get(kind, 'schemas/ says what one looks like.')}{others}",
        )
    return found


def _candidates(inputs: Sequence[str]) -> Iterator[tuple[Path, str, bool]]:
    """(file, name of its output, whether the user named this very file)."""
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            base = path / "data" if (path / "run.json").is_file() else path
            for file in sorted(base.rglob("*.parquet")):
                inner = file.relative_to(base)
                if file.is_file() and not any(part.startswith((".", "_")) for part in inner.parts):
                    yield file, "--".join(inner.parts), False
        elif path.exists():
            yield path, path.stem + ".parquet", True
        else:
            matches = sorted(glob.glob(text, recursive=True))
            if not matches:
                raise BadInput("does not exist", place=text, next_step="Give a folder, a file, a glob or - for stdin.")
            for match in matches:
                for file, name, _ in _candidates([match]):
                    yield file, name, False


def _sort_in(found: Found, path: Path, name: str, kind: str, named: bool, renames: Mapping[str, str]) -> None:
    file = open_parquet(path)
    metadata = dict(file.metadata.metadata or {})
    stated = metadata.get(schema.KIND, b"").decode("utf-8", "replace")
    names = file.schema_arrow.names
    ours = [next((mine for mine, theirs in renames.items() if theirs == name), name) for name in names]
    if stated != kind and not (kind == "rollouts" and not stated and _is_rollouts(path, ours, named)):
        reason = f"its footer says {stated}" if stated else "its columns do not fit"
        if named and not path.name.startswith("logits-"):
            raise BadInput(f"not a {kind} shard: {reason}", place=str(path), next_step=_remedy(kind, stated, names))
        if not path.name.startswith("logits-"):
            found.passed_over.append((path, reason))
        return
    schema.check_version(metadata, str(path))
    logits = _side_files(path, metadata) if kind == "rollouts" else ()
    tokens = _num_tokens(file, renames)
    found.shards.append(Shard(path, name, file.metadata.num_rows, tokens, _num_bytes(file), metadata, logits))


def _is_rollouts(path: Path, names: Sequence[str], named: bool) -> bool:
    """A file without a kind counts by its columns; one that the user named is taken at their word."""
    if path.name.startswith("logits-"):
        return False
    needed = {"rollout_id", "prompt_ids", "response_ids"}
    return needed <= set(names) or (named and bool(needed & set(names)))


def _remedy(kind: str, stated: str, names: Sequence[str]) -> str:
    if stated == "rollouts":
        return "Run trm-audit score on it first."
    if stated == "training" and kind == "scores":
        return "filter and score shards: give the folder that `trm-audit score -o` wrote."
    return f"Its columns are: {', '.join(names)} (schemas/{'rollout' if kind == 'rollouts' else 'score'}.md)."


def _side_files(path: Path, metadata: Mapping[bytes, bytes]) -> tuple[Path, ...]:
    if schema.LOGITS in metadata:
        names = _footer_json(metadata, schema.LOGITS, str(path))
        if not isinstance(names, list):
            raise BadInput("its footer's trm_audit.logits is not a list of paths", place=str(path))
        named = [path.parent / str(name) for name in names]
        for file in named:
            if not file.is_file():
                raise BadInput(f"its footer names {file.name}, which is not there", place=str(path))
        return tuple(named)
    beside = [*path.parent.glob("logits-*.parquet"), *path.parent.glob("logits-*.safetensors")]
    return tuple(sorted(beside))


def _footer_json(metadata: Mapping[bytes, bytes], key: bytes, place: str) -> object:
    try:
        return json.loads(metadata.get(key, b"{}"))
    except ValueError as error:
        raise BadInput(f"its footer's {key.decode()} is not JSON ({error})", place=place) from error


def _num_tokens(file: pq.ParquetFile, renames: Mapping[str, str]) -> int:
    leaf = renames.get("response_ids", "response_ids") + "."
    metadata = file.metadata
    columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.startswith(leaf)]
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(g).column(columns[0]).num_values for g in groups) if columns else 0


def _num_bytes(file: pq.ParquetFile) -> int:
    """Size of all columns in memory: what the pages hold, or 4 bytes a value where dictionaries made them small."""
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    return int(max(4 * values, sum(group.total_byte_size for group in groups)))


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a Parquet file with page checksums verified. Raises BadInput if it is not one, or cut."""
    try:
        return pq.ParquetFile(path, page_checksum_verification=True, memory_map=True)
    except ARROW_ERRORS as error:
        if _begins_as_parquet(path):
            raise BadInput(
                f"begins as Parquet and cannot be read: cut or damaged ({_first_line(error)})",
                place=str(path),
                next_step="Fetch it again, or leave it out.",
            ) from error
        raise BadInput(
            f"cannot be read as Parquet ({_first_line(error)})", place=str(path), next_step="Leave it out."
        ) from error


def _begins_as_parquet(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def read_batches(
    path: Path, *, batch_rows: int, columns: Sequence[str] | None = None, row_groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of a Parquet file, as many rows in all as its footer says.

    Raises:
        BadInput: a page is damaged, or rows are missing.
    """
    file = open_parquet(path)
    groups = range(file.metadata.num_row_groups) if row_groups is None else row_groups
    rows = 0
    try:
        for batch in file.iter_batches(batch_size=batch_rows, columns=columns, row_groups=list(groups)):
            batch.validate(full=True)
            rows += batch.num_rows
            yield batch
        if rows == 0:  # so that an empty shard keeps its columns
            empty = file.schema_arrow.remove_metadata().empty_table()
            yield pa.RecordBatch.from_pylist([], schema=empty.select(columns).schema if columns else empty.schema)
    except ARROW_ERRORS as error:
        raise BadInput(
            f"is damaged after {rows} rows ({_first_line(error)})",
            place=str(path),
            next_step="Fetch it again; --skip-bad goes on without it.",
        ) from error
    wanted = sum(file.metadata.row_group(g).num_rows for g in groups)
    if rows != wanted:
        raise BadInput(f"gave {rows} rows, its footer says {wanted}", place=str(path), next_step="Fetch it again.")


@dataclass
class StreamSource:
    """An Arrow IPC stream of one kind, read to its trailer.

    Attributes:
        schema: of the batches.
        metadata: keys of the stream's schema.
        kind: `rollouts`, `scores` or `training`.
        trailer: keys of the trailer, filled when the last batch was read.
    """

    schema: pa.Schema
    metadata: Mapping[bytes, bytes]
    reader: pa.ipc.RecordBatchStreamReader
    kind: schema.Kind
    trailer: dict[bytes, bytes] = field(default_factory=dict)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        rows = 0
        while not self.trailer:
            try:
                batch, custom = self.reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)
            except StopIteration:
                raise BadInput(
                    f"the stream ends after {rows} rows without its trailer: it was cut",
                    place="-",
                    next_step="Look at what the command before the pipe said, and run both again.",
                ) from None
            except ARROW_ERRORS as error:
                raise BadInput(f"the stream is damaged after {rows} rows ({_first_line(error)})", place="-") from error
            if custom is not None and custom.get(LAST) == b"true":
                self.trailer = dict(custom)
            rows += batch.num_rows
            if batch.num_rows:
                yield batch
        if rows == 0:  # so that an empty stream keeps its columns
            yield pa.RecordBatch.from_pylist([], schema=self.schema.remove_metadata())
        stated = self.trailer.get(TOTAL_ROWS, b"?").decode("utf-8", "replace")
        if stated != str(rows):
            raise BadInput(f"the stream had {rows} rows, its trailer says {stated}", place="-")


def open_stream(source: BinaryIO, *kinds: schema.Kind) -> StreamSource:
    """Opens an Arrow IPC stream and checks that it is of a kind wanted; one that states none counts as rollouts.

    Raises:
        BadInput: not an Arrow stream, or one of another kind or version.
    """
    try:
        reader = pa.ipc.open_stream(source)
        _ = reader.schema.names  # raises where they are not UTF-8
    except ARROW_ERRORS as error:
        raise BadInput(
            f"not an Arrow IPC stream ({_first_line(error)})",
            place="-",
            next_step="Pipe the output of a trm-audit command with -o - into this one; it failed if it wrote nothing.",
        ) from error
    metadata = dict(reader.schema.metadata or {})
    kind = metadata.get(schema.KIND, b"rollouts").decode("utf-8", "replace")
    if kind not in kinds:
        raise BadInput(f"a stream of {kind}, {' or '.join(kinds)} are needed", place="-")
    schema.check_version(metadata, "-")
    return StreamSource(reader.schema, metadata, reader, kind)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
