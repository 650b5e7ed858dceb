"""Scores without a model: those of a batch before anything is scored, and those that the trainer itself has stored."""

from __future__ import annotations

import numpy as np

from trm_audit.engine.footing import Comparison, comparison
from trm_audit.rollout import TOKEN_SCORES, RolloutBatch, TokenScores


def empty_scores(batch: RolloutBatch, plans: list[Comparison]) -> TokenScores:
    """Scores of a batch before anything is scored: NaN everywhere."""
    n = len(batch.response.values)
    has = np.array(
        [
            not np.isnan(batch.rollout_logprobs[batch.response.offsets[row] : batch.response.offsets[row + 1]]).all()
            for row in range(len(batch))
        ],
        dtype=np.bool_,
    )
    exact = np.array([grade == "exact" for grade in batch.grade], dtype=np.bool_)
    pending = np.array([plan.rebuild is not None for plan in plans], dtype=np.bool_)
    return TokenScores(
        tokens={name: np.full(n, np.nan) for name in TOKEN_SCORES},
        rollout_logprobs=batch.rollout_logprobs.copy(),
        rebuilt=exact & (pending | ~has),
        audited_policy=[plan.audited_policy for plan in plans],
        num_disagreements=np.zeros(len(batch), dtype=np.int64),
    )


def score_stored(batch: RolloutBatch) -> TokenScores:
    """Scores with the trainer's own stored log-probabilities instead of a model (grade `sampled`).

    They are taken at the stage that `logprobs_mode` names, tempered for processed values.
    """
    assert batch.stored_trainer_logprobs is not None
    out = empty_scores(batch, [comparison(s, "sampled") for s in batch.sampling])
    values = np.where(batch.response_mask, batch.stored_trainer_logprobs, np.nan)
    out.tokens["trainer_logprobs"] = values
    out.tokens["log_ratio"] = values - batch.rollout_logprobs
    return out
