"""From score shards to training shards: verdicts, loss masks, advantages. Never imports torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from trm_audit import __version__
from trm_audit.criteria.limits import limits
from trm_audit.criteria.thresholds import Criteria, describe, resolve
from trm_audit.criteria.verdicts import causes
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.advantages import Baselines, whole_groups
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.score_shards import DECIDING, find_score_shards, grades_of, judge
from trm_audit.pipeline.selection import content_digest, digest
from trm_audit.report.decode import TOKENIZER_FILE
from trm_audit.report.noise import noise_floor
from trm_audit.report.widths import smallest_confidence
from trm_audit.shards import schema
from trm_audit.shards.publish import STREAM_SHARD, OutputFolder, told_apart
from trm_audit.shards.read import Shard, StreamSource, open_stream, read_batches, rows_at_once
from trm_audit.shards.training import training_columns
from trm_audit.shards.write import Sink, StreamSink, head

BATCH_BYTES = 128 << 20
OVERVIEW = (*DECIDING, "group_id", "reward")


@dataclass(frozen=True)
class FilterOptions:
    """Settings of a filter run.

    Attributes:
        criteria: what a sequence has to satisfy.
        drop: leave rejected rows out instead of keeping their place.
        advantage: `auto` fills an absent column from reward and group, `none` does not.
        allow_partial: take a score folder whose run has not finished.
        overwrite: replace another run's output.
    """

    criteria: Criteria
    drop: bool = False
    advantage: str = "auto"
    allow_partial: bool = False
    overwrite: bool = False


@dataclass
class FilterResult:
    """What a filter run did.

    Attributes:
        n_total, n_kept: rows judged (N of the objective) and kept.
        tokens_total, tokens_kept: their policy tokens.
        reasons: rows by cause; a row with several counts once for each.
        criteria: as resolved: the divergences are named.
        shards, done: published by this call, and there before.
    """

    n_total: int = 0
    n_kept: int = 0
    tokens_total: int = 0
    tokens_kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    criteria: Criteria | None = None
    shards: int = 0
    done: int = 0

    def add(self, counts: Mapping[str, object]) -> None:
        """Adds what a shard's footer counts."""
        for name in ("n_total", "n_kept", "tokens_total", "tokens_kept"):
            setattr(self, name, getattr(self, name) + int(str(counts[name])))
        reasons = counts["reasons"]
        assert isinstance(reasons, dict)
        self.reasons.update(reasons)

    def counts(self) -> dict[str, object]:
        """For a footer or trailer."""
        names = ("n_total", "n_kept", "tokens_total", "tokens_kept")
        return {**{name: getattr(self, name) for name in names}, "reasons": dict(sorted(self.reasons.items()))}


def filter_scores(
    inputs: Sequence[str],
    output: str | BinaryIO,
    options: FilterOptions,
    *,
    source: BinaryIO | None = None,
    progress: Progress | None = None,
) -> FilterResult:
    """Decides which sequences to train on and writes training shards (schemas/training.md).

    Args:
        inputs: score folders, files, globs; or ["-"] for an Arrow stream from `source`.
        output: a folder, or a binary file for an Arrow stream.
        options: settings.
        source: where `-` is read from.
        progress: who watches; is told which divergence decides, and which threshold lies below the noise of the scores.

    Raises:
        AuditError: see `errors`; what was published before stays.
    """
    watch = progress or Silent()
    if list(inputs) == ["-"]:
        if source is None:
            raise UsageError("no stream was given to read - from")
        stream = open_stream(source, "scores")
        return _filter_stream(stream, output, options, watch)
    found = find_score_shards(inputs, options.allow_partial)
    for path, reason in found.passed_over:
        watch.note(f"{path} is passed over: {reason}")
    overview = _overview(found.shards)
    criteria = resolve(options.criteria, overview.grades)
    runs = [shard.json(schema.RUN) for shard in found.shards]
    _say(criteria, overview.grades, runs, watch)
    job = _Job(criteria, options, overview.baselines if options.advantage == "auto" else None)
    result = FilterResult(criteria=criteria)
    if isinstance(output, str):
        _to_folder(found.shards, Path(output), job, runs[0], result, watch)
    else:
        sink = StreamSink(output, job.head(runs[0]))
        watch.start(sum(shard.num_tokens for shard in found.shards))
        for shard in found.shards:
            job.shard(shard, sink, result, watch)
        result.shards = len(found.shards)
        sink.close(result.counts())
    return result


