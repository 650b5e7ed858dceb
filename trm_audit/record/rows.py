"""One rollout as it was handed to `RolloutWriter.add`, checked against what a reader of its shard will refuse.

A rollout that cannot be read back is best refused while its sampler is still there to be mended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_audit.errors import BadInput, UsageError
from trm_audit.numerics.ragged import Bools, Floats
from trm_audit.record.evidence import TokenEvidence
from trm_audit.rollout import Sampling
from trm_audit.shards.row_values import MODES, ROUNDING
from trm_audit.shards.schema import ROLLOUT_COLUMNS

LARGEST_ID = np.iinfo(np.int32).max
MAKE = "Take it as trm_audit.record.evidence(...) gives it."
FREE = ("advantage", "trainer_logprobs", "routed_experts")
"""Columns of schemas/rollout.md that are the caller's own affair."""


@dataclass(frozen=True)
class Row:
    """A rollout that may be written.

    Attributes:
        name: its id.
        place: for messages.
        values: columns of schemas/rollout.md that do not depend on the evidence; ids and masks as arrays.
        sampling: as it is stored.
        evidence: arrays of `TokenEvidence.numpy`, one entry per policy token, or None.
        logprobs: [T] float32 where there is no evidence, or None.
        extra: further columns.
        size: bytes that it takes, once it is known.
    """

    name: str
    place: str
    values: Mapping[str, Any]
    sampling: Sampling
    evidence: dict[str, NDArray[Any]] | None = None
    logprobs: NDArray[np.float32] | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    size: int = 0

    @property
    def evidence_bytes(self) -> int:
        arrays = [*(self.evidence or {}).values(), self.logprobs]
        return sum(one.nbytes for one in arrays if one is not None)


def list_too_short(sampling: Sampling, k: int, remedy: str = "Recipe(k={})") -> str:
    """What to tell of a top-k that keeps more tokens than the recipe does; empty if there is nothing to tell."""
    if sampling.top_k <= k:
        return ""
    return (
        f"top_k {sampling.top_k} is above the {k} tokens that are kept: estimates of KL come out too high; "
        f"take {remedy.format(sampling.top_k)}."
    )


def checked(
    given: Mapping[str, Any],
    columns: Mapping[str, object],
    sampling: Sampling,
    evidence: TokenEvidence | None,
    logprobs: Any,
    folder: str,
) -> Row:
    """The row of what `RolloutWriter.add` was given.

    Raises:
        BadInput: a value breaks a rule of schemas/rollout.md.
        UsageError: the call cannot mean anything.
    """
    name = str(given["rollout_id"])
    place = f"{folder}, rollout {name}"
    if not name:
        raise UsageError("rollout_id is empty", place=folder, next_step="Leave it out for a random one.")
    _check_names(columns, place)
    _check_sampling(sampling, place)
    values = _values(given, name, None if evidence is None else evidence.vocab_size, place)
    mask: Bools = values["response_mask"]
    if (evidence is None) == (logprobs is None) and (evidence is not None or mask.any()):
        raise UsageError(
            "carries no evidence" if evidence is None else "carries evidence and logprobs",
            place=place,
            next_step="Give evidence=..., which has the log-probabilities in it, or logprobs=... (rule 9).",
        )
    extra = {key: _plain(value) for key, value in columns.items()}
    _check_length(extra.get("trainer_logprobs"), "trainer_logprobs", len(mask), place)
    row = Row(name, place, values, sampling, extra=extra)
    if evidence is not None:
        arrays = _checked_evidence(evidence, values["response_ids"][mask], place)
        return replace(row, sampling=replace(sampling, logprobs_mode="processed"), evidence=arrays)
    return row if logprobs is None else replace(row, logprobs=_checked_logprobs(logprobs, mask, place))


def _check_names(columns: Mapping[str, object], place: str) -> None:
    taken = sorted({*columns} & ({*ROLLOUT_COLUMNS} - {*FREE}))
    if taken:
        raise UsageError(
            f"column {taken[0]!r} is written from the evidence and the sampling settings",
            place=place,
            next_step="Give it another name.",
        )


def _check_sampling(sampling: Sampling, place: str) -> None:
    """Rules 7 and 8."""
    if not 0 < sampling.temperature < np.inf:
        raise UsageError(
            f"temperature is {sampling.temperature:g}, above 0 is needed",
            place=place,
            next_step="Greedy decoding has no distribution to compare; leave such rollouts out (rule 7).",
        )
    if not 0 < sampling.top_p <= 1 or sampling.top_k < -1 or sampling.logprobs_mode not in MODES:
        raise UsageError(
            f"{sampling} cannot be stored",
            place=place,
            next_step=f"top_p is in (0, 1], top_k at least -1, logprobs_mode one of {', '.join(MODES)} (rules 7, 8).",
        )


