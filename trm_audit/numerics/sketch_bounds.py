"""KL and TV of a sketched distribution from one that is known: an estimate, and bounds at a stated confidence (torch).

Known of pi_roll: the probabilities p of a list S, the mass r of all other tokens, a = R^T sqrt(p) over these. Known of
pi_theta: everything; s is its mass outside S, b = R^T sqrt(q) over the same tokens, p^ = p/r and q^ = q/s the two tails
as distributions. With d(p, q) = q - p + p log(p/q), which is never negative:

    KL = sum_S d(p, q) + d(r, s) + r KL(p^ || q^)             the chain rule: list, bucket, tail
    h  = ||a/sqrt(r) - b/sqrt(s)||^2                          estimates ||sqrt(p^) - sqrt(q^)||^2, without bias
    KL(p^ || q^) is about 2 h                                 to second order
    KL(p^ || q^) >= -2 log(1 - h/2)                           by the affinity, Jensen
    KL(p^ || q^) <= h c(min log q^/p^)                        c(x) = (expm1(x) - x)/(1 - exp(x/2))^2, which falls with x
    sum |p - q| over the tail <= |r-s| + min(r,s) sqrt(h (4 - h)), sqrt(g (2(r+s) - g)), r + s

g is ||a - b||^2, and in the bounds h and g stand for limits of what they estimate: m h / truth is distributed like a
chi-square with m degrees of freedom, or more narrowly, because sums of signs spread less than normal ones do.

Confidence is over the draw of R, which is one draw for all rows: misses come together. The bounds of KL miss by either
limit of h, the upper one of TV by the upper limit of h or of g; each limit has half of what the confidence leaves, over
the positions of the sequence. So the confidence is that of KL and that of TV, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trm_audit.numerics.intervals import ENGINE_SLACK, TRAINER_SLACK
from trm_audit.numerics.ragged import Floats, Ints
from trm_audit.numerics.rows import checked_ids, kernel
from trm_audit.numerics.sketch import LEAST_DIM, Sketch, Tail, project_tail

HALF, SUBNORMAL = 2.0**-11, 2.0**-25
"""What float16 can be off: relative, and absolute among its smallest numbers."""
SUM_SLACK = 2.0**-17
"""What float32 sums over a vocabulary are off: a tail's mass in relation to it, a projection in relation to what was
projected (2e-7 and 8e-7 were the most seen on a CPU, with 200,000 tokens)."""
FARTHEST = 2 - 2.0**-20
"""Stands for 2, the squared distance of tails that share nothing, in a lower bound that it would make infinite."""


@dataclass(frozen=True)
class SketchBounds:
    """Per token, [n] float64, KL in nats. `kl_lower <= kl_estimate <= kl_upper`.

    Attributes:
        kl_estimate: of KL(pi_roll || pi_theta), inf where pi_theta certainly excludes what pi_roll does not.
        kl_lower, kl_upper: hold together, at the stated confidence, at all positions of a sequence.
        tv_lower: certain, since no projection enters it.
        tv_upper: holds, at the stated confidence, at all positions of a sequence.
        hellinger2: estimate of sum (sqrt(p) - sqrt(q))^2 without bias, so that it may lie above 2, its largest value.
    """

    kl_estimate: Tensor
    kl_lower: Tensor
    kl_upper: Tensor
    tv_lower: Tensor
    tv_upper: Tensor
    hellinger2: Tensor


@torch.no_grad()
def compare_sketch(
    known: Sketch,
    logits: Tensor,
    *,
    seed: int,
    positions: Ints,
    step: float,
    confidence: float = 0.95,
    logsumexp: Tensor | None = None,
) -> SketchBounds:
    """An estimate and bounds of KL(pi_roll || pi_theta), and bounds of TV, per row.

    Args:
        known: sketches of n rows, on the device of the logits.
        logits: [n, V] of pi_theta, floating point; any constant per row, so that log-probabilities will do too.
        seed: that the sketches were made with.
        positions: [n] of how many positions each row's sequence consists: they share what the confidence leaves.
        step: relative error of a stored log-probability, 2**-11 for float16 and 2**-24 for float32.
        confidence: that the bounds hold at all positions of a sequence.
        logsumexp: [n] float64 of the logits, if the caller has it (`row_statistics`).

    Raises:
        ValueError: an id is not in the vocabulary, or confidence, positions or the sketches' width is out of range.
    """
    m = known.vector.shape[1]
    factors = [torch.from_numpy(one).to(logits.device) for one in chi_square_factors(m, positions, confidence)]
    there = known.topk_logprobs > -torch.inf
    ids = checked_ids(torch.where(there, known.topk_ids, known.topk_ids[:, :1]), logits.shape[1])
    if logsumexp is None:
        logsumexp = kernel(logits).single(logits, None)[:, 2]
    tail = project_tail(logits, ids, m, seed)
    log_q = torch.where(there, logits.gather(1, ids).double() - logsumexp[:, None], -torch.inf)
    log_p = torch.where(there, known.topk_logprobs.double(), -torch.inf)
    listed = _Masses(log_p, log_q, _finite(log_p).abs() * step + ENGINE_SLACK, _finite(log_q).abs() * TRAINER_SLACK)
    bucket = _bucket(known.tail_mass, tail, logsumexp)
    gap = _tail_gap(known.vector.double(), bucket, tail.vector.double(), *factors)
    return SketchBounds(*_kl(listed, bucket, gap, tail), *_tv(listed, bucket, gap), _hellinger2(listed, gap))


def chi_square_factors(m: int, positions: Ints, confidence: float) -> tuple[Floats, Floats]:
    """By what a measured squared distance is multiplied for its lower and its upper limit, [n] each.

    Args:
        m: numbers it is measured with.
        positions: [n] limits that have to hold together.
        confidence: with which they do; half of the rest to either side.

    Raises:
        ValueError: m below 64, positions below 1, or a confidence outside (0, 1).
    """
    if m < LEAST_DIM or not 0 < confidence < 1 or (np.asarray(positions) < 1).any():
        raise ValueError(f"m = {m}, confidence {confidence}: 64 at least, in (0, 1), and positions of at least 1")
    from scipy.special import gammainccinv, gammaincinv

    different, where = np.unique(positions, return_inverse=True)
    outside = (1 - confidence) / 2 / different
    factors = m / 2 / gammainccinv(m / 2, outside), m / 2 / gammaincinv(m / 2, outside)
    return factors[0][where], factors[1][where]


@dataclass(frozen=True)
class _Masses:
    """Probabilities of some sets of tokens under either side, [n, w] float64, and how well they are known.

    Attributes:
        log_p, log_q: logarithms; both -inf for a set that is not there.
        reach_p, reach_q: they are known to so much, so p to a factor exp(+-reach_p).
    """

    log_p: Tensor
    log_q: Tensor
    reach_p: Tensor
    reach_q: Tensor

    @property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @property
    def most_p(self) -> Tensor:
        return (self.log_p + self.reach_p).exp()

    @property
    def distance(self) -> Tensor:
        return (self.p - self.q).abs()

    @property
    def doubt(self) -> Tensor:
        """Of `distance`."""
        return self.p * self.reach_p.expm1() + self.q * self.reach_q.expm1()

    @property
    def divergence(self) -> Tensor:
        return _divergence(self.log_p, self.log_q)

    @property
    def least_divergence(self) -> Tensor:
        """With p and q as near to each other as they can be: d falls with the distance of the nearer one."""
        reach = self.reach_p + self.reach_q
        nearer = self.log_p + _log_ratio(self.log_p, self.log_q).clamp(-reach, reach)
        return _divergence(nearer, self.log_q) * (-self.reach_q).exp()

    @property
    def most_divergence(self) -> Tensor:
        """With p and q as far apart as they can be: d is convex, so that is at an end."""
        reach = self.reach_p + self.reach_q
        ends = (_divergence(self.log_p + move, self.log_q) for move in (reach, -reach))
        return torch.maximum(*ends) * self.reach_q.exp()


@dataclass(frozen=True)
class _TailGap:
    """Squared distances of the tails' square roots, [n] float64: measured, and their limits.

    Attributes:
        h, h_low, h_high: of the tails as distributions.
        g, g_high: of the tails as they are.
    """

    h: Tensor
    h_low: Tensor
    h_high: Tensor
    g: Tensor
    g_high: Tensor


def _bucket(tail_mass: Tensor, tail: Tail, logsumexp: Tensor) -> _Masses:
    """r and s, [n, 1]. Without a token outside the list there is no r, whatever was stored."""
    log_r = torch.where(tail.least == torch.inf, 0.0, tail_mass.double()).log()[:, None]
    log_s = (tail.log_mass - logsumexp)[:, None]
    reach_s = SUM_SLACK + _finite(log_s).abs() * TRAINER_SLACK
    return _Masses(log_r, log_s, torch.full_like(log_r, ENGINE_SLACK), reach_s)


def _tail_gap(a: Tensor, bucket: _Masses, unit_b: Tensor, low: Tensor, high: Tensor) -> _TailGap:
    """What rounding can have moved is taken off the distances, or put on them, before the chi-square's factors."""
    root_r, root_s = bucket.p[:, 0].sqrt(), bucket.q[:, 0].sqrt()
    scale = root_r.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    size = a.norm(dim=1)
    rounding = size * HALF + SUBNORMAL * a.shape[1] ** 0.5 + root_r * SUM_SLACK
    h = (a / scale[:, None] - unit_b).square().sum(1)
    off = (rounding + size * ENGINE_SLACK) / scale + SUM_SLACK
    g = (a - root_s[:, None] * unit_b).square().sum(1)
    off_g = rounding + root_s * (SUM_SLACK + bucket.reach_q[:, 0])
    return _TailGap(
        h=h,
        h_low=(h.sqrt() - off).clamp(min=0).square() * low,
        h_high=((h.sqrt() + off).square() * high).clamp(max=2),
        g=g,
        g_high=(g.sqrt() + off_g).square() * high,
    )


