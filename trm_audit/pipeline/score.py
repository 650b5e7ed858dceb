"""Scoring a data set: one score shard per rollout shard, each published whole, so that a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa

from trm_audit import __version__
from trm_audit.errors import AuditError, BadInput, RowError, UsageError
from trm_audit.numerics.ragged import Ints
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.selection import Selection, digest, sample_column, sampled, select, shard_fingerprint
from trm_audit.rollout import RolloutBatch, Sampling, TokenScores
from trm_audit.shards import schema
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import Shard, find_shards, open_stream, read_batches, rows_at_once
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.scores import Counts, score_columns
from trm_audit.shards.write import Sink, StreamSink, head

if TYPE_CHECKING:
    from trm_audit.engine.model import TrainerModel
    from trm_audit.shards.logits import StoredLogits

BATCH_TOKENS = 1 << 19  # response tokens of one batch
WINDOW_BYTES = 512 << 20
DRY_RUN_ROWS = 8


@dataclass(frozen=True)
class ScoreOptions:
    """Settings of a scoring run.

    Attributes:
        model: checkpoint folder, or None with `trainer_logprobs="stored"`.
        trainer_logprobs: `model`, or `stored` to take the trainer's own values from the rollouts.
        device, dtype, head_dtype: see `engine.model.TrainerModel`.
        vocab_size: cut both sides to the first n tokens; None keeps all and refuses other sizes.
        max_tokens: padded tokens of one forward; None is 4,096 on a CPU and 16,384 on a GPU.
        head_rows: positions whose logits exist at once.
        columns: ours -> theirs.
        defaults: sampling settings of rows that do not state them; mode_given says that its mode is meant.
        trainer_version: for staleness.
        logits: side files with full logits for input that has none beside it (a stream).
        limit, sample, part: which rows (see `pipeline.selection`) and which shards.
        skip_bad: go on without bad rows and shards.
        overwrite: replace another run's output.
    """

    model: Path | None = None
    trainer_logprobs: str = "model"
    device: str = "auto"
    dtype: str = "auto"
    head_dtype: str = "auto"
    vocab_size: int | None = None
    max_tokens: int | None = None
    head_rows: int = 128
    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Sampling = field(default_factory=Sampling)
    mode_given: bool = False
    trainer_version: int | None = None
    logits: tuple[Path, ...] = ()
    limit: int | None = None
    sample: float = 1.0
    part: tuple[int, int] = (1, 1)
    skip_bad: bool = False
    overwrite: bool = False


@dataclass
class ScoreResult:
    """What a scoring run did.

    Attributes:
        shards: published by this call; done: there before.
        rows, num_tokens, num_disagreements, num_infinite: over the shards of this call.
        grades: rows by grade.
        num_skipped: rows left out by `skip_bad`; bad_shards: whole shards.
        seconds: of scoring, model loading not counted.
        complete: every shard of the run is there.
    """

    shards: int = 0
    done: int = 0
    rows: int = 0
    num_tokens: int = 0
    num_disagreements: int = 0
    num_infinite: int = 0
    grades: dict[str, int] = field(default_factory=dict)
    audited_policies: dict[str, int] = field(default_factory=dict)
    num_skipped: int = 0
    bad_shards: int = 0
    seconds: float = 0.0
    complete: bool = False

    def add(self, counts: Mapping[str, object]) -> None:
        """Adds what a shard's footer counts."""
        for name in ("rows", "num_tokens", "num_disagreements", "num_infinite", "num_skipped"):
            value = counts[name]
            assert isinstance(value, int)
            setattr(self, name, getattr(self, name) + value)
        for name in ("grades", "audited_policies"):
            mine, theirs = getattr(self, name), counts[name]
            assert isinstance(theirs, dict)
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0) + value


@dataclass(frozen=True)
class DryRun:
    """What a run would do, and how long it would take by the speed of a few rows.

    Attributes:
        shards, rows, num_tokens: of the run (tokens of responses, by the footers).
        logits_bytes: of side files that would be read.
        tokens_per_second: measured on `DRY_RUN_ROWS` rows; seconds: for all.
    """

    shards: int
    rows: int
    num_tokens: int
    logits_bytes: int
    tokens_per_second: float
    seconds: float


