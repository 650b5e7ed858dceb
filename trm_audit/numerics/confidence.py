"""What a sample says about the population: an upper limit of a share, an interval of a mean over dependent rollouts.

scipy is imported inside the functions: it costs more than everything else on the way to `--help`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trm_audit.numerics.histogram import Moments
from trm_audit.numerics.ragged import Floats


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its two-sided 95 % confidence interval.

    Attributes:
        mean: over all sequences; may be inf.
        low, high: NaN where fewer than two clusters or an infinite value leave no interval.
        clusters: number of independent units the interval counts.
    """

    mean: float
    low: float
    high: float
    clusters: int


def clopper_pearson_upper(violations: int, n: int, confidence: float = 0.95) -> float:
    """One-sided upper confidence limit of a share, exact for n independent draws; NaN for n = 0.

    Solves P(X <= violations) = 1 - confidence for X binomial(n, p). None among n gives about 3/n.
    Source: Clopper and Pearson (1934).
    """
    if n == 0:
        return math.nan
    if violations == n:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(violations + 1, n - violations, confidence))


def clustered_mean(sizes: Floats, sums: Floats, singles: Moments) -> MeanInterval:
    """Mean over sequences that come in clusters, with a cluster-robust 95 % interval.

    Args:
        sizes: [g] sequences in each cluster (rollouts of one prompt are dependent).
        sums: [g] sum of the quantity over each cluster.
        singles: the sequences that stand alone.

    Variance G/(G-1) sum_g (sum_g - size_g mean)^2 / N^2 with Student's t on G - 1 degrees of freedom; without
    clusters this is the usual interval of a mean. Source: Liang and Zeger (1986).
    """
    n = float(sizes.sum()) + singles.count
    clusters = len(sizes) + singles.count
    if n == 0:
        return MeanInterval(math.nan, math.nan, math.nan, 0)
    mean = (float(sums.sum()) + singles.count * singles.mean) / n
    if clusters < 2 or not math.isfinite(mean):
        return MeanInterval(mean, math.nan, math.nan, clusters)
    from scipy.special import stdtrit

    spread = float(((sums - sizes * mean) ** 2).sum()) + singles.m2 + singles.count * (singles.mean - mean) ** 2
    half = float(stdtrit(clusters - 1, 0.975)) * math.sqrt(spread * clusters / (clusters - 1)) / n
    return MeanInterval(mean, mean - half, mean + half, clusters)
