"""What packing loses, measured: some rollouts are scored with their full logits and again as they would be packed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trm_audit.engine.packing import Target
from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.numerics.ragged import Ints
from trm_audit.pipeline.pack_options import PackOptions
from trm_audit.pipeline.pack_rows import Packed, Packer, Side
from trm_audit.pipeline.pack_shards import named_batches
from trm_audit.pipeline.progress import Progress, Silent
from trm_audit.pipeline.rollouts import stored_logits
from trm_audit.pipeline.selection import Selection, sample_column, sampled, select
from trm_audit.pipeline.trainer import Trainer
from trm_audit.record.evidence import Recipe
from trm_audit.report.pack_tables import SEQUENCES, TOKENS, Figures, Loss, loss_of
from trm_audit.rollout import RolloutBatch
from trm_audit.shards import schema
from trm_audit.shards.lists import ragged
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.read import Shard, find_shards
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.rows import RowRules, read_rows
from trm_audit.shards.scores import score_columns

FEW = 8
"""Rollouts that a run measures its loss on where no share is given."""
TOKENS_OF_PLAN = 1000
GRID_K, GRID_DIM = (8, 20, 64, 256), (64, 128, 256)
ROWS, MOST_TOKENS = 64, 4096
"""Rollouts, and their response tokens, that are scored in one go."""


def measure_loss(shards: Sequence[Shard], selection: Selection, options: PackOptions, watch: Progress) -> Loss | None:
    """What packing to `options.to` loses, on a few rollouts or a share of the groups; None without full logits.

    Args:
        shards: rollout shards.
        selection: names seen twice.
        options: settings, with a model.
        watch: who watches.
    """
    measure = _Measure(options, selection, watch)
    measure.take(shards, num_rows=FEW if options.measure is None else None)
    return measure.loss(options.to) if measure.samples else None


def plan(
    inputs: Sequence[str], options: PackOptions, *, tokens: int = TOKENS_OF_PLAN, progress: Progress | None = None
) -> list[Loss]:
    """What each of many ways of packing would lose, on about so many tokens of one's own data. Writes nothing.

    Args:
        inputs: folders, files, globs of rollout shards with full logits.
        options: settings, with a model; `to.recipe.seed` is that of all sketches.
        tokens: rollouts are taken, whole, until they have so many policy tokens.
        progress: who watches.

    Returns:
        Sketches of `GRID_K` x `GRID_DIM`, then lists, sampled values and q16.

    Raises:
        UsageError: there is no model.
        BadInput: there are no full logits.
    """
    watch = progress or Silent()
    if options.model is None:
        raise UsageError("what a plan compares is scored by a model", place="--plan", next_step="Give --model CKPT.")
    found = find_shards(inputs, "rollouts", options.columns)
    if found.bad and not options.skip_bad:
        raise found.bad[0]
    measure = _Measure(options, select(found.shards, options.columns, 1.0, None), watch)
    measure.take(found.shards, num_tokens=tokens)
    if not measure.samples:
        raise BadInput(
            "no rollout has full logits beside it",
            place=", ".join(inputs),
            next_step="Store those of about a thousand tokens (schemas/rollout.md), and plan with them.",
        )
    seed = options.to.recipe.seed
    targets = [Target("sketch", Recipe(k, dim, seed)) for k in GRID_K for dim in GRID_DIM]
    targets += [*(Target("topk", Recipe(k)) for k in GRID_K), Target("sampled"), Target("q16")]
    watch.start(measure.num_tokens * len(targets))
    losses = []
    for target in targets:
        losses.append(measure.loss(target))
        watch.advance(measure.num_tokens)
    return losses


@dataclass(frozen=True)
class _Sample:
    """Some rollouts with full logits: their batch, its columns' types as they were read, the logits, exact figures."""

    batch: RolloutBatch
    as_read: pa.Schema
    logits: StoredLogits
    exact: Figures


