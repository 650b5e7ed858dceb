"""Exact divergences of two next-token distributions given as logits, over the whole vocabulary (CPU or GPU).

A row is visited once for everything. The normalisers' own errors enter the divergences only in second order, because
each divergence is written as a sum of non-negative terms:

    KL(p || q) = sum_v (q - p - p x),   x = log q - log p

which near x = 0 is p (expm1(x) - x), a power series, and not a difference of nearly equal numbers. `torch_rows.py` is
that in torch; `rows.py` chooses between it and compiled code that gives the same figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trm_audit.numerics.rows import checked_ids, kernel


@dataclass(frozen=True)
class TokenDivergences:
    """Divergences of n pairs of distributions, and what each row has by itself. [n] float64 each, in nats.

    Attributes:
        kl: KL(pi_roll || pi_theta), inf where pi_theta excludes a token that pi_roll does not.
        kl_reverse: KL(pi_theta || pi_roll), inf likewise.
        tv: half the L1 distance, in [0, 1].
        rollout_entropy, trainer_entropy: of either side.
        rollout_logprobs, trainer_logprobs: log-probability of the given tokens, -inf for one of probability 0; NaN
            if no tokens were given.
        rollout_logsumexp, trainer_logsumexp: of the logits as given. Not finite if and only if the row is not a
            distribution: NaN or +inf among its logits, or all of them -inf. Its other figures are then NaN.
    """

    kl: Tensor
    kl_reverse: Tensor
    tv: Tensor
    rollout_entropy: Tensor
    trainer_entropy: Tensor
    rollout_logprobs: Tensor
    trainer_logprobs: Tensor
    rollout_logsumexp: Tensor
    trainer_logsumexp: Tensor


@dataclass(frozen=True)
class RowStatistics:
    """What a row of logits has by itself, as in TokenDivergences. [n] float64 each, in nats."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


def divergences(rollout_logits: Tensor, trainer_logits: Tensor, ids: Tensor | None = None) -> TokenDivergences:
    """KL both ways, total variation, both entropies and the sampled tokens' log-probabilities, per row.

    Args:
        rollout_logits: [n, V] logits or log-probabilities of pi_roll; any constant per row; -inf is probability 0.
        trainer_logits: [n, V] the same of pi_theta. Both are float16, bfloat16, float32 or float64, as they come, and
            computed in the wider of their types, at least float32.
        ids: [n] int64, the sampled tokens.

    Returns:
        float64 figures. On float32 inputs KL is good to a relative 1e-4 from 1e-6 to 100, and to 1e-2 down to 1e-9.

    Raises:
        ValueError: the two differ in shape, or an id is not in the vocabulary.

    Tokens of probability 0, or underflowing to it, count with the other side's whole mass: p = (.5, .5, 0) against
    q = (.45, .45, .1) is .1054.
    """
    if rollout_logits.shape != trainer_logits.shape:
        raise ValueError(f"logits of shapes {tuple(rollout_logits.shape)} and {tuple(trainer_logits.shape)}")
    ids = _checked(rollout_logits, ids)
    return TokenDivergences(*kernel(rollout_logits, trainer_logits).pair(rollout_logits, trainer_logits, ids).unbind(1))


def row_statistics(logits: Tensor, ids: Tensor | None = None) -> RowStatistics:
    """Log-probability of one token, entropy and log-sum-exp per row.

    Args:
        logits: [n, V] of any type that `divergences` takes.
        ids: [n] int64.

    Raises:
        ValueError: an id is not in the vocabulary.
    """
    return RowStatistics(*kernel(logits).single(logits, _checked(logits, ids)).unbind(1))


def _checked(logits: Tensor, ids: Tensor | None) -> Tensor | None:
    if ids is not None and ids.shape != logits.shape[:1]:
        raise ValueError(f"{tuple(ids.shape)} ids for {len(logits)} rows")
    return None if ids is None else checked_ids(ids, logits.shape[1])
