"""Sketches in the columns of a rollout shard: how they are written, and rule 13 of schemas/rollout.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged, segment_sum
from trm_audit.rollout import Sketches, TopK
from trm_audit.shards.faults import Rows
from trm_audit.shards.lists import list_arrays, made_lists, per_token

LEAST_DIM = 64  # as in numerics.sketch, which needs torch
STORED = np.dtype("<f2")
NUMBERS = ("sketch_dim", "sketch_seed", "sketch_vocab_size")
LENGTH_RANGE = (0.1, 10.0)
"""Between these the squared length of a projection over the mass that was projected must lie. Its mean is 1 and its
spread sqrt(2 / m), 0.18 at most: outside are bytes of another type or order, or of another position."""
MASS_SLACK = 2e-3
"""What list and tail may be off 1 together, beyond the rounding of the stored values."""

Arrays = Mapping[str, NDArray[Any]]
TOPK_TYPE = pa.list_(pa.list_(pa.float16()))
"""As lists are written: half the bytes of float32. Readers widen the bounds by what the rounding can have moved."""


def sketch_columns(rows: Sequence[Arrays | None], masks: Sequence[Bools]) -> dict[str, pa.Array]:
    """The columns in which a shard holds evidence of grade `sketch`.

    Args:
        rows: of each row the arrays of `record.evidence.TokenEvidence.numpy`, one entry per policy token; None for a
            row without.
        masks: of each row [response tokens], True for its policy tokens.

    Log-probabilities of the sampled tokens, lists, projections, tail masses and entropies stand at the policy tokens;
    elsewhere 0 and empty lists.
    """
    spread = [None if row is None else _spread(row, mask) for row, mask in zip(rows, masks, strict=True)]

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([None if row is None else row[name] for row in spread], kind)

    floats = pa.list_(pa.float32())
    lists = [None if row is None else made_lists(row, mask) for row, mask in zip(rows, masks, strict=True)]
    topk_ids, topk_logprobs = list_arrays(lists, TOPK_TYPE)
    return {
        "rollout_logprobs": column("logprobs", floats),
        "rollout_topk_ids": topk_ids,
        "rollout_topk_logprobs": topk_logprobs,
        "rollout_sketch": column("vectors", pa.large_binary()),
        "rollout_tail_mass": column("tail_mass", floats),
        "rollout_entropy": column("entropy", floats),
        "sketch_dim": column("dim", pa.int32()),
        "sketch_seed": column("seed", pa.int64()),
        "sketch_vocab_size": column("vocab_size", pa.int32()),
    }


def _spread(row: Arrays, mask: Bools) -> dict[str, Any]:
    """Values of one row but its lists over all its response tokens, as Arrow takes them."""
    at = np.flatnonzero(mask)
    if len(at) != len(row["logprobs"]):
        raise ValueError(f"{len(at)} policy tokens and evidence of {len(row['logprobs'])}")
    dim = row["vectors"].shape[1]
    vectors = np.zeros((len(mask), dim), dtype=STORED)
    vectors[at] = row["vectors"]
    out: dict[str, Any] = {"vectors": vectors.tobytes(), "dim": dim}
    out |= {"seed": int(row["seed"]), "vocab_size": int(row["vocab_size"])}
    for name in ("logprobs", "tail_mass", "entropy"):
        values = np.zeros(len(mask), dtype=np.float32)
        values[at] = row[name]
        out[name] = values
    return out


def read_sketches(
    rows: Rows, response: Ragged, mask: Bools, topk: TopK | None, lists: Bools, vocab_size: int | None
) -> tuple[Sketches | None, Bools]:
    """Rule 13. The sketches, and which rows have one.

    Args:
        response: token ids.
        mask: [response tokens] True at policy tokens.
        topk: the lists, None without any.
        lists: [rows] whether the row has them.
        vocab_size: of the model, None without one.
    """
    column = rows.column("rollout_sketch")
    has = np.zeros(len(rows), dtype=np.bool_) if column is None else np.asarray(column.is_valid())
    if column is None or not has.any():
        return None, has
    numbers = {name: _number(rows, name) for name in NUMBERS}
    tails = rows.column("rollout_tail_mass")
    there = np.zeros(len(rows), dtype=np.bool_) if tails is None else np.asarray(tails.is_valid())
    step = "A sketch is made of its lists, tail masses, dimension, seed and vocabulary size (rule 13)."
    for name, values in numbers.items():
        rows.fault(np.flatnonzero(has & np.isnan(values)), f"rollout_sketch without {name}", step)
    rows.fault(np.flatnonzero(has & ~lists), "rollout_sketch without rollout_topk_ids and rollout_topk_logprobs", step)
    rows.fault(np.flatnonzero(has & ~there), "rollout_sketch without rollout_tail_mass", step)
    _check_numbers(rows, has, column, response, numbers, vocab_size)
    if rows.faults:
        return None, has
    seeds = rows.column("sketch_seed")
    assert seeds is not None
    dim = np.where(has, numbers["sketch_dim"], 0).astype(np.int64)
    seed = pc.fill_null(seeds, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    joined = b"".join(value.as_buffer() for value, is_there in zip(column, has, strict=True) if is_there)
    offsets = np.concatenate([[0], np.cumsum(dim * response.lengths)]).astype(np.int64)
    vectors = Ragged(np.frombuffer(joined, STORED).astype(np.float16, copy=False), offsets)
    found = Sketches(vectors, dim, seed, per_token(tails, response, np.nan))
    assert topk is not None
    _check_values(rows, found, response, mask, has)
    _check_masses(rows, found, topk, response, mask, has)
    return found, has


def _number(rows: Rows, name: str) -> Floats:
    column = rows.column(name)
    if column is None:
        return np.full(len(rows), np.nan)
    return np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def _check_numbers(
    rows: Rows,
    has: Bools,
    column: pa.Array,
    response: Ragged,
    numbers: Mapping[str, Floats],
    vocab_size: int | None,
) -> None:
    """Dimension, vocabulary and length of the bytes."""
    dim, vocab = numbers["sketch_dim"], numbers["sketch_vocab_size"]
    small = np.flatnonzero(has & (dim < LEAST_DIM))
    rows.fault(
        small,
        {int(row): f"sketch_dim is {dim[row]:.0f}, at least {LEAST_DIM} is needed" for row in small},
        "Below that the law of the estimate's error is not known (rule 13).",
    )
    sizes = pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
    wanted = np.nan_to_num(dim) * response.lengths * STORED.itemsize
    off = np.flatnonzero(has & (sizes != wanted))
    rows.fault(
        off,
        {int(row): f"rollout_sketch has {sizes[row]} bytes, {wanted[row]:.0f} are needed" for row in off},
        "It holds sketch_dim float16 numbers for each token of response_ids (rule 13).",
    )
    other = np.flatnonzero(has & (vocab != vocab_size)) if vocab_size is not None else ()
    rows.fault(
        other,
        {int(row): f"the sketch is of {vocab[row]:.0f} tokens, the model has {vocab_size}" for row in other},
        "A sketch cannot be cut: record with the model's vocabulary size, or score with --vocab-size of the sketch.",
    )


def _check_values(rows: Rows, found: Sketches, response: Ragged, mask: Bools, has: Bools) -> None:
    """Values at policy tokens: finite, and of the length that the tail's mass gives."""
    owner = np.repeat(np.arange(len(rows)), response.lengths)
    looked_at = mask & has[owner]
    with np.errstate(invalid="ignore"):
        strange = looked_at & ~((found.tail_mass >= 0) & (found.tail_mass <= 1 + MASS_SLACK))
    _note(rows, response, owner, strange, "rollout_tail_mass at position {at} is no probability")
    length = np.full(len(mask), np.nan)
    for row in np.flatnonzero(has).tolist():
        vectors = found.vectors[row].reshape(-1, int(found.dim[row])).astype(np.float64)
        length[response.offsets[row] : response.offsets[row + 1]] = np.square(vectors).sum(1)
    _note(rows, response, owner, looked_at & ~np.isfinite(length), "rollout_sketch at position {at} is not finite")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = length / found.tail_mass
        odd = looked_at & (found.tail_mass > 1e-5) & ~((ratio > LENGTH_RANGE[0]) & (ratio < LENGTH_RANGE[1]))
    _note(rows, response, owner, odd, "rollout_sketch at position {at} does not have the length of its tail mass")


def _check_masses(rows: Rows, found: Sketches, topk: TopK, response: Ragged, mask: Bools, has: Bools) -> None:
    """List and tail are of one distribution: together 1, but for the rounding of the list."""
    owner = np.repeat(np.arange(len(rows)), response.lengths)
    p = np.exp(np.minimum(topk.logprobs, 0))
    listed, rounding = (segment_sum(one, topk.offsets) for one in (p, p * np.abs(topk.logprobs) * topk.step))
    with np.errstate(invalid="ignore"):
        off = mask & has[owner] & ~(np.abs(listed + found.tail_mass - 1) <= MASS_SLACK + rounding)
    _note(rows, response, owner, off, "list and rollout_tail_mass at position {at} do not make 1 together")


def _note(rows: Rows, response: Ragged, owner: Ints, bad: Bools, cause: str) -> None:
    first = {int(owner[i]): int(i - response.offsets[owner[i]]) for i in np.flatnonzero(bad)[::-1]}
    rows.fault(
        sorted(first),
        {row: cause.format(at=at) for row, at in first.items()},
        "Little-endian float16 projections of what the list leaves out, and its probability (rule 13).",
    )