class _Measure:
    """Rollouts of a data set and what a model says of them.

    Args:
        options: settings, with a model.
        selection: names seen twice.
        watch: hears what the model has to say for itself.
    """

    def __init__(self, options: PackOptions, selection: Selection, watch: Progress) -> None:
        self._options, self._selection = options, selection
        self._trainer = Trainer(options.scoring())
        for sentence in self._trainer.remarks:
            watch.note(sentence)
        self.samples: list[_Sample] = []

    @property
    def num_tokens(self) -> int:
        """Policy tokens that are measured on."""
        return sum(len(sample.exact.tokens["kl"]) for sample in self.samples)

    def take(self, shards: Sequence[Shard], num_rows: int | None = None, num_tokens: int | None = None) -> None:
        """Scores rollouts with full logits, until so many of them or of their tokens are there."""
        most = min(num_rows or ROWS, ROWS), min(num_tokens or MOST_TOKENS, MOST_TOKENS)
        for sample in (sample for shard in shards if shard.logits for sample in self._of_shard(shard, *most)):
            self.samples.append(sample)
            rows = sum(len(one.batch) for one in self.samples)
            if rows >= (num_rows or rows + 1) or self.num_tokens >= (num_tokens or self.num_tokens + 1):
                return

    def _of_shard(self, shard: Shard, most_rows: int, most_tokens: int) -> Iterator[_Sample]:
        logits = stored_logits(shard.logits)
        assert logits is not None
        rules = self._trainer.rules(logits, self._selection.duplicates)
        share = 1.0 if self._options.measure is None else self._options.measure
        for batch, first in named_batches(shard, self._options.columns):
            wanted = np.flatnonzero(sampled(sample_column(batch), share))
            known = schema.conform(batch, schema.ROLLOUT_COLUMNS, str(shard.path))
            for rows in _together(wanted, ragged(known.column("response_ids")).lengths, most_rows, most_tokens):
                yield from self._sample(batch, rows, first, str(shard.path), rules, logits)

    def _sample(
        self, batch: pa.RecordBatch, rows: Ints, first: int, place: str, rules: RowRules, logits: StoredLogits
    ) -> Iterator[_Sample]:
        """Those of some rows that have full logits, scored; bad ones are left out where that is wanted."""
        rollouts, errors = read_rows(batch.take(pa.array(rows)), place, first + rows, rules)
        if errors and not self._options.skip_bad:
            raise errors[0]
        exact = rollouts.row_numbers[np.array([grade == "exact" for grade in rollouts.grade], dtype=np.bool_)] - first
        if not len(exact):
            return
        if len(exact) < len(rows):
            rollouts, _ = read_rows(batch.take(pa.array(exact)), place, first + exact, rules)
        try:
            yield _Sample(rollouts, batch.schema, logits, self._figures(rollouts, logits))
        except RowError:
            if not self._options.skip_bad:
                raise
            for row in exact if len(exact) > 1 else ():
                yield from self._sample(batch, np.array([row]), first, place, rules, logits)

    def loss(self, target: Target) -> Loss:
        """Packs each sample in memory, scores what that gives, and compares."""
        found, before, after = [], 0, 0
        for sample in self.samples:
            with self._packed(sample, target) as (packed, logits):
                rules = self._trainer.rules(logits, {})
                batch, errors = read_rows(packed.columns, sample.batch.shard, sample.batch.row_numbers, rules)
                if errors:
                    raise errors[0]
                found.append(self._figures(batch, logits))
                before, after = before + packed.bytes_before, after + packed.bytes_after
        exact = Figures.cat([sample.exact for sample in self.samples])
        bytes_a_token = before / self.num_tokens, after / self.num_tokens
        return loss_of(str(target), exact, Figures.cat(found), self._options.deltas, *bytes_a_token)

    def _figures(self, batch: RolloutBatch, logits: StoredLogits | None) -> Figures:
        scores = self._trainer.score(batch, logits)
        columns = score_columns(batch, scores, None, rebuilds=True)
        sequences = {name: np.asarray(columns.column(name).to_numpy(zero_copy_only=False)) for name in SEQUENCES}
        return Figures(sequences, {name: scores.tokens[name][batch.response_mask] for name in TOKENS})

    @contextmanager
    def _packed(self, sample: _Sample, target: Target) -> Iterator[tuple[Packed, StoredLogits | None]]:
        """A sample as it would be written, with the full logits that q16 leaves it."""
        assert self._trainer.model is not None
        device, vocab_size = self._trainer.model.device, self._options.vocab_size
        if target.kind != "q16":
            packer = Packer(target, device, vocab_size=vocab_size, restages=False)
            yield packer.pack(sample.batch, sample.as_read, sample.logits), None
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "logits-sample.parquet"
            with LogitsTableWriter(file, "q16") as writer:
                packer = Packer(target, device, vocab_size=vocab_size, restages=False, side=Side(writer))
                packed = packer.pack(sample.batch, sample.as_read, sample.logits)
            yield packed, StoredLogits([file])


def _together(rows: Ints, lengths: Ints, most_rows: int, most_tokens: int) -> Iterator[Ints]:
    """Rows that are scored in one go: so many, or until so many tokens are there. lengths: of all responses."""
    some: list[int] = []
    for row in rows.tolist():
        some.append(row)
        if len(some) == most_rows or lengths[some].sum() >= most_tokens:
            yield np.array(some)
            some = []
    if some:
        yield np.array(some)