class Trainer:
    """The training side of a run: a loaded model, or the rollouts' own stored log-probabilities.

    Raises:
        UsageError: both or neither were asked for.
        BadInput: the checkpoint cannot be used.
    """

    def __init__(self, options: ScoreOptions) -> None:
        stored = options.trainer_logprobs == "stored"
        if stored == (options.model is not None):
            raise UsageError("give either --model DIR or --trainer-logprobs stored")
        self.options = options
        self.model: TrainerModel | None = None
        self.identity: dict[str, object] = {"trainer_logprobs": options.trainer_logprobs}
        if options.model is not None:
            self._load(options.model)

    def _load(self, folder: Path) -> None:
        from trm_audit.engine.checkpoint import find_checkpoint
        from trm_audit.engine.model import TrainerModel

        checkpoint = find_checkpoint(folder)
        options = self.options
        self.model = TrainerModel(
            checkpoint,
            device=options.device,
            dtype=options.dtype,
            head_dtype=options.head_dtype,
            vocab_size=options.vocab_size,
        )
        self.max_tokens = options.max_tokens or (4096 if self.model.device.type == "cpu" else 16384)
        self.identity |= {
            "model": folder.resolve().name,
            "model_hash": checkpoint.digest(),
            "model_type": checkpoint.config["model_type"],
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "head_dtype": str(self.model.head_dtype).removeprefix("torch."),
            "vocab_size": self.model.vocab_size,
            "max_tokens": self.max_tokens,
            "head_rows": options.head_rows,
        }

    def run(self) -> dict[str, object]:
        """What made the scores: goes into run.json and footers, and identifies the run."""
        options = self.options
        settings = {
            "trm_audit": __version__,
            **self.identity,
            "columns": dict(options.columns),
            "defaults": asdict(options.defaults),
            "trainer_version": options.trainer_version,
            "limit": options.limit,
            "sample": options.sample,
        }
        return {"kind": "scores", "fingerprint": digest(settings), **settings}

    def rules(self, logits: StoredLogits | None, duplicates: Mapping[str, tuple[str, int]]) -> RowRules:
        return RowRules(
            vocab_size=None if self.model is None else self.model.vocab_size,
            logits=logits,
            wider_logits=self.options.vocab_size is not None,
            defaults=self.options.defaults,
            mode_given=self.options.mode_given,
            stored_trainer=self.model is None,
            duplicates=duplicates,
        )

    def score(self, batch: RolloutBatch, logits: StoredLogits | None) -> TokenScores:
        from trm_audit.engine.scorer import Scorer, score_stored

        if self.model is None:
            return score_stored(batch)
        options = self.options
        return Scorer(self.model, logits, max_tokens=self.max_tokens, head_rows=options.head_rows).score(batch)


def score(
    inputs: Sequence[str],
    output: str | BinaryIO,
    options: ScoreOptions,
    *,
    source: BinaryIO | None = None,
    progress: Progress | None = None,
) -> ScoreResult:
    """Scores rollouts again with the training model and writes score shards (schemas/score.md).

    Args:
        inputs: folders, files, globs; or ["-"] for an Arrow stream from `source`.
        output: a folder, or a binary file for an Arrow stream.
        options: settings.
        source: where `-` is read from.
        progress: who watches.

    Raises:
        AuditError: see `errors`; what was published before stays.
    """
    watch = progress or Silent()
    result = ScoreResult()
    if list(inputs) == ["-"]:
        if source is None or isinstance(output, str):
            raise UsageError("a stream can only be scored into a stream", next_step="Use -o -, or give files.")
        _score_stream(source, output, Trainer(options), result, watch)
        return result
    found = find_shards(inputs, "rollouts", options.columns)
    _report_found(found.passed_over, found.bad, options, result, watch)
    selection = select(found.shards, options.columns, options.sample, options.limit)
    shards = _chosen(found.shards, selection, options)
    trainer = Trainer(options)
    if isinstance(output, str):
        with OutputFolder(Path(output), trainer.run(), overwrite=options.overwrite, part=options.part) as folder:
            for error in found.bad:
                folder.skip(error)
            _score_folder(shards, folder, trainer, selection, result, watch)
    else:
        _score_to_stream(shards, output, trainer, selection, result, watch)
    return result


def _chosen(shards: Sequence[Shard], selection: Selection, options: ScoreOptions) -> list[Shard]:
    """Shards with selected rows, with the side files that `--logits` names."""
    return [replace(shard, logits=(*shard.logits, *options.logits)) for shard in shards if shard.name in selection.rows]


def _report_found(
    passed_over: Sequence[tuple[Path, str]],
    bad: Sequence[BadInput],
    options: ScoreOptions,
    result: ScoreResult,
    watch: Progress,
) -> None:
    for path, reason in passed_over:
        watch.note(f"{path} is passed over: {reason}")
    if bad and not options.skip_bad:
        raise bad[0]
    for error in bad:
        watch.note(f"left out: {error}")
        result.bad_shards += 1


