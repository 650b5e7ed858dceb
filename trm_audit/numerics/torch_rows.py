"""Sums over rows of logits in torch: the reference of the compiled ones, and the way without a compiler.

A few rows at a time, so that on a CPU they stay in the cache. Whatever the input, the arithmetic is in float32 at
least, and each row's maximum is subtracted first, which makes the figures independent of a constant added to a row.
The three functions are the contract that `rows.cpp` and `triton_rows.py` fulfil too: float64 figures, a row each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

SMALL = 0.5  # below it the series is used: what it leaves out is then 2e-9 of its first term
OUTSIDE = -1e30  # stands for -inf in shifted logits: its exponential is 0, and 0 times it too
CPU_ROWS, GPU_ROWS = 8, 256
SORTED_ROWS = 32  # a sort holds some 20 bytes per logit


def pair(rollout: Tensor, trainer: Tensor, ids: Tensor | None) -> Tensor:
    """[n, 9] float64 in the order of TokenDivergences; log-probabilities are NaN without ids.

    Args:
        rollout, trainer: [n, V] floating point.
        ids: [n] int64 or None.
    """
    dtype = torch.promote_types(torch.promote_types(rollout.dtype, trainer.dtype), torch.float32)
    parts = [
        _pair(rollout[at].to(dtype), trainer[at].to(dtype), None if ids is None else ids[at])
        for at in _chunks(rollout, GPU_ROWS)
    ]
    return _together(parts, 9, rollout)


def single(logits: Tensor, ids: Tensor | None) -> Tensor:
    """[n, 3] float64 in the order of RowStatistics; log-probabilities are NaN without ids."""
    parts = []
    for at in _chunks(logits, GPU_ROWS):
        rows = _wide(logits[at])
        shifted, mass, log_mass = _shift(rows)
        logsumexp = _logsumexp(rows, mass)
        entropy = _entropy(mass / mass.sum(1, keepdim=True), shifted, log_mass)
        parts.append(torch.stack([_token(rows, None if ids is None else ids[at], logsumexp), entropy, logsumexp], 1))
    return _together(parts, 3, logits)


def tail(logits: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """Of the tokens of each row that are not in `ids`: [n, 6] float64.

    How many, their log-sum-exp, the sum of the `count` smallest logits, the next one (0 if there is none), the
    smallest, the largest (0 if there are none at all).

    Args:
        logits: [n, V] floating point.
        ids: [n, K] int64, ascending per row, repeated or not; K > 0.
        count: [n] int64; at most all of the tail is taken.
    """
    part = _partitioned if logits.device.type == "cpu" else _sorted
    return _together([part(_wide(logits[at]), ids[at], count[at]) for at in _chunks(logits, SORTED_ROWS)], 6, logits)


def _chunks(logits: Tensor, gpu_rows: int) -> Iterator[slice]:
    step = CPU_ROWS if logits.device.type == "cpu" else gpu_rows
    return (slice(i, i + step) for i in range(0, len(logits), step))


def _together(parts: list[Tensor], width: int, like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, width, dtype=torch.float64, device=like.device)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _shift(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus their row maximum, the exponentials of that, and the log of those exponentials' sum ([n, 1]).

    -inf becomes OUTSIDE, so that what is computed with it stays a number.
    """
    shifted = (logits - logits.amax(1, keepdim=True)).clamp_(min=OUTSIDE)
    mass = shifted.exp()
    return shifted, mass, mass.sum(1, keepdim=True).log()


def _logsumexp(logits: Tensor, mass: Tensor) -> Tensor:
    return logits.amax(1).double() + mass.sum(1).double().log()


def _token(logits: Tensor, ids: Tensor | None, logsumexp: Tensor) -> Tensor:
    if ids is None:
        return torch.full_like(logsumexp, torch.nan)
    return logits.gather(1, ids[:, None])[:, 0].double() - logsumexp


def _entropy(p: Tensor, shifted: Tensor, log_mass: Tensor) -> Tensor:
    return log_mass[:, 0].double() - (p * shifted).sum(1).double()


