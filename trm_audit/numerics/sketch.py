"""A whole distribution in a few hundred bytes: its top K, and a random projection of the square roots of the rest.

The Euclidean distance of the square roots of two distributions is the Hellinger distance, and a projection by random
signs keeps Euclidean distances up to a known error. So the sampler's side stores m numbers a = R^T sqrt(p_tail)
beside its top K, the trainer's side makes b = R^T sqrt(q_tail) with the same R, and ||a - b|| says how far apart the
tails are (`sketch_bounds.py`). The top K are left out before projecting: their large square roots would drown the
tail's in rounding.

Sources: Johnson and Lindenstrauss (1984); Guha, Indyk and McGregor (2007) for sketches of the Hellinger distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trm_audit.numerics.divergences import row_statistics
from trm_audit.numerics.signs import project

LEAST_DIM = 64
"""Columns below which the law of the error is not a chi-square's: two tokens can then cancel in every column."""
CPU_LOGITS, GPU_LOGITS = 1 << 22, 1 << 26
"""Logits that are worked on at once, of which two float32 copies are held."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of n distributions.

    Attributes:
        topk_ids: [n, K] int64, the most probable tokens, the first one first.
        topk_logprobs: [n, K] their log-probabilities, float32 as `sketch` makes them; -inf for a token of probability
            0, which stands for no token.
        vector: [n, m] float16, R^T sqrt(p) over all other tokens.
        tail_mass: [n] float64, the probability of all other tokens: not one minus the sum of the list, whose digits
            have cancelled. 0 only if each of them has logit -inf.
        entropy: [n] float64, of the whole distribution, in nats.
    """

    topk_ids: Tensor
    topk_logprobs: Tensor
    vector: Tensor
    tail_mass: Tensor
    entropy: Tensor


@torch.no_grad()
def sketch(logits: Tensor, k: int, m: int, seed: int, temperature: float = 1.0) -> Sketch:
    """Sketches of the distributions that n rows of logits give at a temperature.

    Args:
        logits: [n, V] floating point, on any device; any constant per row; -inf is probability 0.
        k: tokens kept exactly; all V where there are fewer.
        m: numbers kept of the others, at least 64; the estimate's relative error is about sqrt(2 / m).
        seed: of the signs. Sketches can only be compared under the same seed, m and V.
        temperature: above 0; the logits are divided by it.

    Raises:
        ValueError: k, m or the temperature is out of range.

    A row that is not a distribution (NaN, +inf or nothing but -inf among its logits) gives NaN.
    """
    if k < 1 or m < LEAST_DIM:
        raise ValueError(f"k = {k} and m = {m}: at least 1 and {LEAST_DIM} are needed")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature}: a number above 0 is needed")
    parts = [_sketch(logits[at], min(k, logits.shape[1]), m, seed, temperature) for at in pieces(logits)]
    return Sketch(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Sketch)))


@dataclass(frozen=True)
class Tail:
    """Tokens outside a list, of n rows of logits.

    Attributes:
        log_mass: [n] float64, log-sum-exp of their logits, -inf if there are none or all are -inf.
        least: [n] float64, the smallest of their logits, +inf if there are none.
        vector: [n, m] float32, R^T sqrt of their probabilities among themselves: a projected vector of length 1, so
            that a tail that underflows beside its list is as good as any. 0 where there are none.
    """

    log_mass: Tensor
    least: Tensor
    vector: Tensor


@torch.no_grad()
def project_tail(logits: Tensor, ids: Tensor, m: int, seed: int) -> Tail:
    """The projection of everything but some tokens.

    Args:
        logits: [n, V] floating point.
        ids: [n, K] int64, the tokens left out, repeated or not; below V.
        m, seed: of the signs.
    """
    parts = [_project_tail(_wide(logits[at]), ids[at], m, seed) for at in pieces(logits)]
    return Tail(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Tail)))


def pieces(logits: Tensor) -> Iterator[slice]:
    """Rows that are worked on at once; one empty piece where there are none."""
    budget = CPU_LOGITS if logits.device.type == "cpu" else GPU_LOGITS
    step = max(1, budget // logits.shape[1])
    return (slice(i, i + step) for i in range(0, max(1, len(logits)), step))


def _wide(logits: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)


def _sketch(logits: Tensor, k: int, m: int, seed: int, temperature: float) -> Sketch:
    scaled = _wide(logits)
    if temperature != 1.0:  # the maximum first, so that a constant costs no digits
        scaled = scaled.sub_(scaled.amax(1, keepdim=True)).div_(temperature)
    whole = row_statistics(scaled)
    top = scaled.topk(k, dim=1)
    log_top = top.values.double() - whole.logsumexp[:, None]
    tail = _project_tail(scaled, top.indices, m, seed)
    mass = (tail.log_mass - whole.logsumexp).exp()
    none, smallest = tail.log_mass.isneginf() & whole.logsumexp.isfinite(), torch.finfo(torch.float64).tiny
    return Sketch(
        topk_ids=top.indices,
        topk_logprobs=log_top.float(),
        vector=(mass.sqrt()[:, None] * tail.vector).half(),
        tail_mass=torch.where(none, 0.0, mass.clamp(max=1, min=smallest)),
        entropy=whole.entropy,
    )


def _project_tail(rows: Tensor, ids: Tensor, m: int, seed: int) -> Tail:
    """`rows` is overwritten."""
    least = rows.scatter_(1, ids, torch.inf).amin(1)
    peak = rows.scatter_(1, ids, -torch.inf).amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).min)
    roots = rows.sub_(peak).div_(2).exp_()
    mass = roots.square().sum(1)  # 1 at least, from the largest, if there are any
    return Tail(
        log_mass=peak[:, 0].double() + mass.double().log(),
        least=least.double(),
        vector=project(roots, m, seed) / mass.clamp(min=1).sqrt()[:, None].float(),
    )
