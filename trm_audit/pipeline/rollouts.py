"""The loop over the rollouts of a shard or stream: read, check, score, write. Batches never cross shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from trm_audit.errors import AuditError, RowError
from trm_audit.numerics.ragged import Ints
from trm_audit.pipeline.progress import Progress
from trm_audit.pipeline.selection import Selection, sample_column, sampled
from trm_audit.pipeline.trainer import Trainer
from trm_audit.rollout import RolloutBatch
from trm_audit.shards import schema
from trm_audit.shards.publish import OutputFolder
from trm_audit.shards.read import Shard, read_batches, rows_at_once
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.scores import Counts, score_columns
from trm_audit.shards.write import Sink

if TYPE_CHECKING:
    from trm_audit.shards.logits import StoredLogits

BATCH_BYTES = 16 << 20  # columns of one batch; their scores take about ten times as much
WINDOW_BYTES = 256 << 20  # stored logits of one window: they fit the cache of row groups, with those cut at its ends


class RolloutLoop:
    """Batches of one or more shards, from reading to the sink.

    Args:
        trainer: scores them.
        selection: rows to take.
        sink: where they go.
        watch: who watches.
        folder: notes what `--skip-bad` leaves out, or None.
        rebuilds: other shards of the same sink have stored logits, so that every shard gets the columns these bring.
    """

    def __init__(
        self,
        trainer: Trainer,
        selection: Selection,
        sink: Sink,
        watch: Progress,
        folder: OutputFolder | None = None,
        rebuilds: bool = False,
    ) -> None:
        self._trainer, self._selection, self._sink, self._watch, self._folder = trainer, selection, sink, watch, folder
        self._rebuilds = rebuilds
        self.counts = Counts()
        self._seen: dict[int, int] = {}

    def shard(self, shard: Shard) -> None:
        """Scores the selected rows of a shard."""
        logits = stored_logits(shard.logits)
        rules = self._trainer.rules(logits, self._selection.duplicates)
        left = self._selection.rows[shard.name]
        row = 0
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
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
        logits = stored_logits(self._trainer.options.logits)
        row = 0
        for batch in batches:
            named = self._rename(batch, "-")
            rules = self._trainer.rules(logits, self._repeated(named, row))
            self._batch(named, "-", np.arange(row, row + batch.num_rows), rules, logits)
            row += batch.num_rows

    def _repeated(self, batch: pa.RecordBatch, row: int) -> dict[str, tuple[str, int]]:
        """Names of this batch that came before -> where they were first."""
        out: dict[str, tuple[str, int]] = {}
        names = batch.column("rollout_id").to_pylist() if "rollout_id" in batch.schema.names else ()
        for at, name in enumerate(names, start=row):
            first = self._seen.setdefault(hash(str(name)), at)
            if first != at:
                out.setdefault(str(name), ("-", first))
        return out

    def _rename(self, batch: pa.RecordBatch, place: str) -> pa.RecordBatch:
        names = schema.renamed(batch.schema, self._trainer.options.columns, place)
        return pa.RecordBatch.from_arrays(batch.columns, names=names)

    def _batch(
        self, batch: pa.RecordBatch, place: str, numbers: Ints, rules: RowRules, logits: StoredLogits | None
    ) -> None:
        for window in _windows(batch, logits, together=self._trainer.shares):
            rows = batch.slice(window.start, len(window))
            rollouts, errors = read_rows(rows, place, numbers[window.start : window.stop], rules)
            self._skip(errors)
            self._score(rollouts, rows, place, numbers[window.start : window.stop], rules, logits)

    def _score(
        self,
        rollouts: RolloutBatch,
        rows: pa.RecordBatch,
        place: str,
        numbers: Ints,
        rules: RowRules,
        logits: StoredLogits | None,
    ) -> None:
        """Scores checked rows; a fault that only scoring finds (in stored logits) is skipped row by row."""
        try:
            scores = self._trainer.score(rollouts, logits)
        except RowError as error:
            if not self._trainer.options.skip_bad:
                raise
            if len(rollouts) == 1:
                self._skip([error])
                return
            kept = {int(number) for number in rollouts.row_numbers}
            for i in (i for i, number in enumerate(numbers) if int(number) in kept):
                one, _ = read_rows(rows.slice(i, 1), place, numbers[i : i + 1], rules)
                self._score(one, rows.slice(i, 1), place, numbers[i : i + 1], rules, logits)
            return
        columns = score_columns(
            rollouts, scores, self._trainer.options.trainer_version, rebuilds=self._rebuilds or logits is not None
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


def stored_logits(files: Sequence[Path]) -> StoredLogits | None:
    """The side files' index, None without any; torch is loaded only if there are some."""
    if not files:
        return None
    from trm_audit.shards.logits import StoredLogits

    return StoredLogits(files)


def _windows(batch: pa.RecordBatch, logits: StoredLogits | None, *, together: bool) -> Iterator[range]:
    """Consecutive rows whose stored logits fit in memory together, so that a file of them is read once, in order.

    Args:
        together: rows with a common prompt are not parted, however large: what they share is then computed once, and
            they are compared in the order in which they are stored.
    """
    start, size = 0, 0
    for row, name in enumerate(batch.column("rollout_id").to_pylist() if logits is not None else ()):
        assert logits is not None
        own = logits.num_bytes(str(name))
        if size and size + own > WINDOW_BYTES and not (together and _continues(batch, row)):
            yield range(start, row)
            start, size = row, 0
        size += own
    if start < batch.num_rows or batch.num_rows == 0:
        yield range(start, batch.num_rows)


def _continues(batch: pa.RecordBatch, row: int) -> bool:
    """Whether a row's prompt has at least half of the prompt before it in common with that."""
    before, prompt = (batch.column("prompt_ids")[at].as_py() for at in (row - 1, row))
    if not before or not prompt:
        return False
    half = (len(before) + 1) // 2
    return bool(prompt[:half] == before[:half])
