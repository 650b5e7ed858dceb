"""Top-K lists that rows have already: cut to shorter ones, in a type that says how they are rounded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from trm_audit.numerics.ragged import Ints
from trm_audit.rollout import RolloutBatch
from trm_audit.shards.lists import Lists
from trm_audit.shards.sketches import TOPK_TYPE

LISTS = ("rollout_topk_ids", "rollout_topk_logprobs")


def cut_lists(batch: RolloutBatch, row: int, k: int | None) -> Lists:
    """A row's own lists, the first k of each; None for all."""
    assert batch.topk is not None
    lengths = list_lengths(batch, row)
    first = int(batch.topk.offsets[batch.response.offsets[row]])
    here = slice(first, first + int(lengths.sum()))
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    some = within < (k if k is not None else len(within))
    shorter = np.minimum(lengths, k) if k is not None else lengths
    return batch.topk.ids[here][some], batch.topk.logprobs[here][some], shorter


def list_lengths(batch: RolloutBatch, row: int) -> Ints:
    """[response tokens] lengths of a row's lists, 0 where there is none."""
    start, stop = batch.response.offsets[row : row + 2]
    if batch.topk is None:
        return np.zeros(int(stop - start), dtype=np.int64)
    return np.diff(batch.topk.offsets[start : stop + 1])


def rounded_type(as_read: pa.Schema) -> pa.DataType:
    """Type for lists of log-probabilities: float16 unless those that were read are rounded less, as are the sampled."""
    leaves = [_leaf(as_read.field(name).type) for name in (LISTS[1], "rollout_logprobs") if name in as_read.names]
    wide = LISTS[1] in as_read.names and pa.float16() not in leaves
    return pa.list_(pa.list_(pa.float32())) if wide else TOPK_TYPE


def _leaf(kind: pa.DataType) -> pa.DataType:
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind
