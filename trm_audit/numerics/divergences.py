"""Exact divergences of two next-token distributions given as logits (torch; float32 or float64, CPU or GPU).

Everything is computed from the shifted logits, a few rows at a time so that on a CPU they stay in the cache. Shifting
by the row's maximum first is what makes the figures independent of a constant added to a row; the normalisers' own
errors enter the divergences only in second order, because each divergence is written as a sum of non-negative terms:

    KL(p || q) = sum_v (q - p - p x),   x = log q - log p

which near x = 0 is p (expm1(x) - x), a power series, and not a difference of nearly equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SMALL = 0.5  # below it the series is used: what it leaves out is then 2e-9 of its first term
OUTSIDE = -1e30  # stands for -inf in shifted logits: its exponential is 0, and 0 times it too
CPU_ROWS, GPU_ROWS = 8, 256


@dataclass(frozen=True)
class TokenDivergences:
    """Divergences of n pairs of distributions, in nats.

    Attributes:
        kl: [n] KL(pi_roll || pi_theta), inf where pi_theta excludes a token that pi_roll does not.
        kl_reverse: [n] KL(pi_theta || pi_roll), inf likewise.
        tv: [n] half the L1 distance, in [0, 1].
        rollout_entropy, trainer_entropy: [n].
    """

    kl: Tensor
    kl_reverse: Tensor
    tv: Tensor
    rollout_entropy: Tensor
    trainer_entropy: Tensor


def divergences(rollout_logits: Tensor, trainer_logits: Tensor) -> TokenDivergences:
    """KL both ways, total variation and both entropies per row, over the whole vocabulary.

    Args:
        rollout_logits: [n, V] logits or log-probabilities of pi_roll; any constant per row; -inf is probability 0.
        trainer_logits: [n, V] the same of pi_theta. Both are computed in the wider of their types, at least float32.

    Returns:
        float64 figures, [n] each. On float32 inputs KL is good to a relative 1e-4 from 1e-6 to 100, and to 1e-2 down
        to 1e-9.

    Tokens of probability 0, or underflowing to it, count with the other side's whole mass: p = (.5, .5, 0) against
    q = (.45, .45, .1) is .1054. A row of one side that is all -inf has no distribution and gives NaN.
    """
    dtype = torch.promote_types(torch.promote_types(rollout_logits.dtype, trainer_logits.dtype), torch.float32)
    step = CPU_ROWS if rollout_logits.device.type == "cpu" else GPU_ROWS
    parts = [
        _rows(rollout_logits[i : i + step].to(dtype), trainer_logits[i : i + step].to(dtype))
        for i in range(0, len(rollout_logits), step)
    ]
    if not parts:
        empty = torch.zeros(0, dtype=torch.float64, device=rollout_logits.device)
        return TokenDivergences(empty, empty, empty, empty, empty)
    return TokenDivergences(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenDivergences)))


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of one token per row, [n] float64 (nats); -inf for a token of probability 0.

    Args:
        logits: [n, V].
        ids: [n] int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = logits.amax(1, keepdim=True)
    token = (logits.gather(1, ids[:, None]) - peak)[:, 0].double()
    return token - (logits - peak).exp().sum(1).double().log()


def entropies(logits: Tensor) -> Tensor:
    """Entropy per row, [n] float64 (nats). logits: [n, V], -inf allowed."""
    step = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    parts = []
    for i in range(0, len(logits), step):
        shifted, mass, log_mass = _shift(logits[i : i + step].to(torch.promote_types(logits.dtype, torch.float32)))
        parts.append(_entropy(mass / mass.sum(1, keepdim=True), shifted, log_mass))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=logits.device)


def _shift(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus their row maximum, the exponentials of that, and the log of those exponentials' sum ([n, 1]).

    -inf becomes OUTSIDE, so that what is computed with it stays a number.
    """
    shifted = (logits - logits.amax(1, keepdim=True)).clamp_(min=OUTSIDE)
    mass = shifted.exp()
    return shifted, mass, mass.sum(1, keepdim=True).log()


def _entropy(p: Tensor, shifted: Tensor, log_mass: Tensor) -> Tensor:
    return log_mass[:, 0].double() - (p * shifted).sum(1).double()


def _rows(rollout: Tensor, trainer: Tensor) -> TokenDivergences:
    shifted_p, p, log_mass_p = _shift(rollout)
    shifted_q, q, log_mass_q = _shift(trainer)
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
    return TokenDivergences(
        kl=_infinite_where(forward.sum(1).double(), shifted_p, shifted_q),
        kl_reverse=_infinite_where(reverse.sum(1).double(), shifted_q, shifted_p),
        tv=_tv(difference, q),
        rollout_entropy=_entropy(p, shifted_p, log_mass_p),
        trainer_entropy=_entropy(q, shifted_q, log_mass_q),
    )


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