def _say(criteria: Criteria, grades: set[str], runs: Sequence[Mapping[str, object]], watch: Progress) -> None:
    """What decides, and which thresholds reject by the rounding of the scores."""
    floor = noise_floor(runs, limits(criteria, grades))
    for line in describe(criteria, grades, smallest_confidence(runs)):
        watch.note(line)
    for below in floor.below if floor is not None else ():
        watch.note(f"Warning: {below.sentence}")


@dataclass
class _Overview:
    """What the first pass finds out: grades that occur, and baselines if advantages have to be filled."""

    grades: set[str]
    baselines: Baselines | None


def _overview(shards: Sequence[Shard]) -> _Overview:
    out = _Overview(set(), None)
    fill = any(needs_advantage(set(_names(shard))) for shard in shards)
    if fill:
        out.baselines = Baselines()
    for shard in shards:
        names = _names(shard)
        for needed in ("grade", "num_tokens"):
            if needed not in names:
                raise BadInput(
                    f"column {needed!r} is missing", place=str(shard.path), next_step="See schemas/score.md."
                )
        columns = [name for name in OVERVIEW if name in names and (fill or name in DECIDING)]
        for batch in read_batches(shard.path, batch_rows=65536, columns=columns):
            out.grades.update(grades_of(batch))
            if out.baselines is not None and "reward" in names:
                out.baselines.add(batch)
    return out


def _names(shard: Shard) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(shard.path).names)


def needs_advantage(names: set[str]) -> bool:
    """Whether `--advantage auto` has something to fill, and something to fill it from."""
    return "advantage" not in names and "reward" in names


def _to_folder(
    shards: Sequence[Shard],
    output: Path,
    job: _Job,
    score_run: Mapping[str, object],
    result: FilterResult,
    watch: Progress,
) -> None:
    fingerprints = [_fingerprint(shard) for shard in shards]
    run = {"kind": "training", "score_run": dict(score_run), "input": digest(fingerprints), **job.settings()}
    run["fingerprint"] = _identity(run)
    with OutputFolder(output, run, overwrite=job.options.overwrite) as folder:
        folder.carry(shards[0].path.parent.parent / TOKENIZER_FILE)
        watch.start(sum(shard.num_tokens for shard in shards))
        for shard, content in zip(shards, fingerprints, strict=True):
            fingerprint = digest([run["fingerprint"], content])
            own = FilterResult()
            if folder.is_done(shard.name, fingerprint):
                counts = folder.manifest()[shard.name]["counts"]
                assert isinstance(counts, dict)
                result.add(counts)
                result.done += 1
                watch.advance(shard.num_tokens)
                continue
            with folder.shard(shard.name, job.head(shard.json(schema.RUN), fingerprint)) as sink:
                job.shard(shard, sink, own, watch)
                sink.close(own.counts())
            result.add(own.counts())
            result.shards += 1
        names = [shard.name for shard in shards]
        folder.finish(names, {"fingerprint": run["fingerprint"], **result.counts()})


def _identity(settings: Mapping[str, object]) -> str:
    score_run = settings["score_run"]
    assert isinstance(score_run, dict)
    return digest({**settings, "score_run": told_apart(score_run)})


def _fingerprint(shard: Shard) -> str:
    stated = shard.metadata.get(schema.FINGERPRINT)
    return f"{stated.decode()}/{shard.num_rows}" if stated else content_digest([shard.path])