def _pair(rollout: Tensor, trainer: Tensor, ids: Tensor | None) -> Tensor:
    shifted_p, p, log_mass_p = _shift(rollout)
    shifted_q, q, log_mass_q = _shift(trainer)
    logsumexp_p, logsumexp_q = _logsumexp(rollout, p), _logsumexp(trainer, q)
    p /= p.sum(1, keepdim=True)
    q /= q.sum(1, keepdim=True)
    x = (shifted_q - shifted_p).sub_(log_mass_q - log_mass_p)  # log q - log p
    small = x.abs() < SMALL
    xx = x * x
    even = xx * (1 / 2 + xx * (1 / 24 + xx * (1 / 720 + xx / 40320)))
    odd = x * xx * (1 / 6 + xx * (1 / 120 + xx * (1 / 5040 + xx / 362880)))  # even + odd = expm1(x) - x
    difference = torch.where(small, p * (x + even + odd), q - p)  # q - p, with all digits where they are close
    forward = torch.where(small, p * (even + odd), difference - p * x)
    reverse = torch.where(small, q * (even - odd), q * x - difference)
    unknown = ~(logsumexp_p.isfinite() & logsumexp_q.isfinite())
    figures = [
        _infinite_where(forward.sum(1).double(), shifted_p, shifted_q).masked_fill_(unknown, torch.nan),
        _infinite_where(reverse.sum(1).double(), shifted_q, shifted_p).masked_fill_(unknown, torch.nan),
        _tv(difference, q).masked_fill_(unknown, torch.nan),
        _entropy(p, shifted_p, log_mass_p),
        _entropy(q, shifted_q, log_mass_q),
        _token(rollout, ids, logsumexp_p),
        _token(trainer, ids, logsumexp_q),
        logsumexp_p,
        logsumexp_q,
    ]
    return torch.stack(figures, 1)


def _tv(difference: Tensor, q: Tensor) -> Tensor:
    """Half the L1 norm of q - p, less the normalisers' rounding to first order (q - p sums to 0 if they are right)."""
    gap = difference.sum(1).double()
    slope = torch.where(difference > 0, q, -q).sum(1).double()
    return ((difference.abs().sum(1).double() - gap * slope) / 2).clamp(0, 1)


def _infinite_where(kl: Tensor, shifted_p: Tensor, shifted_q: Tensor) -> Tensor:
    """inf for rows where q excludes a token that p does not."""
    if not bool((shifted_q.amin(1) == OUTSIDE).any()):
        return kl
    excluded = ((shifted_q == OUTSIDE) & (shifted_p > OUTSIDE)).any(1)
    return torch.where(excluded, torch.inf, kl)


def _partitioned(logits: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """`tail` by a partition per row (0.2 ms at V = 49152, where a sort takes 4)."""
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    out = torch.zeros(len(logits), 6, dtype=torch.float64)
    out[:, 1] = _outside_logsumexp(logits, inside)
    for row, (values, known, wanted) in enumerate(zip(logits.numpy(), inside.numpy(), count.tolist(), strict=True)):
        values = values[~known]
        size = len(values)
        if size == 0:
            continue
        n = min(wanted, size)
        parted = np.partition(values, min(n, size - 1))
        upcoming = parted[n] if n < size else 0.0
        sums = size, out[row, 1], parted[:n].sum(dtype=np.float64), upcoming, parted[: n + 1].min(), values.max()
        out[row] = torch.tensor(sums, dtype=torch.float64)
    return out


def _sorted(logits: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """`tail` by one sort, for a GPU."""
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    size = inside.logical_not().sum(1, keepdim=True)
    n = torch.minimum(count[:, None], size)
    ordered = logits.masked_fill(inside, torch.inf).sort(1).values.double()
    low_sum = torch.where(n > 0, ordered.cumsum(1).gather(1, (n - 1).clamp(min=0)), 0.0)
    upcoming = torch.where(n < size, ordered.gather(1, n.clamp(max=logits.shape[1] - 1)), 0.0)
    most = ordered.gather(1, (size - 1).clamp(min=0))
    figures = [
        size.double(),
        _outside_logsumexp(logits, inside)[:, None],
        low_sum,
        upcoming,
        torch.where(size > 0, ordered[:, :1], 0.0),
        torch.where(size > 0, most, 0.0),
    ]
    return torch.cat(figures, 1)


def _outside_logsumexp(logits: Tensor, inside: Tensor) -> Tensor:
    rest = logits.masked_fill(inside, -torch.inf)
    peak = rest.amax(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    return peak[:, 0].double() + (rest - peak).exp().sum(1).double().log()
