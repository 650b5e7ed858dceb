"""Which rollouts the noise of the precision is measured on.

They are the first of the whole run, or a share of its groups, whatever is left to do: a run that goes on and another
`--part` of it measure on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

import numpy as np
import pyarrow as pa

from trm_audit.errors import BadInput
from trm_audit.numerics.ragged import Ints
from trm_audit.pipeline.rollouts import BATCH_BYTES, stored_logits
from trm_audit.pipeline.selection import Selection, sample_column, sampled
from trm_audit.pipeline.trainer import Trainer
from trm_audit.rollout import RolloutBatch
from trm_audit.shards import schema
from trm_audit.shards.read import Shard, read_batches, rows_at_once
from trm_audit.shards.rows import RowRules, read_rows

FEW = 8


def measure_noise(trainer: Trainer, shards: Sequence[Shard], selection: Selection) -> None:
    """Measures on rollouts of a data set, where there is something to measure.

    Args:
        trainer: gets the figures.
        shards: all of the run, in order.
        selection: rows of the run.
    """
    if trainer.is_noisy:
        share = trainer.options.noise_floor
        found = chain.from_iterable(_of_shard(shard, trainer, selection, share) for shard in shards)
        trainer.measure_noise(found if share is not None else _few(found))


def measure_stream_noise(trainer: Trainer, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Measures on the first batch of a stream, for the figures stand before it in the output. Returns all batches."""
    first = next(batches, None) if trainer.is_noisy else None
    if first is None:
        return batches
    share = trainer.options.noise_floor
    with suppress(BadInput):  # the run itself will say so
        named = _named(first, trainer, "-")
        rules = trainer.rules(stored_logits(trainer.options.logits), {})
        of_share = sampled(sample_column(named), 1.0 if share is None else share)
        found = _checked(named, np.flatnonzero(of_share), "-", rules, share)
        trainer.measure_noise(found if share is not None else _few(found))
    return chain([first], batches)


def _few(batches: Iterable[RolloutBatch]) -> Iterator[RolloutBatch]:
    """Batches until `FEW` rows with policy tokens have gone by."""
    rows = 0
    for batch in batches:
        yield batch
        rows += sum(grade is not None for grade in batch.grade)
        if rows >= FEW:
            return


def _of_shard(shard: Shard, trainer: Trainer, selection: Selection, share: float | None) -> Iterator[RolloutBatch]:
    """The selected rows of a shard, or a share of their groups; bad ones are left out, since the run reports them."""
    left = selection.rows[shard.name]
    with suppress(BadInput):
        rules = trainer.rules(stored_logits(shard.logits), selection.duplicates)
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
            named = _named(batch, trainer, str(shard.path))
            chosen = np.flatnonzero(sampled(sample_column(named), selection.sample))[:left]
            left -= len(chosen)
            if share is not None:  # the hash of a group below the sample's bound is below this share of it
                chosen = np.intersect1d(chosen, np.flatnonzero(sampled(sample_column(named), selection.sample * share)))
            yield from _checked(named, chosen, str(shard.path), rules, share)
            if left == 0:
                return


def _checked(
    named: pa.RecordBatch, chosen: Ints, place: str, rules: RowRules, share: float | None
) -> Iterator[RolloutBatch]:
    """Chosen rows that keep the rules, a few at a time where a few are wanted."""
    step = FEW if share is None else max(1, len(chosen))
    for i in range(0, len(chosen), step):
        rows = chosen[i : i + step]
        rollouts, _ = read_rows(named.take(pa.array(rows, pa.int64())), place, rows, rules)
        if len(rollouts):
            yield rollouts


def _named(batch: pa.RecordBatch, trainer: Trainer, place: str) -> pa.RecordBatch:
    names = schema.renamed(batch.schema, trainer.options.columns, place)
    return pa.RecordBatch.from_arrays(batch.columns, names=names)
