"""Reading score or training shards once, into the summary or the comparison that all renderings show."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from trm_audit.criteria.limits import limits
from trm_audit.criteria.thresholds import Criteria, describe, needed_columns, resolve
from trm_audit.errors import AuditError, BadInput, UsageError
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.score_shards import check_finished, find_score_shards, grades_in, grades_of, judge
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import Comparison
from trm_audit.report.compare import compare as compared
from trm_audit.report.decode import TOKENIZER_FILE, TokenText, token_text
from trm_audit.report.deltas import PAPER
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.report.widths import smallest_confidence
from trm_audit.shards import schema
from trm_audit.shards.publish import publish_text
from trm_audit.shards.read import Found, Shard, find_shards, open_stream, read_batches, rows_at_once

BATCH_BYTES = 128 << 20


@dataclass(frozen=True)
class ReportOptions:
    """Settings of a report.

    Attributes:
        criteria: what to judge score shards by (training shards bring their own); None takes the thresholds of
            arXiv 2512.23075 where the data are of one grade, and says so.
        horizon: T of the bounds; None is the longest response in the data.
        reward_range: R_max - R_min; None is taken from the data.
        target_acceptance: share of sequences that a threshold shall keep; None asks for none.
        tokenizer: folder with the `tokenizer.json` that tokens are shown as text with; None takes that of the run.
        allow_partial: take a score folder whose run has not finished.
    """

    criteria: Criteria | None = None
    horizon: int | None = None
    reward_range: float | None = None
    target_acceptance: float | None = None
    tokenizer: Path | None = None
    allow_partial: bool = False


@dataclass(frozen=True)
class Audit:
    """One data set read: the totals, which a comparison draws again, and the summary of them."""

    builder: SummaryBuilder
    summary: AuditSummary


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
    return audit(inputs, options, source=source, progress=progress).summary


def compare(a: str, b: str, options: ReportOptions, *, progress: Progress | None = None) -> Comparison:
    """Two data sets side by side, as before and after a kernel change; differences are b - a.

    Args:
        a, b: a folder, file or glob each.
        options: settings of both.
        progress: who watches.

    Raises:
        AuditError: see `errors`.
    """
    first, second = (audit([each], options, progress=progress) for each in (a, b))
    return compared(first.builder, second.builder, first.summary, second.summary, a, b)


def audit(
    inputs: Sequence[str],
    options: ReportOptions,
    *,
    source: BinaryIO | None = None,
    progress: Progress | None = None,
) -> Audit:
    """As `summarize`, with the totals that the summary was made of."""
    watch = progress or Silent()
    if list(inputs) == ["-"]:
        if source is None:
            raise UsageError("no stream was given to read - from")
        stream = open_stream(source, "scores", "training")
        run = json.loads(stream.metadata.get(schema.RUN, b"{}"))
        reading = _Reading(stream.metadata, [run], options, None, _tokenizer(options, None))
        reading.add(stream, watch)
        return reading.finish([json.loads(stream.trailer.get(schema.COUNTS, b"{}"))])
    shards = _find(inputs, options, watch)
    runs = [shard.json(schema.RUN) for shard in shards]
    reading = _Reading(shards[0].metadata, runs, options, grades_in(shards), _tokenizer(options, shards[0]))
    watch.start(sum(shard.num_tokens for shard in shards))
    for shard in shards:
        reading.add(read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)), watch)
    return reading.finish([shard.json(schema.COUNTS) for shard in shards])


def report_options(
    *,
    horizon: int | None = None,
    reward_range: float | None = None,
    target_acceptance: float | None = None,
    tokenizer: Path | None = None,
    allow_partial: bool = False,
    **criteria: Any,
) -> ReportOptions:
    """Options with the criteria given one by one, as flags are; none of them is no criteria at all."""
    given = any(value is not None and value is not False for name, value in criteria.items() if name != "undecided")
    chosen = Criteria(**criteria) if given else None
    return ReportOptions(chosen, horizon, reward_range, target_acceptance, tokenizer, allow_partial)


def write_report(text: str, file: Path, *, overwrite: bool = False) -> None:
    """Writes a report whole or not at all.

    Raises:
        UsageError: the file is there and says something else.
        OutputError: it cannot be written.
    """
    if file.exists() and not overwrite and file.read_bytes() != text.encode("utf-8"):
        raise UsageError("is there already", place=str(file), next_step="Use --overwrite, or another -o.")
    publish_text(file, text)


def _tokenizer(options: ReportOptions, shard: Shard | None) -> TokenText | None:
    """The tokenizer that was named, or the one that lies in the shard's folder."""
    if options.tokenizer is not None:
        found = token_text(options.tokenizer)
        if found is None:
            raise UsageError(
                f"{options.tokenizer} has no {TOKENIZER_FILE}",
                place="--tokenizer",
                next_step="Name the checkpoint's folder; without one tokens are shown as ids.",
            )
        return found
    return None if shard is None else token_text(shard.path.parent.parent)


def _find(inputs: Sequence[str], options: ReportOptions, watch: Progress) -> list[Shard]:
    """The shards of all inputs, each file once; two folders may well call theirs the same.

    Raises:
        BadInput: see `_find_in`; or they are of several models, or both score and training shards.
    """
    found = {shard.path.resolve(): shard for each in inputs for shard in _find_in(each, options, watch)}
    shards = list(found.values())
    kinds = {b"training" if shard.metadata.get(schema.KIND) == b"training" else b"scores" for shard in shards}
    models = {str(shard.json(schema.RUN).get("model_hash")) for shard in shards}
    for differs, what in ((kinds, "score shards and training shards"), (models, "shards of different models")):
        if len(differs) > 1:
            raise BadInput(
                f"{what} were given", place=", ".join(inputs), next_step="Report on them apart, or compare two folders."
            )
    return shards


def _find_in(name: str, options: ReportOptions, watch: Progress) -> list[Shard]:
    """Training shards if there are any, otherwise the score shards of a finished run."""
    try:
        training = find_shards([name], "training")
    except BadInput:
        training = Found()
    if not training.shards:
        scores = find_score_shards([name], options.allow_partial)
        for path, reason in scores.passed_over:
            watch.note(f"{path} is passed over: {reason}")
        return scores.shards
    if training.bad:
        raise training.bad[0]
    if not options.allow_partial:
        check_finished(training.shards)
    return training.shards


def default_criteria(grades: set[str], columns: set[str]) -> Criteria | None:
    """The thresholds of the paper, where all rows are of one grade and the columns that it is judged by are there."""
    criteria = Criteria(delta_max=PAPER["max"], delta_avg=PAPER["mean"])
    try:
        needed_columns(criteria, grades, columns)
    except AuditError:
        return None
    return criteria if grades else None


class _Reading:
    """One pass over score shards, which the criteria judge, or over training shards, which bring their verdicts.

    Args:
        metadata: of the first shard or of the stream.
        runs: what made the scores, as far as it is known.
        options: of the report.
        grades: that occur, None for a stream, whose first batch tells.
        tokenizer: for tokens as text, or None.
    """

    def __init__(
        self,
        metadata: Mapping[bytes, bytes],
        runs: Sequence[Mapping[str, object]],
        options: ReportOptions,
        grades: set[str] | None,
        tokenizer: TokenText | None,
    ) -> None:
        self._options, self._grades, self._tokenizer = options, grades, tokenizer
        self._runs = [run for run in runs if run]
        self._judged = metadata.get(schema.KIND) == b"training"
        self._criteria = options.criteria
        if self._judged and options.criteria is not None:
            raise UsageError(
                "training shards bring their verdicts with them",
                next_step="Give the score folder to judge by other criteria, or leave the criteria out.",
            )
        if self._judged and schema.FILTER in metadata:
            self._criteria = Criteria.from_json(json.dumps(json.loads(metadata[schema.FILTER])["criteria"]))
        self._builder: SummaryBuilder | None = None

    def _begin(self, batch: pa.RecordBatch) -> SummaryBuilder:
        """The builder for these criteria, or for those of the paper where none were given."""
        self._grades = self._grades or grades_of(batch)
        by_default = self._criteria is None and not self._judged
        if by_default:
            self._criteria = default_criteria(self._grades, set(batch.schema.names))
        if self._criteria is None:
            return SummaryBuilder()
        words = []
        if self._grades:
            self._criteria = resolve(self._criteria, self._grades)
            lines = describe(self._criteria, self._grades, smallest_confidence(self._runs))
            words = [f"{each}{', by default' * by_default}" for each in lines]
        given = {field.name: getattr(self._criteria, field.name) for field in fields(Thresholds)}
        return SummaryBuilder(Thresholds(**given), words)

    def add(self, batches: Iterable[pa.RecordBatch], watch: Progress) -> None:
        """Takes batches in."""
        for batch in batches:
            if self._builder is None:
                self._builder = self._begin(batch)
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

    def finish(self, counts: Sequence[Mapping[str, object]]) -> Audit:
        """Totals and summary; counts are those of the footers or the trailer."""
        builder = self._builder or SummaryBuilder()
        total, skipped = (sum(int(str(each.get(name, 0))) for each in counts) for name in ("n_total", "num_skipped"))
        num_dropped = max(0, total - builder.counts["n_total"])
        for each in counts if num_dropped else ():
            reasons = each.get("reasons")
            builder.reasons.update(reasons if isinstance(reasons, dict) else {})
        summary = builder.finish(
            horizon=self._options.horizon,
            reward_range=self._options.reward_range,
            target_acceptance=self._options.target_acceptance,
            tokenizer=self._tokenizer,
            num_skipped=skipped,
            num_dropped=num_dropped,
            runs=self._runs,
            limits=limits(self._criteria, self._grades or ()) if self._criteria else (),
        )
        return Audit(builder, summary)
