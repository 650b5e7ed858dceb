"""Raw outputs of engines and dumps of trainers become rollout shards: one for each file, checked row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from trm_audit import __version__
from trm_audit.adapters import load_source
from trm_audit.adapters.base import Given, Row, Source
from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.selection import content_digest, digest
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import read_batches
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.schema import ROLLOUT_COLUMNS, VERSION_PER_TOKEN
from trm_audit.shards.write import ParquetSink, head

ROWS_AT_ONCE = 256
NAMED_ASSUMPTIONS = 20


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of a conversion.

    Attributes:
        source: name of the foreign format (`adapters.SOURCES`).
        given: what the user says of the data.
        skip_bad: go on without bad rows and files.
        overwrite: replace another run's output.
    """

    source: str
    given: Given = field(default_factory=Given)
    skip_bad: bool = False
    overwrite: bool = False


@dataclass
class ConvertResult:
    """What a conversion did. Figures are of all its shards, those that were there before included.

    Attributes:
        rows, num_tokens: rollouts and their policy tokens.
        grades: rollouts with policy tokens by grade.
        num_skipped: rows left out by `skip_bad`.
        assumed: what the source does not say and was taken for granted.
        shards, done: published by this call, and there before.
        bad_files: left out by `skip_bad`.
        complete: every shard of the run is there.
    """

    rows: int = 0
    num_tokens: int = 0
    grades: Counter[str] = field(default_factory=Counter)
    num_skipped: int = 0
    assumed: list[str] = field(default_factory=list)
    shards: int = 0
    done: int = 0
    bad_files: int = 0
    complete: bool = False

    def add(self, counts: Mapping[str, object]) -> None:
        """Adds what a shard's footer counts."""
        for name in ("rows", "num_tokens", "num_skipped"):
            setattr(self, name, getattr(self, name) + int(str(counts[name])))
        grades, assumed = counts["grades"], counts["assumed"]
        assert isinstance(grades, dict)
        assert isinstance(assumed, list)
        self.grades.update(grades)
        self.assumed += [sentence for sentence in assumed if sentence not in self.assumed]

    def counts(self) -> dict[str, object]:
        """For a footer."""
        sums = {name: getattr(self, name) for name in ("rows", "num_tokens", "num_skipped")}
        return {**sums, "grades": dict(sorted(self.grades.items())), "assumed": self.assumed}


def convert(
    inputs: Sequence[str], output: str, options: ConvertOptions, *, progress: Progress | None = None
) -> ConvertResult:
    """Writes raw files of a foreign format as rollout shards (schemas/rollout.md), one for each file.

    Args:
        inputs: files, and folders, of which the files with the format's suffixes are taken at any depth.
        output: a folder.
        options: settings.
        progress: who watches.

    Raises:
        AuditError: see `errors`; what was published before stays.
    """
    watch, source = progress or Silent(), load_source(options.source)
    files = raw_files(inputs, source)
    settings = {"trm_audit": __version__, "source": source.name, "given": options.given.sampling()}
    run = {"kind": "rollouts", "fingerprint": digest(settings), **settings}
    with OutputFolder(Path(output), run, overwrite=options.overwrite) as folder:
        return _Conversion(source, options, folder, watch).run(files)


def raw_files(inputs: Sequence[str], source: Source) -> dict[str, Path]:
    """Shard name -> raw file, in the order of the inputs; a folder's files by name.

    Raises:
        BadInput: an input does not exist, or holds no file of the format.
        UsageError: two files would give shards of one name.
    """
    out: dict[str, Path] = {}
    for text in inputs:
        path = Path(text)
        if not path.exists():
            raise BadInput("does not exist", place=text, next_step="Give files or folders.")
        inner = sorted(file for file in path.rglob("*") if file.suffix in source.suffixes) if path.is_dir() else [path]
        if not inner:
            raise BadInput(
                f"holds no {' or '.join(source.suffixes)} file",
                place=text,
                next_step=f"--from {source.name} reads {source.about}.",
            )
        for file in inner:
            parts = file.relative_to(path).with_suffix("").parts if path.is_dir() else (file.stem,)
            name = "--".join(parts) + ".parquet"
            if name in out:
                raise UsageError(f"two inputs are called {name}", next_step="Convert them into two -o folders.")
            out[name] = file
    return out