def _filter_stream(
    stream: StreamSource, output: str | BinaryIO, options: FilterOptions, watch: Progress
) -> FilterResult:
    fill = options.advantage == "auto" and needs_advantage(set(stream.schema.names))
    batches = whole_groups(iter(stream)) if fill else iter(stream)
    held, grades = _until_a_grade(batches)
    criteria = resolve(options.criteria, grades)
    run = json.loads(stream.metadata.get(schema.RUN, b"{}"))
    _say(criteria, grades, [run], watch)
    job = _Job(criteria, options, None)
    result = FilterResult(criteria=criteria, shards=1)
    watch.start(0)

    def judge(sink: Sink) -> None:
        for batch in chain(held, batches):
            if fill:
                job.baselines = Baselines()
                job.baselines.add(batch)
            sink.write(job.batch(batch, "-", result))
            watch.advance(int(np.sum(batch.column("num_tokens").to_numpy(zero_copy_only=False))))
        sink.close(result.counts())

    if isinstance(output, str):
        settings = {"kind": "training", "score_run": run, "input": "stream", **job.settings()}
        settings["fingerprint"] = _identity(settings)
        with OutputFolder(Path(output), settings, overwrite=options.overwrite) as folder:
            with folder.stream_shard(job.head(run, str(settings["fingerprint"]))) as sink:
                judge(sink)
            folder.finish([STREAM_SHARD], {"fingerprint": settings["fingerprint"], **result.counts()})
    else:
        judge(StreamSink(output, job.head(run)))
    return result


def _until_a_grade(batches: Iterator[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], set[str]]:
    """The first batches up to one that has policy tokens, and its grades: they decide what the criteria mean."""
    held = []
    for batch in batches:
        held.append(batch)
        grades = grades_of(batch)
        if grades:
            return held, grades
    return held, set()


class _Job:
    """What is done to each batch.

    Args:
        criteria: resolved.
        options: of the run.
        baselines: for advantages, or None.
    """

    def __init__(self, criteria: Criteria, options: FilterOptions, baselines: Baselines | None) -> None:
        self.criteria, self.options, self.baselines = criteria, options, baselines

    def settings(self) -> dict[str, object]:
        """What identifies the run besides its input."""
        return {
            "trm_audit": __version__,
            "criteria": json.loads(self.criteria.to_json()),
            "drop": self.options.drop,
            "advantage": self.options.advantage,
        }

    def head(self, score_run: Mapping[str, object], fingerprint: str = "") -> dict[bytes, bytes]:
        return head("training", fingerprint=fingerprint, run=dict(score_run), filter=self.settings())

    def shard(self, shard: Shard, sink: Sink, result: FilterResult, watch: Progress) -> None:
        """Judges a shard's rows."""
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
            sink.write(self.batch(batch, str(shard.path), result))
            watch.advance(int(np.sum(batch.column("num_tokens").to_numpy(zero_copy_only=False))))

    def batch(self, batch: pa.RecordBatch, place: str, result: FilterResult) -> pa.RecordBatch:
        """Judges a batch; the columns to write."""
        verdicts = judge(batch, self.criteria, place)
        num_tokens = batch.column("num_tokens").to_numpy(zero_copy_only=False)
        result.n_total += batch.num_rows
        result.n_kept += int(verdicts.keep.sum())
        result.tokens_total += int(num_tokens.sum())
        result.tokens_kept += int(num_tokens[verdicts.keep].sum())
        for reason in verdicts.reason:
            if reason is not None:
                result.reasons.update(causes(reason))
        fill = self.baselines is not None and needs_advantage(set(batch.schema.names))
        advantage = self.baselines.advantages(batch) if fill and self.baselines is not None else None
        out = training_columns(batch, verdicts.keep, verdicts.reason, advantage)
        return out.filter(pa.array(verdicts.keep)) if self.options.drop else out
