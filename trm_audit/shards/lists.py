"""Arrow list columns as flat arrays with offsets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.ragged import Floats, Ragged


def ragged(array: pa.Array) -> Ragged:
    """A list column as values and offsets; null rows are empty. Slices and values under nulls are taken care of."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets)


def per_token(column: pa.Array | None, response: Ragged, fill: float) -> Floats:
    """A per-token column over all response tokens, `fill` where the column or its row is null."""
    out = np.full(len(response.values), fill, dtype=np.float64)
    if column is not None:
        there = np.repeat(np.asarray(column.is_valid()), response.lengths)
        values = column.flatten()
        if pa.types.is_boolean(values.type):
            values = pc.cast(values, pa.int8())
        out[there] = values.to_numpy(zero_copy_only=False)  # nulls inside become NaN
    return out
