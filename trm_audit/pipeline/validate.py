"""Holding rollout shards against the schema, and against what is plausible, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa

from trm_audit.errors import AuditError, BadInput, RowError
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.rollouts import stored_logits
from trm_audit.pipeline.score_shards import leave_out_strangers
from trm_audit.pipeline.selection import select
from trm_audit.rollout import RolloutBatch
from trm_audit.shards import schema
from trm_audit.shards.plausible import suspicions
from trm_audit.shards.read import find_shards, open_stream, read_batches, rows_at_once
from trm_audit.shards.rows import RowRules, read_rows

if TYPE_CHECKING:
    from trm_audit.shards.logits import StoredLogits

BATCH_BYTES = 32 << 20
LOGITS_ROWS = 64


@dataclass(frozen=True)
class ValidateOptions:
    """Settings of a check.

    Attributes:
        vocab_size: ids have to be below it; None does not check.
        columns: ours -> theirs.
        read_logits: look at every stored value, not only at where the blocks lie.
    """

    vocab_size: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    read_logits: bool = True


@dataclass
class ValidateResult:
    """What a check found.

    Attributes:
        shards, rows, num_tokens: that were read.
        grades: rows by grade.
        errors: what breaks a rule.
        warnings: what breaks none and is suspicious, with the number of rows it was seen in.
    """

    shards: int = 0
    rows: int = 0
    num_tokens: int = 0
    grades: Counter[str] = field(default_factory=Counter)
    errors: list[AuditError] = field(default_factory=list)
    warnings: Counter[str] = field(default_factory=Counter)


def validate(
    inputs: Sequence[str],
    options: ValidateOptions,
    *,
    source: BinaryIO | None = None,
    progress: Progress | None = None,
) -> ValidateResult:
    """Checks rollout shards by every rule of schemas/rollout.md. Collects errors instead of raising them.

    Args:
        inputs: folders, files, globs; or ["-"] for an Arrow stream from `source`.
        options: settings.
        source: where `-` is read from.
        progress: who watches.
    """
    watch, result = progress or Silent(), ValidateResult()
    if list(inputs) == ["-"] and source is not None:
        check = _Check(options, result, None, {})
        with _Collect(result):
            for row, batch in _numbered(open_stream(source, "rollouts")):
                check.batch(batch, "-", row)
        result.shards = 1
        return result
    found = find_shards(inputs, "rollouts", options.columns)
    leave_out_strangers(found)
    result.errors += found.bad
    for path, reason in found.passed_over:
        watch.note(f"{path} is passed over: {reason}")
    watch.start(sum(shard.num_tokens for shard in found.shards))
    duplicates = select(found.shards, options.columns, 1.0, None).duplicates
    for shard in found.shards:
        with _Collect(result):
            logits = stored_logits(shard.logits)
            check = _Check(options, result, logits, duplicates)
            batches = read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES))
            for row, batch in _numbered(batches):
                check.batch(batch, str(shard.path), row)
                watch.advance(batch.num_rows * shard.num_tokens // max(1, shard.num_rows))
        result.shards += 1
    return result


class _Collect:
    """A block whose AuditErrors become findings."""

    def __init__(self, result: ValidateResult) -> None:
        self._result = result

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, AuditError):
            self._result.errors.append(error)
            return True
        return False


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    for batch in batches:
        yield row, batch
        row += batch.num_rows


class _Check:
    """Checks the batches of one shard."""

    def __init__(
        self,
        options: ValidateOptions,
        result: ValidateResult,
        logits: StoredLogits | None,
        duplicates: Mapping[str, tuple[str, int]],
    ) -> None:
        self._options, self._result, self._logits = options, result, logits
        self._rules = RowRules(vocab_size=options.vocab_size, logits=logits, mode_given=False, duplicates=duplicates)

    def batch(self, batch: pa.RecordBatch, place: str, first_row: int) -> None:
        """Checks one batch by every rule."""
        names = schema.renamed(batch.schema, self._options.columns, place)
        named = pa.RecordBatch.from_arrays(batch.columns, names=names)
        rollouts, errors = read_rows(named, place, np.arange(first_row, first_row + batch.num_rows), self._rules)
        self._result.errors += errors
        self._result.rows += batch.num_rows
        self._result.num_tokens += int(rollouts.response_mask.sum())
        self._result.grades.update(grade for grade in rollouts.grade if grade is not None)
        self._result.warnings.update(suspicions(rollouts))
        if self._logits is not None and self._options.read_logits:
            for row, grade in enumerate(rollouts.grade):
                if grade == "exact":
                    self._read(self._logits, rollouts, row)

    def _read(self, logits: StoredLogits, batch: RolloutBatch, row: int) -> None:
        with _Collect(self._result):
            for start in range(0, int(batch.response.lengths[row]), LOGITS_ROWS):
                stop = min(start + LOGITS_ROWS, int(batch.response.lengths[row]))
                try:
                    logits.rows(batch.rollout_id[row], start, stop)
                except RowError as error:
                    raise BadInput(
                        f"{error.place}: {error.cause}", place=batch.place(row), next_step=error.next_step
                    ) from error
