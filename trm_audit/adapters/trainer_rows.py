"""What dumps of trainers have in common: fillers among log-probabilities, settings nobody stored, text without ids.

A trainer's dump is made for its own loss. Whatever the loss does not look at holds anything: 0.0 on a tool's tokens,
null for what was not finite, padding. So a value counts only where the mask says that the policy sampled the token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trm_audit.adapters.base import Given, Row
from trm_audit.errors import BadInput

FILLER = -9999.0
"""Servers of vLLM write this for -inf, trainers for the first token of a sequence."""
SURELY = 16
"""From so many policy tokens on it is no accident that all log-probabilities are exactly 0, or equal two by two."""


def policy_values(values: Any, mask: Sequence[bool], given: Given | None = None) -> list[float] | None:
    """Log-probabilities of one rollout, with fillers gone.

    Args:
        values: per token, None for one that is missing; or None without any.
        mask: per token, True where the policy sampled it.
        given: is told of values that are nothing but zeros. None for the trainer's side.

    Returns:
        A list as long as `values`: 0.0 for what is missing where the policy sampled nothing. None where a token that it
        did sample has none. Values of another length than the mask come back as they are, for the check of the schema
        to name the row.
    """
    if values is None:
        return None
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    sampled = np.asarray(mask, dtype=np.bool_)
    missing = ~np.isfinite(array) | (array <= FILLER)
    array[missing] = 0.0
    if len(array) == len(sampled):
        if missing[sampled].any():
            return None
        if sampled.sum() >= SURELY and not array[sampled].any():
            if given is not None:
                given.assume(
                    f"Log-probabilities that are exactly 0 at each of {SURELY} policy tokens or more were never "
                    "recorded; they are left out."
                )
            return None
    out: list[float] = array.tolist()
    return out


def both_sides(sampler: Any, trainer: Any, mask: Sequence[bool], given: Given) -> Row:
    """Log-probabilities of sampler and trainer as columns; a trainer's side that may be a copy is said to be one."""
    row = {"rollout_logprobs": policy_values(sampler, mask, given), "trainer_logprobs": policy_values(trainer, mask)}
    ours, theirs = row.values()
    if ours is not None and ours == theirs and sum(mask) >= SURELY:
        given.assume(
            "In some rollouts the trainer's log-probabilities equal the sampler's to the last bit: unless both sides "
            "are made to agree bitwise, the trainer copied them, and its own are not here."
        )
    return row


def one_value(values: Any, mask: Sequence[bool], what: str, given: Given) -> float | None:
    """What stands at every policy token of a rollout, for a column with one value a row; None where there is none, or
    several, which is said."""
    if values is None or len(values) != len(mask):
        return None
    found = {float(value) for value, sampled in zip(values, mask, strict=True) if sampled and value is not None}
    if len(found) > 1:
        given.assume(f"{what} that differ from token to token have no single value; the column is null there.")
    return found.pop() if len(found) == 1 else None


def sampling(given: Given, mode: str, why: str) -> Row:
    """How the rollouts of a dump that does not say were sampled: as the user states, else by temperature 1 alone.

    Args:
        mode: the stage its values are of (`raw`, `tempered`, `processed`).
        why: sentence on what that rests on.
    """
    stated = given.sampling()
    if not {"temperature", "top_p", "top_k"} <= set(stated):
        given.assume(
            "The dump does not say how it was sampled: temperature 1, top-p 1 and no top-k are taken for what "
            "--temperature, --top-p and --top-k do not state."
        )
    if "logprobs_mode" not in stated:
        given.assume(f"{why} --logprobs-mode says otherwise.")
    return {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs_mode": mode, **stated}


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with its place for messages.

    Raises:
        BadInput: a line is not JSON, or not an object.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(
                    f"is not JSON ({error.msg})", place=place, next_step="Is the file still being written, or cut?"
                ) from error
            if not isinstance(found, dict):
                raise BadInput("is not a JSON object", place=place, next_step="Is this the dump that --from names?")
            yield place, found


def need(row: Collection[str], names: Sequence[str], place: str, about: str, switch_on: str) -> None:
    """Raises BadInput unless the fields are there; text without token ids gets its own reason.

    Args:
        row: names of the fields that are there.
        names: of those needed; the first one holds the token ids.
        place: for messages.
        about: what the format is.
        switch_on: where ids come from if this dump has none.
    """
    missing = [name for name in names if name not in row]
    if missing and missing[0] == names[0] and TEXT & set(row):
        raise text_only(place, TEXT & set(row), switch_on)
    if missing:
        raise BadInput(
            f"has no {missing[0]!r}",
            place=place,
            next_step=f"This is not {about}. Its fields are: {', '.join(sorted(row))}.",
        )


TEXT = {"prompt", "prompts", "input", "completion", "completions", "output", "response", "responses", "content", "text"}
"""Fields in which dumps of trainers keep decoded text."""


def text_only(place: str, fields: Collection[str], switch_on: str) -> BadInput:
    """Why decoded text cannot be audited, as an error."""
    return BadInput(
        f"holds text ({', '.join(sorted(fields))}) and no token ids. Text cannot be audited: tokenised again, a third "
        "of the sequences get other ids than were sampled, and special tokens are gone",
        place=place,
        next_step=switch_on,
    )


def integers(values: Any) -> NDArray[np.int64]:
    """Token ids of a list, an array or a tensor."""
    return np.asarray(values, dtype=np.int64).reshape(-1)