def _score_folder(
    shards: Sequence[Shard],
    folder: OutputFolder,
    trainer: Trainer,
    selection: Selection,
    result: ScoreResult,
    watch: Progress,
) -> None:
    part, parts = trainer.options.part
    mine = [shard for k, shard in enumerate(shards) if k % parts == part - 1]
    pending = []
    for shard in mine:
        fingerprint = shard_fingerprint(str(folder.run["fingerprint"]), shard, selection.rows[shard.name])
        if folder.is_done(shard.name, fingerprint):
            result.done += 1
            result.num_skipped += _skipped(folder, shard.name)
        else:
            pending.append((shard, fingerprint))
    watch.start(sum(shard.num_tokens for shard, _ in pending))
    began = time.monotonic()
    bad = set()
    for shard, fingerprint in pending:
        metadata = head("scores", fingerprint=fingerprint, run=folder.run)
        try:
            with folder.shard(shard.name, metadata) as sink:
                loop = _Loop(trainer, selection, sink, watch, folder)
                loop.shard(shard)
                sink.close(loop.counts.to_json())
        except BadInput as error:
            if not trainer.options.skip_bad:
                raise
            folder.skip(error)
            watch.note(f"left out: {error}")
            bad.add(shard.name)
            continue
        result.shards += 1
        result.add(loop.counts.to_json())
    result.seconds = time.monotonic() - began
    result.bad_shards += len(bad)
    names = [shard.name for shard in shards if shard.name not in bad]
    result.complete = folder.finish(names, {"fingerprint": folder.run["fingerprint"], "shards": names})


def _skipped(folder: OutputFolder, name: str) -> int:
    counts = folder.manifest()[name]["counts"]
    return int(counts["num_skipped"]) if isinstance(counts, dict) else 0


def _score_to_stream(
    shards: Sequence[Shard],
    output: BinaryIO,
    trainer: Trainer,
    selection: Selection,
    result: ScoreResult,
    watch: Progress,
) -> None:
    watch.start(sum(shard.num_tokens for shard in shards))
    began = time.monotonic()
    sink = StreamSink(output, head("scores", fingerprint=str(trainer.run()["fingerprint"]), run=trainer.run()))
    loop = _Loop(trainer, selection, sink, watch, None)
    part, parts = trainer.options.part
    for k, shard in enumerate(shards):
        if k % parts == part - 1:
            loop.shard(shard)
            result.shards += 1
    sink.close(loop.counts.to_json())
    result.add(loop.counts.to_json())
    result.seconds, result.complete = time.monotonic() - began, True


def _score_stream(source: BinaryIO, output: BinaryIO, trainer: Trainer, result: ScoreResult, watch: Progress) -> None:
    if trainer.options.limit is not None or trainer.options.sample < 1 or trainer.options.part != (1, 1):
        raise UsageError("--limit, --sample and --part need files, not a stream")
    began = time.monotonic()
    watch.start(0)
    sink = StreamSink(output, head("scores", fingerprint=str(trainer.run()["fingerprint"]), run=trainer.run()))
    loop = _Loop(trainer, Selection(), sink, watch, None)
    loop.stream(open_stream(source, "rollouts"))
    sink.close(loop.counts.to_json())
    result.shards = 1
    result.add(loop.counts.to_json())
    result.seconds, result.complete = time.monotonic() - began, True


