"""Reading score or training shards once, into the summary that all renderings show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import BinaryIO

import pyarrow as pa

from trm_audit.criteria.thresholds import Criteria, describe, resolve
from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.ragged import Bools
from trm_audit.pipeline.filter import find_score_shards, grades_in, grades_of, judge
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.shards import schema
from trm_audit.shards.read import Shard, find_shards, open_stream, read_batches, rows_at_once

BATCH_TOKENS = 1 << 21


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
        stream = open_stream(source, "scores")
        builder = _builder(options, None)
        _add_all(builder, stream, watch)
        skipped = json.loads(stream.trailer.get(schema.COUNTS, b"{}")).get("num_skipped", 0)
        return builder.finish(horizon=options.horizon, reward_range=options.reward_range, num_skipped=int(skipped))
    kind, shards = _find(inputs, options)
    if kind == "training" and options.criteria is not None:
        raise UsageError(
            "training shards bring their verdicts with them",
            next_step="Give the score folder to judge by other criteria, or leave the criteria out.",
        )
    grades = None if options.criteria is None else grades_in(shards)
    builder = _builder(options, grades)
    watch.start(sum(shard.num_tokens for shard in shards))
    for shard in shards:
        _add_all(builder, read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_TOKENS)), watch)
    counts = [shard.json(schema.COUNTS) for shard in shards]
    total, skipped = (sum(int(str(each.get(name, 0))) for each in counts) for name in ("n_total", "num_skipped"))
    rows = sum(shard.num_rows for shard in shards)
    return builder.finish(
        horizon=options.horizon,
        reward_range=options.reward_range,
        num_skipped=skipped,
        num_dropped=max(0, total - rows),
    )


def _find(inputs: Sequence[str], options: ReportOptions) -> tuple[str, list[Shard]]:
    try:
        found = find_shards(inputs, "training")
    except BadInput:
        return "scores", find_score_shards(inputs, options.allow_partial).shards
    if not found.shards:
        return "scores", find_score_shards(inputs, options.allow_partial).shards
    if found.bad:
        raise found.bad[0]
    return "training", found.shards


def _builder(options: ReportOptions, grades: set[str] | None) -> SummaryBuilder:
    """A builder that judges by the criteria; grades are None for a stream, whose first batch decides."""
    if options.criteria is None:
        return SummaryBuilder()
    given = {f.name: getattr(options.criteria, f.name) for f in fields(Thresholds)}
    if grades is None:
        return SummaryBuilder(Thresholds(**given), _StreamVerdict(options.criteria), [])
    criteria = resolve(options.criteria, grades)

    def verdict(batch: pa.RecordBatch) -> Bools:
        return judge(batch, criteria).keep

    return SummaryBuilder(Thresholds(**given), verdict, describe(criteria, grades))


class _StreamVerdict:
    """Judges batches by criteria that the first of them resolves."""

    def __init__(self, criteria: Criteria) -> None:
        self._criteria = criteria

    def __call__(self, batch: pa.RecordBatch) -> Bools:
        self._criteria = resolve(self._criteria, grades_of(batch))
        return judge(batch, self._criteria).keep


def _add_all(builder: SummaryBuilder, batches: Iterable[pa.RecordBatch], watch: Progress) -> None:
    for batch in batches:
        builder.add(batch)
        if "response_ids" in batch.schema.names:
            watch.advance(len(batch.column("response_ids").flatten()))
