"""Rigorous bounds of KL and TV from the top K of one side and the whole distribution of the other (torch).

Known of pi_roll: the probabilities p_i of a set S of tokens (its top K, and the sampled token besides), and that
every other token has at most p_min, the smallest of the top K. Known of pi_theta: everything. With r = 1 - sum_S p
and s = 1 - sum_S q:

    KL >= sum_S p log(p/q) + r log(r/s)                       data processing: the tail as one bucket
    KL <= sum_S p log(p/q) + the worst tail                   p_min on the tail tokens with the smallest q
    TV in (sum_S |p-q| + |r-s|)/2 .. (sum_S |p-q| + r + s)/2

Stored log-probabilities are rounded, so p_i is only known to a factor exp(+-slack_i); each bound is widened by what
that can move it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trm_audit.numerics.rows import checked_ids, kernel

ENGINE_SLACK = 2e-5
"""What float32 engines' own normalisers are off: stored probabilities were seen to sum to 1.000015."""
TRAINER_SLACK = 2.0**-22
"""Relative rounding of log q in float32, so q is known to a factor exp(+-TRAINER_SLACK * abs(log q))."""


@dataclass(frozen=True)
class Intervals:
    """Bounds per token, [n] float64, nats. Lower bounds are at least 0; `kl_upper` may be inf."""

    kl_lower: Tensor
    kl_upper: Tensor
    tv_lower: Tensor
    tv_upper: Tensor


def intervals(
    logits: Tensor, ids: Tensor, logp: Tensor, log_floor: Tensor, step: float, logsumexp: Tensor | None = None
) -> Intervals:
    """Bounds of KL(pi_roll || pi_theta) and of TV, per row.

    Args:
        logits: [n, V] of pi_theta, floating point; any constant per row, so that log-probabilities will do too.
        ids: [n, K] int64, the tokens of S; at least one per row.
        logp: [n, K] float64 their log-probabilities under pi_roll; -inf marks an entry that is not there.
        log_floor: [n] float64 log p_min: no token outside S is more probable.
        step: relative error of a stored log-probability, 2**-11 for float16 and 2**-24 for float32.
        logsumexp: [n] float64 of the logits, if the caller has it (`row_statistics`).

    Raises:
        ValueError: an id is not in the vocabulary.
    """
    there = logp > -torch.inf
    p = torch.where(there, logp, -torch.inf).exp()
    known = checked_ids(torch.where(there, ids, ids[:, :1]), logits.shape[1])  # absent entries repeat the first id
    if logsumexp is None:
        logsumexp = kernel(logits).single(logits, None)[:, 2]
    log_q = torch.where(there, logits.gather(1, known).double() - logsumexp[:, None], 0.0)
    q = torch.where(there, log_q.exp(), 0.0)
    slack = p * torch.expm1(logp.abs().nan_to_num(0, 0, 0) * step + ENGINE_SLACK)
    r = (1 - p.sum(1)).clamp(min=0)
    log_floor = log_floor + step * log_floor.abs() + ENGINE_SLACK
    tail = _tail(logits, known, r, log_floor.exp(), logsumexp)
    s = tail.log_mass.exp()
    r = torch.where(tail.size > 0, r, 0.0)
    log_pq = torch.where(there, logp.nan_to_num(0, 0, 0) - log_q, 0.0)
    gap = (p - q).abs().sum(1)
    uncertain = TRAINER_SLACK * (1 + math.log(logits.shape[1]))  # entropies, sums of q log q, are at most log V
    spread = slack.sum(1) + uncertain
    log_s = tail.log_mass  # s itself may underflow
    excluded = (there & (p > 0) & log_q.isneginf()).any(1) | ((r > spread) & log_s.isneginf())  # for certain
    noise = uncertain + TRAINER_SLACK * ((p * _finite(log_q).abs()).sum(1) + r * _finite(log_s).abs())
    lower = (_kl_lower(p, _finite(log_pq), slack, r, log_s) - noise).clamp(min=0)
    return Intervals(
        kl_lower=torch.where(excluded, torch.inf, lower),
        kl_upper=_kl_upper(p, log_pq, slack, r, tail, log_floor) + noise,
        tv_lower=((gap + (r - s).abs()) / 2 - spread).clamp(min=0),
        tv_upper=((gap + r + s) / 2 + spread).clamp(max=1),
    )


@dataclass(frozen=True)
class _Tail:
    """log q of the tokens outside S, [n] float64 each.

    Attributes:
        size: how many.
        log_mass: log s.
        full: how many of the smallest were asked for, and are there.
        low_sum, next_low: sum of those, and the next one.
        least, most: the extremes.
    """

    size: Tensor
    log_mass: Tensor
    full: Tensor
    low_sum: Tensor
    next_low: Tensor
    least: Tensor
    most: Tensor


def _tail(logits: Tensor, known: Tensor, r: Tensor, floor: Tensor, logsumexp: Tensor) -> _Tail:
    """One visit to each row; `full` is how many tail tokens at p_min = floor a mass of r fills."""
    wanted = (r / floor).nan_to_num(0, None, 0).floor().clamp(max=logits.shape[1])
    ordered = known.sort(1).values
    size, log_mass, low_sum, *some = kernel(logits).tail(logits, ordered, wanted.long()).unbind(1)
    full = torch.minimum(wanted, size)
    low_sum = low_sum - torch.where(full > 0, full * logsumexp, 0.0)
    next_low, least, most = (one - logsumexp for one in some)
    return _Tail(size, log_mass - logsumexp, full, low_sum, next_low, least, most)


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isinf(), 0.0, values)


def _kl_lower(p: Tensor, log_pq: Tensor, slack: Tensor, r: Tensor, log_s: Tensor) -> Tensor:
    """The bucketed KL at a point inside the box of possible p, less what its tangent plane can fall within that box.

    The bucketed KL is convex in p (r = 1 - sum p), so the tangent bounds it from below everywhere.
    """
    possible = slack.sum(1).clamp(min=1e-12)  # a tail mass that may be there, and is not 0
    inside = torch.where(log_s.isneginf(), 0.0, torch.maximum(r, possible))
    scale = ((1 - inside) / p.sum(1)).clamp(max=1)[:, None]
    point = p * scale
    reach = slack + p * (1 - scale)
    log_rs = torch.where(inside > 0, inside.log() - log_s, 0.0)
    slope = log_pq + scale.log() - log_rs[:, None]
    value = (point * (log_pq + scale.log())).sum(1) + inside * log_rs
    return (value - (reach * slope.abs()).sum(1)).nan_to_num(0).clamp(min=0)


def _kl_upper(p: Tensor, log_pq: Tensor, slack: Tensor, r: Tensor, tail: _Tail, log_floor: Tensor) -> Tensor:
    """S exactly, the rest of the mass where it is worst, and what rounding can add to either."""
    floor = log_floor.exp()
    left = torch.where(tail.full < tail.size, (r - tail.full * floor).clamp(min=0), 0.0)
    worst = torch.where(tail.full > 0, floor * (tail.full * log_floor - tail.low_sum), 0.0)
    worst = worst + torch.where(left > 0, left * (left.log() - tail.next_low), 0.0)
    spread = slack.sum(1)
    least, most = (log_floor - tail.least).abs(), (spread.clamp(min=1e-300).log() - tail.most).abs()
    steepest = torch.maximum(least, most) + 1
    rounding = (slack * (log_pq.abs() + 1)).sum(1) + torch.where(tail.size > 0, spread * steepest, 0.0)
    total = (p * log_pq).sum(1) + worst + rounding
    return total.nan_to_num(torch.inf, torch.inf, torch.inf).clamp(min=0)
