"""The seven error bounds for each kind of evidence, over all rows and over the kept ones."""

from __future__ import annotations

import math

from trm_audit.numerics.bounds import Bound, ErrorBounds, error_bounds
from trm_audit.numerics.ragged import Floats
from trm_audit.report import words
from trm_audit.report.summary import BoundsBlock, Counts
from trm_audit.report.totals import EVIDENCE, DivergenceTotals, Evidence


def bound_blocks(
    evidence: dict[tuple[str, str], DivergenceTotals],
    counts: Counts,
    reward_range: float,
    surrogate: float | None,
    confidence: float | None = None,
) -> dict[str, dict[str, BoundsBlock]]:
    """`all` and `kept` -> evidence -> block, as far as there is evidence with a known maximum.

    Args:
        evidence: (subset, evidence) -> totals.
        counts: of the whole data; without a horizon there are no bounds.
        reward_range: R_max - R_min.
        surrogate: L' of all rows with a reward, or None.
        confidence: of the bounds from sketches; None where nothing tells it.
    """
    out: dict[str, dict[str, BoundsBlock]] = {}
    for subset, name in sorted(evidence, key=lambda key: (key[0], [*EVIDENCE].index(key[1]))):
        totals = evidence[subset, name]
        if counts.horizon is not None and totals.kl_max > -math.inf:
            covers_all = subset == "all" and totals.rows == counts.n_total
            improvement = surrogate if covers_all else None
            label = words.evidence_label(name, subset, confidence)
            out.setdefault(subset, {})[name] = _block(name, label, totals, counts.horizon, reward_range, improvement)
    return out


def measured_bounds(
    horizon: int, totals: DivergenceTotals, kl_seq: float, drift: Floats | None, reward_range: float
) -> ErrorBounds:
    """The seven bounds with delta and eps as measured.

    Args:
        horizon: T.
        totals: of rows with a known maximum.
        kl_seq: D_seq (nats).
        drift: [at most T] Dbar_t; None where rows had no per-token values.
        reward_range: R_max - R_min.
    """
    return error_bounds(
        horizon,
        kl_max=totals.kl_max,
        kl_seq=kl_seq,
        tv_max=totals.tv_max if totals.tv_max > -math.inf else None,
        tv_by_position=drift,
        reward_range=reward_range,
    )


def _block(
    name: str, label: str, totals: DivergenceTotals, horizon: int, reward_range: float, surrogate: float | None
) -> BoundsBlock:
    evidence = EVIDENCE[name]
    drift = totals.tv_by_position()
    result = measured_bounds(horizon, totals, totals.kl_seq / totals.rows, drift, reward_range)
    inputs = _inputs(evidence, totals, drift, result)
    best = result.bounds[result.minimum]
    minorizer = None if surrogate is None else Bound(surrogate - best.published, surrogate - best.sharp)
    return BoundsBlock(
        label=label,
        rows=totals.rows,
        horizon=horizon,
        inputs=inputs,
        bounds={bound + evidence.suffix: pair for bound, pair in result.bounds.items()},
        minimum=result.minimum + evidence.suffix,
        vacuous=result.vacuous,
        sentence=_sentence(result, evidence.suffix),
        minorizer=minorizer,
    )


def _inputs(
    evidence: Evidence, totals: DivergenceTotals, drift: Floats | None, result: ErrorBounds
) -> dict[str, float | None]:
    """What went into the bounds, named after the columns it came from."""
    tv_name = f"seq_max_{evidence.tv_max}" if totals.tv_max > -math.inf else f"tv_max{evidence.suffix}"
    return {
        f"seq_max_{evidence.kl_max}": totals.kl_max,
        f"mean_seq_sum_{evidence.kl_seq}": result.kl_seq,
        tv_name: result.tv_max,
        f"mean_seq_sum_{evidence.tv_token}": None if drift is None else float(drift.sum()),
        f"tv_seq{evidence.suffix}": result.tv_seq,
    }


def _sentence(result: ErrorBounds, suffix: str) -> str:
    return result.sentence.replace(result.minimum, result.minimum + suffix)
