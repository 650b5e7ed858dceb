"""Reading score or training shards once, into the summary that all renderings show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import BinaryIO

import pyarrow as pa

from trm_audit.criteria.limits import limits
from trm_audit.criteria.thresholds import Criteria, describe, resolve
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.score_shards import check_finished, find_score_shards, grades_in, grades_of, judge
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.shards import schema
from trm_audit.shards.read import Found, Shard, find_shards, open_stream, read_batches, rows_at_once

BATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class ReportOptions:
    """Settings of a report.

    Attributes:
        criteria: what to judge score shards by; None reports no acceptance (training shards bring their own).
        horizon: T of the bounds; None is the longest response in the data.
        reward_range: R_max - R_min; None is taken from the data.
        allow_partial: take a score folder whose run has not finished.
    """

    criteria: Criteria | None = None
    horizon: int | None = None
    reward_range: float | None = None
    allow_partial: bool = False


def summarize(
    inputs: Sequence[str],
    options: ReportOptions,
    *,
    source: BinaryIO | None = None,
    progress: Progress | None = None,
) -> AuditSummary:
    """Everything a report says about score shards or training shards, in one pass.

    Args:
        inputs: folders, files, globs; or ["-"] for an Arrow stream of score shards from `source`.
        options: settings.
        source: where `-` is read from.
        progress: who watches.

    Raises:
        AuditError: see `errors`.
    """
    watch = progress or Silent()
    if list(inputs) == ["-"]:
        if source is None:
            raise UsageError("no stream was given to read - from")
        stream = open_stream(source, "scores", "training")
        reading = _Reading(stream.metadata, options, None)
        reading.add(stream, watch)
        run = json.loads(stream.metadata.get(schema.RUN, b"{}"))
        return reading.finish([json.loads(stream.trailer.get(schema.COUNTS, b"{}"))], [run])
    shards = _find(inputs, options, watch)
    reading = _Reading(shards[0].metadata, options, grades_in(shards))
    watch.start(sum(shard.num_tokens for shard in shards))
    for shard in shards:
        reading.add(read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)), watch)
    footers = ([shard.json(key) for shard in shards] for key in (schema.COUNTS, schema.RUN))
    return reading.finish(*footers)


def _find(inputs: Sequence[str], options: ReportOptions, watch: Progress) -> list[Shard]:
    """Training shards if there are any, otherwise the score shards of a finished run."""
    try:
        training = find_shards(inputs, "training")
    except BadInput:
        training = Found()
    if not training.shards:
        scores = find_score_shards(inputs, options.allow_partial)
        for path, reason in scores.passed_over:
            watch.note(f"{path} is passed over: {reason}")
        return scores.shards
    if training.bad:
        raise training.bad[0]
    if not options.allow_partial:
        check_finished(training.shards)
    return training.shards


class _Reading:
    """One pass over score shards, which the criteria judge, or over training shards, which bring their verdicts.

    Args:
        metadata: of the first shard or of the stream.
        options: of the report.
        grades: that occur, None for a stream, whose first batch tells.
    """

    def __init__(self, metadata: Mapping[bytes, bytes], options: ReportOptions, grades: set[str] | None) -> None:
        self._options, self._grades = options, grades
        self._judged = metadata.get(schema.KIND) == b"training"
        self._criteria = options.criteria
        if self._judged and options.criteria is not None:
            raise UsageError(
                "training shards bring their verdicts with them",
                next_step="Give the score folder to judge by other criteria, or leave the criteria out.",
            )
        if self._judged and schema.FILTER in metadata:
            self._criteria = Criteria.from_json(json.dumps(json.loads(metadata[schema.FILTER])["criteria"]))
        given = {f.name: getattr(self._criteria, f.name) for f in fields(Thresholds)} if self._criteria else {}
        self._builder = SummaryBuilder(Thresholds(**given))
        self._resolve(grades)

    def _resolve(self, grades: set[str] | None) -> None:
        if self._criteria is not None and grades:
            self._criteria = resolve(self._criteria, grades)
            self._builder.criteria = describe(self._criteria, grades)

    def add(self, batches: Iterable[pa.RecordBatch], watch: Progress) -> None:
        """Takes batches in."""
        for batch in batches:
            if not self._grades:
                self._grades = grades_of(batch)
                self._resolve(self._grades)
            self._builder.add(batch if self._judged else self._with_verdicts(batch))
            if "response_ids" in batch.schema.names:
                watch.advance(len(batch.column("response_ids").flatten()))

    def _with_verdicts(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Verdicts by the criteria, in place of columns of a user that are called the same."""
        names = [name for name in batch.schema.names if name not in ("keep", "reason")]
        own = batch.select(names)
        if self._criteria is None:
            return own
        verdicts = judge(own, self._criteria)
        own = own.append_column("keep", pa.array(verdicts.keep))
        return own.append_column("reason", pa.array(verdicts.reason, pa.string()))

    def finish(self, counts: Sequence[Mapping[str, object]], runs: Sequence[Mapping[str, object]]) -> AuditSummary:
        """The summary; counts are those of the footers or the trailer, runs what made the scores."""
        total, skipped = (sum(int(str(each.get(name, 0))) for each in counts) for name in ("n_total", "num_skipped"))
        num_dropped = max(0, total - self._builder.counts["n_total"])
        for each in counts if num_dropped else ():
            reasons = each.get("reasons")
            self._builder.reasons.update(reasons if isinstance(reasons, dict) else {})
        return self._builder.finish(
            horizon=self._options.horizon,
            reward_range=self._options.reward_range,
            num_skipped=skipped,
            num_dropped=num_dropped,
            runs=[run for run in runs if run],
            limits=limits(self._criteria, self._grades or ()) if self._criteria else (),
        )
