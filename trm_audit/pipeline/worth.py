"""Which rollouts it is measured on what other evidence would decide: the few that the noise is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import pyarrow as pa

from trm_audit.pipeline.noise import first_rollouts, of_first_batch
from trm_audit.pipeline.selection import Selection
from trm_audit.pipeline.trainer import Trainer
from trm_audit.shards.read import Shard


def measure_worth(trainer: Trainer, shards: Sequence[Shard], selection: Selection) -> None:
    """Measures on the first rollouts of a data set, where a model scores them and measuring is wanted.

    Args:
        trainer: gets the figures.
        shards: all of the run, in order.
        selection: rows of the run.
    """
    if trainer.weighs_evidence:
        trainer.measure_worth(first_rollouts(trainer, shards, selection))


def measure_stream_worth(trainer: Trainer, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Measures on the first batch of a stream, for the figures stand before it in the output. Returns all batches."""
    first = next(batches, None) if trainer.weighs_evidence else None
    if first is None:
        return batches
    trainer.measure_worth(of_first_batch(trainer, first, None))
    return chain([first], batches)
