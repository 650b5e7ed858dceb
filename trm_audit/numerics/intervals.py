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

import numpy as np
import torch
from torch import Tensor

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


def intervals(logq: Tensor, ids: Tensor, logp: Tensor, log_floor: Tensor, step: float) -> Intervals:
    """Bounds of KL(pi_roll || pi_theta) and of TV, per row.

    Args:
        logq: [n, V] log-probabilities of pi_theta.
        ids: [n, K] int64, the tokens of S; at least one per row.
        logp: [n, K] float64 their log-probabilities under pi_roll; -inf marks an entry that is not there.
        log_floor: [n] float64 log p_min: no token outside S is more probable.
        step: relative error of a stored log-probability, 2**-11 for float16 and 2**-24 for float32.
    """
    there = logp > -torch.inf
    p = torch.where(there, logp, -torch.inf).exp()
    known = torch.where(there, ids, ids[:, :1])  # absent entries repeat the first id, with p = 0
    log_q = torch.where(there, logq.gather(1, known).double(), 0.0)
    q = torch.where(there, log_q.exp(), 0.0)
    slack = p * torch.expm1(logp.abs().nan_to_num(0, 0, 0) * step + ENGINE_SLACK)
    in_s = torch.zeros_like(logq, dtype=torch.bool).scatter_(1, known, True)
    tail, tail_size = logq.masked_fill(in_s, torch.nan), in_s.logical_not().sum(1)
    log_s = logq.masked_fill(in_s, -torch.inf).logsumexp(1).double()  # s itself may underflow
    s = log_s.exp()
    r = (1 - p.sum(1)).clamp(min=0)
    r = torch.where(tail_size > 0, r, 0.0)
    log_pq = torch.where(there, logp.nan_to_num(0, 0, 0) - log_q, 0.0)
    gap = (p - q).abs().sum(1)
    uncertain = TRAINER_SLACK * (1 + math.log(logq.shape[1]))  # entropies, which are sums of q log q, are at most log V
    spread = slack.sum(1) + uncertain
    excluded = (there & (p > 0) & log_q.isneginf()).any(1) | ((r > spread) & log_s.isneginf())  # for certain
    noise = uncertain + TRAINER_SLACK * ((p * _finite(log_q).abs()).sum(1) + r * _finite(log_s).abs())
    lower = (_kl_lower(p, _finite(log_pq), slack, r, log_s) - noise).clamp(min=0)
    return Intervals(
        kl_lower=torch.where(excluded, torch.inf, lower),
        kl_upper=_kl_upper(p, log_pq, slack, r, tail, tail_size, log_floor + step * log_floor.abs() + ENGINE_SLACK)
        + noise,
        tv_lower=((gap + (r - s).abs()) / 2 - spread).clamp(min=0),
        tv_upper=((gap + r + s) / 2 + spread).clamp(max=1),
    )


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


def _kl_upper(
    p: Tensor, log_pq: Tensor, slack: Tensor, r: Tensor, tail: Tensor, tail_size: Tensor, log_floor: Tensor
) -> Tensor:
    """S exactly, the rest of the mass where it is worst, and what rounding can add to either."""
    floor = log_floor.exp()
    full = torch.minimum((r / floor).nan_to_num(0, None, 0).floor(), tail_size.double()).long()  # tail tokens at p_min
    low_sum, next_low, least, most = _smallest(tail, full)
    left = torch.where(full < tail_size, (r - full * floor).clamp(min=0), 0.0)
    worst = floor * (full * log_floor - low_sum)
    worst = torch.where(full > 0, worst, 0.0) + torch.where(left > 0, left * (left.log() - next_low), 0.0)
    spread = slack.sum(1)
    steepest = torch.maximum((log_floor - least).abs(), (spread.clamp(min=1e-300).log() - most).abs()) + 1
    rounding = (slack * (log_pq.abs() + 1)).sum(1) + torch.where(tail_size > 0, spread * steepest, 0.0)
    total = (p * log_pq).sum(1) + worst + rounding
    return total.nan_to_num(torch.inf, torch.inf, torch.inf).clamp(min=0)


def _smallest(tail: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row of log q (NaN is not in the tail): sum of the `count` smallest, the next one, the smallest, the largest.

    A partition per row on a CPU (0.2 ms at V = 49152, a sort takes 4), one sort on a GPU.
    """
    if tail.device.type != "cpu":
        ordered = tail.double().sort(1).values  # NaN last
        sums = torch.cat([torch.zeros_like(ordered[:, :1]), ordered.nan_to_num(0, None, None).cumsum(1)], 1)
        at = torch.minimum(count, (ordered.shape[1] - 1) * torch.ones_like(count))[:, None]
        most = torch.where(tail.isnan(), -torch.inf, tail).amax(1).double()
        return sums.gather(1, count[:, None])[:, 0], ordered.gather(1, at)[:, 0], ordered[:, 0], most
    out = np.zeros((4, len(tail)))
    for row, (values, n) in enumerate(zip(tail.numpy(), count.tolist(), strict=True)):
        values = values[~np.isnan(values)]
        if len(values) == 0:
            continue
        parted = np.partition(values, min(n, len(values) - 1))
        upcoming = parted[n] if n < len(values) else 0.0
        out[:, row] = parted[:n].sum(dtype=np.float64), upcoming, parted[: n + 1].min(), values.max()
    low_sum, next_low, least, most = torch.from_numpy(out)
    return low_sum, next_low, least, most
