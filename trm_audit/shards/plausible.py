"""What breaks no rule of the schema and is suspicious all the same: traps that real engines and trainers set."""

from __future__ import annotations

from collections import Counter

import numpy as np

from trm_audit.numerics.ragged import Bools, segment_sum
from trm_audit.rollout import Grade, RolloutBatch, Sampling

MANY_ZEROS = 0.3
LONG_RUN = 8

RAW_TRUNCATED = (
    "raw log-probabilities of a truncated sampler (top_p, top_k): the sampled tokens are not drawn from what is "
    "stored, and nothing can be said of the truncated policy"
)
RAW_TEMPERED = "raw log-probabilities at a temperature other than 1: only the untempered policies can be compared"
TEMPERED_TRUNCATED = "tempered log-probabilities of a truncated sampler: nothing can be said of the truncated policy"
NO_POLICY_TOKENS = "no token was sampled by the policy: the row is never kept and counts in N"
ZERO_RUNS = "runs of log-probabilities of exactly 0.0 where response_mask is true: placeholders, they say probability 1"
ZERO_TAIL = "the response ends in log-probabilities that are all 0.0: padding that was not cut?"
SEVERAL_VERSIONS = "several policy versions in one response: staleness is that of the oldest"


def suspicions(batch: RolloutBatch) -> Counter[str]:
    """Sentences about a batch, each with the number of rows that it is true of."""
    out: Counter[str] = Counter()
    for sampling, grade in zip(batch.sampling, batch.grade, strict=True):
        sentence = _stage(sampling, grade)
        if sentence is not None:
            out[sentence] += 1
    _zeros(batch, out)
    empty = segment_sum(batch.response_mask.astype(np.float64), batch.response.offsets) == 0
    out[NO_POLICY_TOKENS] += int(empty.sum())
    for name, what in (("temperature", "taken as 1"), ("logprobs_mode", "taken as raw")):
        there = name in batch.columns.schema.names
        out[f"{name} is not stored: {what}"] += batch.columns.column(name).null_count if there else len(batch)
    if "policy_version" in batch.columns.schema.names:
        for versions in batch.columns.column("policy_version").to_pylist():
            out[SEVERAL_VERSIONS] += isinstance(versions, list) and len(set(versions)) > 1
    return +out  # without those that were not seen


def _stage(sampling: Sampling, grade: Grade | None) -> str | None:
    """What the stage of the stored values keeps an audit from saying; full logits can be brought to any stage."""
    if grade in ("exact", None) or sampling.logprobs_mode == "processed":
        return None
    if sampling.truncates:
        return RAW_TRUNCATED if sampling.logprobs_mode == "raw" else TEMPERED_TRUNCATED
    return RAW_TEMPERED if sampling.logprobs_mode == "raw" and sampling.temperature != 1 else None


def _zeros(batch: RolloutBatch, out: Counter[str]) -> None:
    """Exact zeros are common after truncation (a nucleus of one token) and a placeholder otherwise."""
    offsets, mask = batch.response.offsets, batch.response_mask
    zero = (batch.rollout_logprobs == 0) & mask
    tokens = segment_sum(mask.astype(np.float64), offsets)
    zeros = segment_sum(zero.astype(np.float64), offsets)
    for row in np.flatnonzero(zeros).tolist():
        if batch.sampling[row].logprobs_mode == "processed":
            continue
        mine = zero[offsets[row] : offsets[row + 1]]
        out[ZERO_RUNS] += _longest_run(mine) >= LONG_RUN or bool(zeros[row] > MANY_ZEROS * tokens[row])
        out[ZERO_TAIL] += len(mine) > LONG_RUN and bool(mine[-LONG_RUN:].all())


def _longest_run(flags: Bools) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max()) if len(edges) else 0
