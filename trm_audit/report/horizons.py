"""How the seven bounds grow with the horizon: T = 1, 2, 4, ... up to that of the bounds block.

A response cut at T has delta and eps as measured (maxima over contexts, whatever T), D_seq of its first T tokens, and
Dbar_t for t <= T. Beyond the longest response nothing is added to either: what longer responses would add is not in
the data.
"""

from __future__ import annotations

import math

import numpy as np

from trm_audit.numerics.ragged import Floats
from trm_audit.report.blocks import BoundCurves
from trm_audit.report.bound_blocks import measured_bounds
from trm_audit.report.summary import Counts
from trm_audit.report.totals import EVIDENCE, DivergenceTotals


def bound_curves(
    evidence: dict[tuple[str, str], DivergenceTotals], counts: Counts, reward_range: float
) -> dict[str, BoundCurves]:
    """Evidence -> the bounds over all rows, in units of the reward, as functions of the horizon.

    The last point is the block that `bound_blocks` makes of the same arguments. Evidence whose rows lack per-token
    lists is left out: nothing tells how its D_seq grows.

    Args:
        evidence: (subset, evidence) -> totals; those of `all` are used.
        counts: of the whole data; without a horizon there are no bounds.
        reward_range: R_max - R_min.
    """
    out = {}
    for name in EVIDENCE:
        totals = evidence.get(("all", name))
        if totals is not None and counts.horizon is not None and totals.kl_max > -math.inf:
            by_position = totals.kl_by_position.means(totals.rows)
            if by_position is not None:
                cuts = horizons_up_to(counts.horizon)
                out[name] = _curves(totals, cuts, _kl_seq(totals, by_position, cuts), reward_range, name)
    return out


def horizons_up_to(last: int) -> list[int]:
    """1, 2, 4, ... and `last` itself; [1, 2, 4, 5] for 5."""
    return [*(1 << octave for octave in range((last - 1).bit_length())), last]


def _kl_seq(totals: DivergenceTotals, by_position: Floats, cuts: list[int]) -> list[float]:
    """D_seq of the first T tokens; at the last T the block's, which tokens miss by the rounding of what is stored."""
    whole = totals.kl_seq / totals.rows
    sums = np.append(np.cumsum(by_position), whole)
    return [float(sums[min(cut, len(sums)) - 1]) for cut in cuts[:-1]] + [whole]


def _curves(
    totals: DivergenceTotals, cuts: list[int], kl_seq: list[float], reward_range: float, name: str
) -> BoundCurves:
    drift = totals.tv_by_position()
    points = [
        measured_bounds(cut, totals, total, None if drift is None else drift[:cut], reward_range).bounds
        for cut, total in zip(cuts, kl_seq, strict=True)
    ]
    suffix = EVIDENCE[name].suffix
    return BoundCurves(
        horizons=cuts,
        published={bound + suffix: [point[bound].published for point in points] for bound in points[0]},
        sharp={bound + suffix: [point[bound].sharp for point in points] for bound in points[0]},
    )