def _kl(listed: _Masses, bucket: _Masses, gap: _TailGap, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, lower bound, upper bound."""
    r = bucket.p[:, 0]
    least_r, most_r = r * (-bucket.reach_p[:, 0]).exp(), bucket.most_p[:, 0]
    lower = listed.least_divergence.sum(1) + bucket.least_divergence[:, 0]
    upper = listed.most_divergence.sum(1) + bucket.most_divergence[:, 0]
    lower = lower - 2 * least_r * (-gap.h_low.clamp(max=FARTHEST) / 2).log1p()
    upper = upper + torch.where(r > 0, most_r * gap.h_high * _quotient(_least_ratio(listed, bucket, tail)), 0.0)
    estimate = listed.divergence.sum(1) + bucket.divergence[:, 0] + 2 * r * gap.h
    return estimate.clamp(lower, upper), lower, upper


def _least_ratio(listed: _Masses, bucket: _Masses, tail: Tail) -> Tensor:
    """A lower limit of log q^/p^ over the tail: no p there exceeds the smallest of the list, nor r itself."""
    smallest = torch.where(listed.log_p.isneginf(), torch.inf, listed.log_p + listed.reach_p).amin(1)
    log_most = (smallest - bucket.log_p[:, 0] + bucket.reach_p[:, 0]).clamp(max=0)
    return torch.where(tail.least.isneginf(), -torch.inf, tail.least - tail.log_mass - SUM_SLACK - log_most)


def _tv(listed: _Masses, bucket: _Masses, gap: _TailGap) -> tuple[Tensor, Tensor]:
    """Lower bound, upper bound, which is never below what is certain."""
    certain = (listed.distance - listed.doubt).clamp(min=0).sum(1)
    certain = certain + (bucket.distance - bucket.doubt)[:, 0].clamp(min=0)
    most_r, most_s = bucket.most_p[:, 0], (bucket.log_q + bucket.reach_q)[:, 0].exp()
    whole, h, g = most_r + most_s, gap.h_high, torch.minimum(gap.g_high, most_r + most_s)
    moved = (bucket.distance + bucket.doubt)[:, 0] + torch.minimum(most_r, most_s) * (h * (4 - h)).sqrt()
    apart = torch.minimum(torch.minimum(whole, moved), (g * (2 * whole - g)).sqrt())
    upper = ((listed.distance + listed.doubt).sum(1) / 2 + apart / 2).clamp(max=1)
    return certain / 2, torch.maximum(upper, certain / 2)


def _hellinger2(listed: _Masses, gap: _TailGap) -> Tensor:
    return (listed.p.sqrt() - listed.q.sqrt()).square().sum(1) + gap.g


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d(p, q) = q - p + p log(p/q): as p (expm1(x) - x) or, where q is larger, as q (1 - (1 + x) exp(-x))."""
    x = _log_ratio(log_p, log_q)
    over = x.clamp(min=0, max=700)  # where p is 0, d is q
    larger = -(-over).expm1() - over * (-over).exp()
    smaller = torch.where(x.isneginf(), torch.inf, log_p.exp() * (x.expm1() - x))
    return torch.where(x > 0, log_q.exp() * larger, smaller)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log q - log p, 0 where neither is there."""
    return torch.where(log_p.isneginf() & log_q.isneginf(), 0.0, log_q - log_p)


def _quotient(x: Tensor) -> Tensor:
    """(expm1(x) - x) / (1 - exp(x/2))^2 for x <= 0, 2 at 0; near which it is taken a little further out."""
    x = x.clamp(max=-1e-3)
    return (x.expm1() - x) / (x / 2).expm1().square()


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isinf(), 0.0, values)