class _Conversion:
    """Files one after another into an output folder.

    Args:
        source: how they are read.
        options: settings.
        folder: where shards go.
        watch: who watches.
    """

    def __init__(self, source: Source, options: ConvertOptions, folder: OutputFolder, watch: Progress) -> None:
        self._source, self._options, self._folder, self._watch = source, options, folder, watch
        self._first: dict[str, tuple[str, int]] = {}  # of published shards
        self._own: dict[str, tuple[str, int]] = {}  # of the file at hand
        self._result = ConvertResult()

    def run(self, files: Mapping[str, Path]) -> ConvertResult:
        result, folder = self._result, self._folder
        folder.begin([*files])
        self._watch.start(0)
        bad = {name for name, file in files.items() if not self._file(name, file)}
        result.bad_files = len(bad)
        summary = {"fingerprint": folder.run["fingerprint"], **result.counts()}
        result.complete = folder.finish([name for name in files if name not in bad], summary)
        return result

    def _file(self, name: str, file: Path) -> bool:
        """Converts one file, if its shard is not there yet; False if it was left out."""
        fingerprint = digest([self._folder.run["fingerprint"], content_digest([file])])
        if self._folder.is_done(name, fingerprint):
            counts = self._folder.manifest()[name]["counts"]
            assert isinstance(counts, dict)
            self._result.add(counts)
            self._result.done += 1
            self._register_done(name, file)
            return True
        own, given = ConvertResult(), replace(self._options.given, assumed=[])
        self._own = {}
        try:
            with self._folder.shard(name, head("rollouts", fingerprint=fingerprint, run=self._folder.run)) as sink:
                self._rows(file, given, sink, own)
                own.assumed = given.assumed[:NAMED_ASSUMPTIONS]
                sink.close(own.counts())
        except BadInput as error:
            if not self._options.skip_bad:
                raise
            self._folder.skip(error, name)
            self._watch.note(f"left out: {error}")
            return False
        self._result.add(own.counts())
        self._result.shards += 1
        self._first |= self._own
        return True

    def _register_done(self, name: str, file: Path) -> None:
        """Takes note of the names in a shard that was there before.

        Raises:
            BadInput: one of them stands in another shard.
        """
        row = 0
        for batch in read_batches(self._folder.data / name, batch_rows=65536, columns=["rollout_id"]):
            self._own = {}
            again = self._repeated(batch, str(file), row)
            for rollout_id, (first, at) in again.items():
                raise BadInput(
                    f"rollout_id {rollout_id} occurs again, first in {first}, row {at}",
                    place=str(file),
                    next_step="The same answers were given twice: take one of the files away.",
                )
            self._first |= self._own
            row += batch.num_rows

    def _rows(self, file: Path, given: Given, sink: ParquetSink, own: ConvertResult) -> None:
        """Rows of a file; each batch has the columns of the first."""
        columns: pa.Schema | None = None
        at = 0
        for read in _some_at_once(self._source.read(file, given)):
            self._skip([row for row in read if isinstance(row, RowError)], own)
            rows = [row for row in read if not isinstance(row, RowError)]
            if not rows:
                continue
            table = as_batch(rows, columns, str(file))
            columns = columns or table.schema
            numbers = np.arange(at, at + len(rows))
            at += len(rows)
            rules = RowRules(duplicates=self._repeated(table, str(file), numbers[0]))
            found, errors = read_rows(table, str(file), numbers, rules)
            self._skip(errors, own)
            own.rows += len(found)
            own.num_tokens += int(found.response_mask.sum())
            own.grades.update(grade for grade in found.grade if grade is not None)
            sink.write(table.take(pa.array(found.row_numbers - numbers[0])))
            self._watch.advance(int(found.response_mask.sum()))
        if columns is None:
            raise BadInput(
                "holds no rollout that can be used" if own.num_skipped else "holds no rollout",
                place=str(file),
                next_step=f"Is it {self._source.about}?",
            )

    def _repeated(self, table: pa.RecordBatch, place: str, row: int) -> dict[str, tuple[str, int]]:
        """Names of this batch that came before, in this file or another -> where they were first."""
        out = {}
        for at, name in enumerate(table.column("rollout_id").to_pylist(), start=int(row)):
            first = self._first.get(name) or self._own.setdefault(name, (place, at))
            if first != (place, at):
                out[name] = first
        return out

    def _skip(self, errors: Sequence[RowError], own: ConvertResult) -> None:
        if errors and not self._options.skip_bad:
            raise errors[0]
        for error in errors:
            self._watch.note(f"left out: {error}")
            self._folder.skip(error)
        own.num_skipped += len(errors)


def as_batch(rows: Sequence[Row], columns: pa.Schema | None, place: str) -> pa.RecordBatch:
    """Rows as columns: those of the schema in their types, others as they come.

    Args:
        rows: at least one.
        columns: what an earlier batch of the same file had, None for the first; a column that comes later is an error.
        place: for messages.

    Raises:
        BadInput: a value does not fit its column's type, or a column comes up late.
    """
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else columns.names
    late = next((name for row in rows for name in row if name not in names), None)
    if late is not None:
        raise BadInput(f"column {late!r} comes up after the first {ROWS_AT_ONCE} rollouts", place=place)
    arrays = []
    for name in names:
        values = [row.get(name) for row in rows]
        kind = columns.field(name).type if columns is not None else _kind(name, values)
        try:
            arrays.append(pa.array(values, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise BadInput(
                f"{name} does not fit {kind or 'one type'}: {error}",
                place=place,
                next_step="The file is not what --from says, or is damaged.",
            ) from error
    return pa.RecordBatch.from_arrays(arrays, names=names)


def _kind(name: str, values: Sequence[object]) -> pa.DataType | None:
    """Type of a column by the schema, or by what is in it."""
    if name == "policy_version" and any(isinstance(value, list | tuple | np.ndarray) for value in values):
        return VERSION_PER_TOKEN.type
    known = ROLLOUT_COLUMNS.get(name)
    return None if known is None else known.type


def _some_at_once(rows: Iterator[Row | RowError]) -> Iterator[list[Row | RowError]]:
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield some