class _Loop:
    """Batches of one or more shards, from reading to the sink."""

    def __init__(
        self, trainer: Trainer, selection: Selection, sink: Sink, watch: Progress, folder: OutputFolder | None
    ) -> None:
        self._trainer, self._selection, self._sink, self._watch, self._folder = trainer, selection, sink, watch, folder
        self.counts = Counts()
        self._seen: set[int] = set()

    def shard(self, shard: Shard) -> None:
        """Scores the selected rows of a shard."""
        logits = _stored_logits(shard.logits)
        rules = self._trainer.rules(logits, self._selection.duplicates)
        left = self._selection.rows[shard.name]
        row = 0
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_TOKENS)):
            named = self._rename(batch, str(shard.path))
            numbers = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            chosen = np.flatnonzero(sampled(sample_column(named), self._selection.sample))[:left]
            left -= len(chosen)
            if len(chosen) or shard.num_rows == 0:
                self._batch(named.take(pa.array(chosen, pa.int64())), str(shard.path), numbers[chosen], rules, logits)
            if left == 0:
                break

    def stream(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Scores a stream's rows."""
        logits = _stored_logits(self._trainer.options.logits)
        row = 0
        for batch in batches:
            named = self._rename(batch, "-")
            rules = self._trainer.rules(logits, self._repeated(named))
            self._batch(named, "-", np.arange(row, row + batch.num_rows), rules, logits)
            row += batch.num_rows

    def _repeated(self, batch: pa.RecordBatch) -> dict[str, tuple[str, int]]:
        """Names of this batch that were seen before. (A stream is seen once: where they were first is not known.)"""
        out: dict[str, tuple[str, int]] = {}
        if "rollout_id" in batch.schema.names:
            for name in batch.column("rollout_id").to_pylist():
                if hash(name) in self._seen:
                    out[name] = ("-", -1)
                self._seen.add(hash(name))
        return out

    def _rename(self, batch: pa.RecordBatch, place: str) -> pa.RecordBatch:
        names = schema.renamed(batch.schema, self._trainer.options.columns, place)
        return pa.RecordBatch.from_arrays(batch.columns, names=names)

    def _batch(
        self, batch: pa.RecordBatch, place: str, numbers: Ints, rules: RowRules, logits: StoredLogits | None
    ) -> None:
        for window in _windows(batch, logits):
            rows = batch.slice(window.start, len(window))
            rollouts, errors = read_rows(rows, place, numbers[window.start : window.stop], rules)
            self._skip(errors)
            try:
                scores = self._trainer.score(rollouts, logits)
            except RowError as error:
                raise BadInput(error.cause, place=error.place, next_step=error.next_step) from error
            columns = score_columns(
                rollouts, scores, self._trainer.options.trainer_version, rebuilds=logits is not None
            )
            self.counts.add(columns)
            self._sink.write(columns)
            self._watch.advance(int(rollouts.response.offsets[-1]))

    def _skip(self, errors: Sequence[AuditError]) -> None:
        if errors and not self._trainer.options.skip_bad:
            raise errors[0]
        for error in errors:
            self._watch.note(f"left out: {error}")
            if self._folder is not None:
                self._folder.skip(error)
        self.counts.skip(len(errors))


def _stored_logits(files: Sequence[Path]) -> StoredLogits | None:
    if not files:
        return None
    from trm_audit.shards.logits import StoredLogits

    return StoredLogits(files)


def _windows(batch: pa.RecordBatch, logits: StoredLogits | None) -> Iterator[range]:
    """Consecutive rows whose stored logits fit in memory together, so that a file of them is read once, in order."""
    start, size = 0, 0
    for row, name in enumerate(batch.column("rollout_id").to_pylist() if logits is not None else ()):
        assert logits is not None
        own = logits.num_bytes(str(name))
        if size and size + own > WINDOW_BYTES:
            yield range(start, row)
            start, size = row, 0
        size += own
    if start < batch.num_rows or batch.num_rows == 0:
        yield range(start, batch.num_rows)


def dry_run(inputs: Sequence[str], options: ScoreOptions) -> DryRun:
    """Counts what `score` would do and times a few rows of it. Writes nothing.

    Raises:
        AuditError: as `score` would.
    """
    found = find_shards(inputs, "rollouts", options.columns)
    if found.bad:
        raise found.bad[0]
    selection = select(found.shards, options.columns, options.sample, options.limit)
    shards = _chosen(found.shards, selection, options)
    num_tokens = sum(shard.num_tokens * selection.rows[shard.name] // max(shard.num_rows, 1) for shard in shards)
    trainer = Trainer(options)
    speed = _speed(shards[0], trainer, selection) if num_tokens else float("inf")
    files = {file for shard in shards for file in shard.logits}
    return DryRun(
        shards=len(shards),
        rows=sum(selection.rows.values()),
        num_tokens=num_tokens,
        logits_bytes=sum(file.stat().st_size for file in files),
        tokens_per_second=speed,
        seconds=num_tokens / speed,
    )


class _Nowhere:
    """A sink for rows that are only timed."""

    def write(self, batch: pa.RecordBatch) -> None: ...

    def close(self, counts: Mapping[str, object]) -> None: ...


def _speed(shard: Shard, trainer: Trainer, selection: Selection) -> float:
    few = Selection({shard.name: min(DRY_RUN_ROWS, selection.rows[shard.name])}, selection.duplicates, selection.sample)
    for _ in range(2):  # the first pass warms up
        loop = _Loop(trainer, few, _Nowhere(), Silent(), None)
        began = time.monotonic()
        loop.shard(shard)
        seconds = time.monotonic() - began
    counted = loop.counts.to_json()["num_tokens"]
    return float(str(counted)) / max(seconds, 1e-9)
