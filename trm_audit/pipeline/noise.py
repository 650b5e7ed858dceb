"""Which rollouts the noise of the precision, and what other evidence would decide, are measured on.

They are the first of the whole run, or a share of its groups, whatever is left to do: a run that goes on and another
`--part` of it measure on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from trm_audit.shards.logits import StoredLogits

    Found = Iterator[tuple[RolloutBatch, StoredLogits | None]]
    """Checked rollouts, with the stored logits of their shard."""

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
        if share is None:
            found = first_rollouts(trainer, shards, selection)
        else:
            found = chain.from_iterable(_of_shard(shard, trainer, selection, share) for shard in shards)
        trainer.measure_noise(batch for batch, _ in found)


def first_rollouts(trainer: Trainer, shards: Sequence[Shard], selection: Selection) -> Found:
    """The first rollouts with policy tokens of a data set: a few, whatever shards they are in."""
    return _few(chain.from_iterable(_of_shard(shard, trainer, selection, None) for shard in shards))


def measure_stream_noise(trainer: Trainer, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Measures on the first batch of a stream, for the figures stand before it in the output. Returns all batches."""
    first = next(batches, None) if trainer.is_noisy else None
    if first is None:
        return batches
    found = of_first_batch(trainer, first, trainer.options.noise_floor)
    trainer.measure_noise(batch for batch, _ in found)
    return chain([first], batches)


def of_first_batch(trainer: Trainer, batch: pa.RecordBatch, share: float | None) -> Found:
    """A few rollouts of a stream's first batch, or a share of its groups; none of a bad one: the run will say so."""
    with suppress(BadInput):
        named, logits = _named(batch, trainer, "-"), stored_logits(trainer.options.logits)
        chosen = np.flatnonzero(sampled(sample_column(named), 1.0 if share is None else share))
        found = ((some, logits) for some in _checked(named, chosen, "-", trainer.rules(logits, {}), share))
        yield from found if share is not None else _few(found)


def _few(found: Iterable[tuple[RolloutBatch, StoredLogits | None]]) -> Found:
    """Batches until `FEW` rows with policy tokens have gone by."""
    rows = 0
    for batch, logits in found:
        yield batch, logits
        rows += sum(grade is not None for grade in batch.grade)
        if rows >= FEW:
            return


def _of_shard(shard: Shard, trainer: Trainer, selection: Selection, share: float | None) -> Found:
    """The selected rows of a shard, or a share of their groups; bad ones are left out, since the run reports them."""
    left = selection.rows[shard.name]
    with suppress(BadInput):
        logits = stored_logits(shard.logits)
        rules = trainer.rules(logits, selection.duplicates)
        for batch in read_batches(shard.path, batch_rows=rows_at_once(shard, BATCH_BYTES)):
            named = _named(batch, trainer, str(shard.path))
            chosen = np.flatnonzero(sampled(sample_column(named), selection.sample))[:left]
            left -= len(chosen)
            if share is not None:  # the hash of a group below the sample's bound is below this share of it
                chosen = np.intersect1d(chosen, np.flatnonzero(sampled(sample_column(named), selection.sample * share)))
            yield from ((some, logits) for some in _checked(named, chosen, str(shard.path), rules, share))
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
