"""The encoding `q16` of stored full logits (schemas/rollout.md): log-probabilities in 65,533 equal steps a row.

At two bytes a value it loses several times less than halves do, even halves that are 0 at each row's maximum: what
decides a divergence is the absolute error of a log-probability where probability is. A row's values lie on a grid from
its least to its largest finite log-probability; one code is kept for probability 0.

What it costs is known before it is written. With e the error of each value, at most half a step s, the divergence
between the row and what is read back is KL = log E[exp(e)] - E[e] <= 0.503 Var[e] (Bennett; s <= 0.0153 here), the
moments under the row's own distribution. Most rows have Var[e] near s^2 / 12, but an unlucky grid may put half the mass
at +s/2 and half at -s/2. Such a row is put on the grid shifted by half a step: an error d there becomes s/2 - d, the
two squares add up to s^2 / 4 at most, and so a row with Var[e] > 0.15 s^2 on one grid has less than 0.1 s^2 on the
other. KL <= 0.0755 s^2 < s^2 / 12 therefore holds for every row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_audit.errors import BadInput, RowError

NUMBERS = ("scale", "minimum", "logsumexp")
"""Before the codes of each row: three little-endian float32."""
NUMBERS_BYTES = 4 * len(NUMBERS)
ZERO = 65535
"""The code of probability 0 (-inf)."""
NUM_STEPS = 65533
"""From a row's least to its largest value: one less than there is room for, as a grid may be shifted by half a step."""
MAX_SPAN = 1000.0
"""Nats between them. With more the steps were so coarse that halves would be better."""
MOST_VARIANCE = 0.15
"""Of the rounding errors of a row, in squared steps, before its grid is shifted."""
VALUES_AT_ONCE = 1 << 16


def row_bytes(vocab_size: int) -> int:
    """Stored bytes of one position."""
    return NUMBERS_BYTES + 2 * vocab_size


def encode(logits: NDArray[Any], place: str) -> NDArray[np.uint8]:
    """Logits or log-probabilities as they are stored; a constant for each row makes no difference.

    Args:
        logits: [T, V] floating point; no NaN, no +inf, and in each row one finite value at least.
        place: said in an error.

    Returns:
        [T, row_bytes(V)]: scale, minimum, logsumexp (float32), then V codes (uint16), all little-endian. The
        logsumexp is that of minimum + scale * code, so what is read back sums to 1.

    Raises:
        BadInput: the finite values of a row span more than `MAX_SPAN`.
    """
    out = np.empty((len(logits), row_bytes(logits.shape[1])), np.uint8)
    at_once = max(1, VALUES_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), at_once):
        rows = slice(start, start + at_once)
        _encode(logits[rows].astype(np.float64), out[rows], place, start)
    return out


def _encode(logits: NDArray[np.float64], out: NDArray[np.uint8], place: str, start: int) -> None:
    """Some rows, the first at position `start`."""
    logp = logits - logits.max(1, keepdims=True)
    there = np.isfinite(logp)
    p = np.exp(logp)
    total = p.sum(1, keepdims=True)
    logp -= np.log(total)
    p /= total
    low = logp.min(1, where=there, initial=0.0)
    span = logp.max(1) - low
    _check_span(span, place, start)
    scale = (span / NUM_STEPS).astype("<f4")
    scale[scale < np.finfo(np.float32).tiny] = 0  # float32 could not hold such a step, and values so near are equal
    steps = np.where(there, logp - low[:, None], 0) / np.where(scale > 0, scale, 1)[:, None].astype(np.float64)
    codes = np.rint(steps)
    unlucky = _variance(p, codes - steps) > MOST_VARIANCE
    codes[unlucky] = np.rint(steps[unlucky] + 0.5)  # the half step is the same for all: logsumexp takes it away
    minimum = low.astype("<f4")
    values = minimum[:, None] + codes * scale[:, None].astype(np.float64)
    logsumexp = np.log(np.exp(values).sum(1, where=there)).astype("<f4")
    out[:, :NUMBERS_BYTES] = np.stack([scale, minimum, logsumexp], axis=1).view(np.uint8)
    out[:, NUMBERS_BYTES:] = np.where(there, codes, ZERO).astype("<u2").view(np.uint8)


def _variance(p: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] variance of `errors` [n, V] under the distributions `p` [n, V]."""
    mean = np.einsum("tv,tv->t", p, errors)
    return np.asarray(np.einsum("tv,tv,tv->t", p, errors, errors) - mean**2)


def _check_span(span: NDArray[np.float64], place: str, start: int) -> None:
    wide = np.flatnonzero(span > MAX_SPAN)
    if len(wide):
        raise BadInput(
            f"the finite logits at position {start + wide[0]} span {span[wide[0]]:.6g} nats, "
            f"q16 holds {MAX_SPAN:,.0f} at most",
            place=place,
            next_step="Store -inf where a token cannot be sampled, cut padding columns off, or use another encoding.",
        )


def decode(rows: NDArray[np.uint8], out: NDArray[np.float32], place: str, start: int) -> None:
    """Log-probabilities of stored rows; -inf where the probability is 0.

    Args:
        rows: [n, row_bytes(V)], as `encode` returns them.
        out: [n, V], filled. A row of nothing but `ZERO` is -inf throughout: `StoredLogits.diagnose` finds it.
        place: said in an error.
        start: response position of the first row.

    Raises:
        RowError: a row's numbers are not what a writer may write.
    """
    numbers = np.ascontiguousarray(rows[:, :NUMBERS_BYTES]).view("<f4")
    _check_numbers(numbers, place, start)
    codes = rows[:, NUMBERS_BYTES:].view("<u2")
    scale, minimum, logsumexp = numbers.astype(np.float64).T
    top = (minimum + (ZERO - 1) * scale - logsumexp).astype(np.float32)
    at_once = max(1, VALUES_AT_ONCE // out.shape[1])
    for first in range(0, len(rows), at_once):
        here = slice(first, first + at_once)
        np.subtract(codes[here], np.float32(ZERO - 1), out=out[here])  # steps below the top: exact, and few where
        out[here] *= numbers[here, :1]  # probability is, so that float32 rounds little there
        out[here] += top[here, None]
        np.copyto(out[here], -np.inf, where=codes[here] == ZERO)


def _check_numbers(numbers: NDArray[np.float32], place: str, start: int) -> None:
    """numbers: [n, 3]. Their size counts too: what is larger was never written, and would overflow."""
    most = np.array([MAX_SPAN / NUM_STEPS * (1 + 1e-6), 1e6, 1e6])
    good = (np.abs(numbers) <= most) & (numbers >= [0, -np.inf, -np.inf])
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise RowError(
            f"the {NUMBERS[column]} of q16 at position {start + row} is {numbers[row, column]:.6g}",
            place=place,
            next_step=f"It is a finite float32, scale from 0 to {MAX_SPAN / NUM_STEPS:.4g}, before the codes of each "
            "row (schemas/rollout.md, q16): store it again, or leave it out.",
        )
