"""Estimators of KL(pi_roll || pi_theta) from the sampled token alone (numpy, float64)."""

from __future__ import annotations

import numpy as np

from trm_audit.numerics.ragged import Floats


def sampled_divergences(log_ratio: Floats) -> dict[str, Floats]:
    """ratio, k1, k2, k3 and abs_log_ratio of sampled tokens.

    Args:
        log_ratio: [n] trainer minus rollout log-probability (nats) at the sampled token.

    Returns:
        name -> [n], `log_ratio` itself included. k3 = expm1(lr) - lr is never negative: expm1 keeps the digits that
        exp(lr) - 1 loses, and where even expm1(lr) - lr rounds below zero the value is 0. Where lr is -inf (the
        trainer excludes the token) ratio is 0 and the others are inf; where it is inf all are, but for k1.

    Source: Schulman, Approximating KL divergence (2020).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        k3 = np.where(np.isposinf(log_ratio), np.inf, np.expm1(log_ratio) - log_ratio)
        return {
            "log_ratio": log_ratio,
            "ratio": np.exp(log_ratio),
            "k1": -log_ratio,
            "k2": log_ratio * log_ratio / 2,
            "k3": np.maximum(k3, 0.0),
            "abs_log_ratio": np.abs(log_ratio),
        }