def _values(given: Mapping[str, Any], name: str, vocab_size: int | None, place: str) -> dict[str, Any]:
    prompt = _checked_ids(given["prompt_ids"], "prompt_ids", vocab_size, place)
    response = _checked_ids(given["response_ids"], "response_ids", vocab_size, place)
    if len(response) and not len(prompt):
        raise BadInput(
            "prompt_ids is empty: the first response token has no context",
            place=place,
            next_step="Put the begin-of-sequence token that the engine used there (schemas/rollout.md, rule 2).",
        )
    mask = given["response_mask"]
    mask = np.ones(len(response), dtype=np.bool_) if mask is None else np.asarray(_plain(mask), dtype=np.bool_)
    _check_length(mask, "response_mask", len(response), place)
    version = _plain(given["policy_version"])
    if version is not None and not isinstance(version, int):
        version = np.asarray(version, dtype=np.int64)
        _check_length(version, "policy_version", len(response), place)
    group, reward = given["group_id"], _plain(given["reward"])
    return {
        **given,
        "rollout_id": name,
        "prompt_ids": prompt,
        "response_ids": response,
        "response_mask": mask,
        "policy_version": version,
        "group_id": None if group is None else str(group),
        "reward": None if reward is None else float(reward),
    }


def _checked_ids(given: Any, name: str, vocab_size: int | None, place: str) -> NDArray[np.int32]:
    """Rule 2."""
    ids = np.asarray(_plain(given))
    ids = ids.astype(np.int64) if ids.size == 0 else ids
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadInput(f"{name} is {ids.dtype}{list(ids.shape)}, a list of token ids is needed", place=place)
    limit = LARGEST_ID if vocab_size is None else vocab_size
    bad = ids[(ids < 0) | (ids >= limit)]
    if len(bad):
        raise BadInput(
            f"{name} contains {bad[0]}, outside 0..{limit - 1}",
            place=place,
            next_step="Ids are those of the model's tokenizer, without padding (schemas/rollout.md, rule 2).",
        )
    return ids.astype(np.int32)


def _check_length(values: Any, name: str, length: int, place: str) -> None:
    """Rules 4 and 10."""
    if values is not None and len(values) != length:
        raise BadInput(
            f"response_ids has {length} tokens, {name} has {len(values)}",
            place=place,
            next_step="Per-token columns of a row must have equal length (schemas/rollout.md, rule 4).",
        )


def _checked_evidence(evidence: TokenEvidence, tokens: NDArray[np.int32], place: str) -> dict[str, NDArray[Any]]:
    """Of the tokens of the response, in their order, and finite."""
    arrays = evidence.numpy()
    arrays["topk_ids"] = arrays["topk_ids"].astype(np.int32)
    theirs = arrays.pop("token_ids")
    if len(theirs) != len(tokens):
        raise BadInput(
            f"{len(tokens)} tokens were sampled by the policy, evidence is of {len(theirs)}",
            place=place,
            next_step="Evidence has one entry for each true position of response_mask.",
        )
    whole = [one for name, one in arrays.items() if name not in ("seed", "vocab_size")]
    if any(len(one) != len(tokens) for one in whole) or arrays["topk_ids"].shape != arrays["topk_logprobs"].shape:
        raise BadInput("the evidence's arrays are of different lengths", place=place, next_step=MAKE)
    if arrays["vectors"].ndim != 2 or not 0 < int(arrays["vocab_size"]) <= LARGEST_ID:
        raise BadInput("the evidence has no projections, or no vocabulary", place=place, next_step=MAKE)
    differ = np.flatnonzero(theirs != tokens)
    if len(differ):
        at = differ[0]
        raise BadInput(
            f"evidence {at} is of token {theirs[at]}, the response has {tokens[at]} there",
            place=place,
            next_step="Entry t is of the logits that token t was drawn from: nothing is shifted.",
        )
    bad = np.flatnonzero(~(np.isfinite(arrays["logprobs"]) & np.isfinite(arrays["tail_mass"])))
    if len(bad):
        raise BadInput(
            f"evidence {bad[0]} is not finite: NaN or +inf among the logits, or a token that had -inf",
            place=place,
            next_step="The engine's logits are damaged there, or are not those that the token was drawn from.",
        )
    return arrays


def _checked_logprobs(given: Any, mask: Bools, place: str) -> NDArray[np.float32]:
    """Rule 5; 0 where the policy did not sample."""
    values: Floats = np.asarray(_plain(given), dtype=np.float64)  # None becomes NaN
    _check_length(values, "logprobs", len(mask), place)
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(mask & ~((values <= ROUNDING) & (values > -np.inf)))
    if len(bad):
        raise BadInput(
            f"logprobs at position {bad[0]} is {values[bad[0]]:g}",
            place=place,
            next_step="Log-probabilities of sampled tokens are finite and at most 0 (schemas/rollout.md, rule 5).",
        )
    return np.where(mask, values, 0.0).astype(np.float32)


def _plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as Python values."""
    return value.tolist() if hasattr(value, "tolist") else value
