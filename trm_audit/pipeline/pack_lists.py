"""Top-K lists of packed rows: made of full logits or cut from longer ones, in a type that says how they are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trm_audit.engine.packing import Arrays
from trm_audit.numerics.ragged import Bools, Ints
from trm_audit.rollout import RolloutBatch
from trm_audit.shards.sketches import TOPK_TYPE

LISTS = ("rollout_topk_ids", "rollout_topk_logprobs")
IDS_TYPE = pa.list_(pa.list_(pa.int32()))

Lists = tuple[NDArray[Any], NDArray[Any], Ints]
"""Ids and log-probabilities of a row's lists one after another, and the length of each, [response tokens]."""


def made_lists(kept: Arrays, mask: Bools) -> Lists:
    """Of what `engine.packing.kept_of` gives; mask: [response tokens] True for the policy's."""
    there = kept["topk_logprobs"] > -np.inf
    lengths = np.zeros(len(mask), dtype=np.int64)
    lengths[mask] = there.sum(1)
    return kept["topk_ids"][there], kept["topk_logprobs"][there], lengths


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


def list_arrays(rows: Sequence[Lists | None], kind: pa.DataType) -> tuple[pa.Array, pa.Array]:
    """list<list<int32>> and `kind`, null for a row without."""
    there = [row for row in rows if row is not None]
    none = pa.array([row is None for row in rows])
    tokens = np.cumsum([0, *(0 if row is None else len(row[2]) for row in rows)])
    entries = np.cumsum(np.concatenate([[0], *(row[2] for row in there)]))
    parts = [np.concatenate([np.zeros(0), *(row[i] for row in there)]) for i in (0, 1)]
    wanted = (IDS_TYPE, kind)
    values = (pa.array(part).cast(of.value_type.value_type, safe=False) for part, of in zip(parts, wanted, strict=True))
    ids, logprobs = (
        pa.ListArray.from_arrays(
            pa.array(tokens, pa.int32()), pa.ListArray.from_arrays(pa.array(entries, pa.int32()), flat), mask=none
        ).cast(of)
        for flat, of in zip(values, wanted, strict=True)
    )
    return ids, logprobs


def rounded_type(as_read: pa.Schema) -> pa.DataType:
    """Type for lists of log-probabilities: float16 unless those that were read are rounded less, as are the sampled."""
    leaves = [_leaf(as_read.field(name).type) for name in (LISTS[1], "rollout_logprobs") if name in as_read.names]
    wide = LISTS[1] in as_read.names and pa.float16() not in leaves
    return pa.list_(pa.list_(pa.float32())) if wide else TOPK_TYPE


def _leaf(kind: pa.DataType) -> pa.DataType:
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind
