"""Scoring a data set: one score shard per rollout shard, each published whole, so that a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.devices import Scorers, scorers
from trm_audit.pipeline.noise import measure_stream_noise
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.rollouts import RolloutLoop
from trm_audit.pipeline.score_shards import check_finished, leave_out_strangers
from trm_audit.pipeline.selection import Selection, select, shard_fingerprint
from trm_audit.pipeline.trainer import ScoreOptions, Trainer
from trm_audit.pipeline.worker import Job, Task, load
from trm_audit.pipeline.worth import measure_stream_worth
from trm_audit.report.decode import TOKENIZER_FILE
from trm_audit.shards.publish import STREAM_SHARD, OutputFolder
from trm_audit.shards.read import Shard, StreamSource, find_shards, open_stream
from trm_audit.shards.write import Sink, StreamSink, head


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
    options.check()
    watch = progress or Silent()
    result = ScoreResult()
    if len(options.devices) > 1 and (list(inputs) == ["-"] or not isinstance(output, str)):
        raise UsageError(
            "--devices share out whole shards, of which a stream has none",
            next_step="Name one device, or read and write folders.",
        )
    if list(inputs) == ["-"]:
        if source is None:
            raise UsageError("no stream was given to read - from")
        _score_stream(open_stream(source, "rollouts"), output, options, result, watch)
        return result
    found = find_shards(inputs, "rollouts", options.columns)
    leave_out_strangers(found)
    selection = select(found.shards, options.columns, options.sample, options.limit)
    bad = [*found.bad, *selection.bad]
    _report_found(found.passed_over, bad, options, result, watch)
    _warn_of_unfinished(found.shards, watch)
    job = Job(options, chosen_shards(found.shards, selection, options), selection)
    if not isinstance(output, str):
        _score_to_stream(job, output, result, watch)
        return result
    with scorers(job, Path(output), watch) as team:
        _tell(team.remarks, watch)
        with OutputFolder(Path(output), team.run, overwrite=options.overwrite, part=options.part) as folder:
            for error in bad:
                folder.skip(error)
            _carry_tokenizer(folder, options)
            _score_folder(job, folder, team, result, watch)
    return result


def _carry_tokenizer(folder: OutputFolder, options: ScoreOptions) -> None:
    """A report shows tokens as text with the tokenizer of the model that scored them."""
    if options.model is not None:
        folder.carry(options.model / TOKENIZER_FILE)


def _tell(remarks: Sequence[str], watch: Progress) -> None:
    for sentence in remarks:
        watch.note(sentence)


def chosen_shards(shards: Sequence[Shard], selection: Selection, options: ScoreOptions) -> list[Shard]:
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


def _warn_of_unfinished(shards: Sequence[Shard], watch: Progress) -> None:
    """Rollouts that another command is still writing, or was killed over."""
    try:
        check_finished(shards)
    except BadInput as error:
        watch.note(f"Warning: {error.place}: {error.cause}; what is there is scored, run this again when the rest is")


def _score_folder(job: Job, folder: OutputFolder, team: Scorers, result: ScoreResult, watch: Progress) -> None:
    folder.begin([shard.name for shard in job.shards])
    tasks = _tasks(job, folder, result)
    watch.start(sum(task.shard.num_tokens for task in tasks))
    began = time.monotonic()
    bad = set()
    with closing(team.score(tasks, folder)) as finished:
        for scored in finished:
            if scored.error is not None:
                folder.skip(scored.error, scored.name)
                watch.note(f"left out: {scored.error}")
                bad.add(scored.name)
                continue
            result.shards += 1
            result.add(scored.counts)
    result.seconds = time.monotonic() - began
    result.bad_shards += len(bad)
    names = [shard.name for shard in job.shards if shard.name not in bad]
    result.complete = folder.finish(names, {"fingerprint": folder.run["fingerprint"]})


def _tasks(job: Job, folder: OutputFolder, result: ScoreResult) -> list[Task]:
    """The shards of this part that are not there yet; counts those that are."""
    part, parts = job.options.part
    out = []
    for shard in job.shards[part - 1 :: parts]:
        fingerprint = shard_fingerprint(str(folder.run["fingerprint"]), shard, job.selection.rows[shard.name])
        if folder.is_done(shard.name, fingerprint):
            result.done += 1
            result.num_skipped += _skipped(folder, shard.name)
        else:
            out.append(Task(shard, head("scores", fingerprint=fingerprint, run=folder.run)))
    return out


def _skipped(folder: OutputFolder, name: str) -> int:
    counts = folder.manifest()[name]["counts"]
    return int(counts["num_skipped"]) if isinstance(counts, dict) else 0


def _score_to_stream(job: Job, output: BinaryIO, result: ScoreResult, watch: Progress) -> None:
    trainer = load(replace(job, options=job.options.on_one_device()))
    run = trainer.run()
    _tell(trainer.remarks, watch)
    watch.start(sum(shard.num_tokens for shard in job.shards))
    began = time.monotonic()
    sink = StreamSink(output, head("scores", fingerprint=str(run["fingerprint"]), run=run))
    loop = RolloutLoop(trainer, job.selection, sink, watch, rebuilds=any(shard.logits for shard in job.shards))
    part, parts = job.options.part
    for shard in job.shards[part - 1 :: parts]:
        try:
            loop.shard(shard)
            result.shards += 1
        except BadInput as error:
            if not job.options.skip_bad:
                raise
            watch.note(f"left out: {error}")
            result.bad_shards += 1
    sink.close(loop.counts.to_json())
    result.add(loop.counts.to_json())
    result.seconds, result.complete = time.monotonic() - began, True


def _score_stream(
    stream: StreamSource, output: str | BinaryIO, options: ScoreOptions, result: ScoreResult, watch: Progress
) -> None:
    if options.limit is not None or options.sample < 1 or options.part != (1, 1):
        raise UsageError("--limit, --sample and --part need files, not a stream")
    trainer = Trainer(options.on_one_device())
    batches = measure_stream_worth(trainer, measure_stream_noise(trainer, iter(stream)))
    run = trainer.run()
    _tell(trainer.remarks, watch)
    began = time.monotonic()
    watch.start(0)
    metadata = head("scores", fingerprint=str(run["fingerprint"]), run=run)

    def fill(sink: Sink, folder: OutputFolder | None = None) -> None:
        loop = RolloutLoop(trainer, Selection(), sink, watch, folder)
        loop.stream(batches)
        sink.close(loop.counts.to_json())
        result.add(loop.counts.to_json())

    if isinstance(output, str):
        with OutputFolder(Path(output), run, overwrite=options.overwrite) as folder:
            _carry_tokenizer(folder, options)
            with folder.stream_shard(metadata) as sink:
                fill(sink, folder)
            folder.finish([STREAM_SHARD], {"fingerprint": run["fingerprint"]})
    else:
        fill(StreamSink(output, metadata))
    result.shards = 1
    result.seconds, result.complete = time.monotonic() - began, True
