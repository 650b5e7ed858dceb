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

SMALL = 0.5  # below it the series is used: its last term is then 3e-10 of the first
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
    """Log-probability of one token per row, [n] float64 (nats).

    Args:
        logits: [n, V].
        ids: [n] int64.
    """
    shifted, _, log_mass = _shift(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return shifted.gather(1, ids[:, None])[:, 0].double() - log_mass[:, 0].double()


def entropies(logits: Tensor) -> Tensor:
    """Entropy per row, [n] float64 (nats). logits: [n, V], -inf allowed."""
    step = CPU_ROWS if logits.device.type == "cpu" else GPU_ROWS
    parts = []
    for i in range(0, len(logits), step):
        shifted, mass, log_mass = _shift(logits[i : i + step].to(torch.promote_types(logits.dtype, torch.float32)))
        parts.append(_entropy(mass / mass.sum(1, keepdim=True), shifted, log_mass))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=logits.device)


def _shift(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus their row maximum, the exponentials of that, and the log of those exponentials' sum ([n, 1])."""
    shifted = logits - logits.amax(1, keepdim=True)
    mass = shifted.exp()
    return shifted, mass, mass.sum(1, keepdim=True).log()


def _entropy(p: Tensor, shifted: Tensor, log_mass: Tensor) -> Tensor:
    return log_mass[:, 0].double() - torch.where(p > 0, p * shifted, 0).sum(1).double()


def _log_quotient(shifted_p: Tensor, shifted_q: Tensor, p: Tensor, q: Tensor, offset: Tensor) -> Tensor:
    """x = log q - log p, [n, V], with the normalisers' rounding taken out: sum_v p expm1(x) is 0 for the true x."""
    both_out = shifted_p.isneginf() & shifted_q.isneginf()
    x = torch.where(both_out, 0, shifted_q - shifted_p) - offset
    even, odd = _series(x)
    gap = torch.where(x.abs() < SMALL, p * (x + even + odd), q - p).sum(1, keepdim=True)
    return x - gap.log1p()


def _series(x: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd part of expm1(x) - x for abs(x) < SMALL; anything elsewhere."""
    xx = x * x
    even = xx * (1 / 2 + xx * (1 / 24 + xx * (1 / 720 + xx / 40320)))
    odd = x * xx * (1 / 6 + xx * (1 / 120 + xx * (1 / 5040 + xx / 362880)))
    return even, odd


def _rows(rollout: Tensor, trainer: Tensor) -> TokenDivergences:
    shifted_p, p, log_mass_p = _shift(rollout)
    shifted_q, q, log_mass_q = _shift(trainer)
    p = p / p.sum(1, keepdim=True)
    q = q / q.sum(1, keepdim=True)
    x = _log_quotient(shifted_p, shifted_q, p, q, log_mass_q - log_mass_p)
    small = x.abs() < SMALL
    even, odd = _series(x)  # even + odd = expm1(x) - x
    forward = torch.where(small, p * (even + odd), torch.where(p > 0, q - p - p * x, q))
    reverse = torch.where(small, q * (even - odd), torch.where(q > 0, p - q + q * x, p))
    distance = torch.where(small, p * (x + even + odd).abs(), (p - q).abs())
    out_of_p, out_of_q = shifted_p.isneginf(), shifted_q.isneginf()
    inf = torch.tensor(torch.inf, dtype=torch.float64, device=x.device)
    return TokenDivergences(
        kl=torch.where((out_of_q & ~out_of_p).any(1), inf, forward.sum(1).double()),
        kl_reverse=torch.where((out_of_p & ~out_of_q).any(1), inf, reverse.sum(1).double()),
        tv=distance.sum(1).double() / 2,
        rollout_entropy=_entropy(p, shifted_p, log_mass_p),
        trainer_entropy=_entropy(q, shifted_q, log_mass_q),
    )
