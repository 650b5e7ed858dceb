"""Rules 1 to 4 and 10 of schemas/rollout.md: names, token ids, and lengths that fit each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.ragged import Ints
from trm_audit.shards.faults import Rows
from trm_audit.shards.lists import ragged


def check_names(rows: Rows, duplicates: Mapping[str, tuple[str, int]]) -> None:
    """Rule 1."""
    ids = rows.column("rollout_id")
    assert ids is not None
    step = "Every rollout has a name (schemas/rollout.md, rule 1)."
    rows.fault(np.flatnonzero(ids.is_null()), "rollout_id is null", step)
    empty = pc.fill_null(pc.equal(pc.utf8_length(ids), 0), False).to_numpy(zero_copy_only=False)
    rows.fault(np.flatnonzero(empty), "rollout_id is empty", step)
    for row, name in enumerate(ids.to_pylist() if duplicates else ()):
        first = duplicates.get(name)
        if first is not None and first != (rows.shard, int(rows.row_numbers[row])):
            rows.fault(
                [row],
                _first_seen(first),
                "A name stands for one rollout in all shards that are read together (schemas/rollout.md, rule 1).",
            )


def _first_seen(first: tuple[str, int]) -> str:
    shard, row = first
    return "rollout_id occurs again" + (f", first in {shard}, row {row}" if row >= 0 else "")


def check_ids(rows: Rows, vocab_size: int | None) -> None:
    """Rule 2."""
    for name in ("prompt_ids", "response_ids"):
        column = rows.column(name)
        assert column is not None
        rows.fault(np.flatnonzero(column.is_null()), f"{name} is null", "See schemas/rollout.md, rule 2.")
        values, owner = column.flatten(), np.repeat(np.arange(len(rows)), ragged(column).lengths)
        rows.fault(owner[np.asarray(values.is_null())], f"{name} contains a null", "See rule 2.")
        _check_range(rows, name, values, owner, vocab_size)
    prompts, responses = ragged(rows.columns.column("prompt_ids")), ragged(rows.columns.column("response_ids"))
    rows.fault(
        np.flatnonzero((prompts.lengths == 0) & (responses.lengths > 0)),
        "prompt_ids is empty: the first response token has no context",
        "Put the begin-of-sequence token that the engine used there (schemas/rollout.md, rule 2).",
    )


def _check_range(rows: Rows, name: str, values: pa.Array, owner: Ints, vocab_size: int | None) -> None:
    numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
    limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    bad = np.flatnonzero((numbers < 0) | (numbers >= limit))
    first = {int(owner[i]): int(numbers[i]) for i in bad[::-1]}
    rows.fault(
        sorted(first),
        {row: f"{name} contains {value}, outside 0..{limit - 1}" for row, value in first.items()},
        "Ids are those of the model's tokenizer, without padding (schemas/rollout.md, rule 2).",
    )


PER_TOKEN = (
    "response_mask",
    "rollout_logprobs",
    "rollout_topk_ids",
    "rollout_topk_logprobs",
    "rollout_tail_mass",
    "rollout_entropy",
    "trainer_logprobs",
    "policy_version",
)


def check_lengths(rows: Rows) -> None:
    """Rules 3, 4 and 10."""
    wanted = ragged(rows.columns.column("response_ids")).lengths
    for name in PER_TOKEN:
        column = rows.column(name)
        if column is None or not pa.types.is_list(column.type):
            continue
        lengths = pc.list_value_length(column)
        found = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False)
        differ = np.asarray(lengths.is_valid()) & (found != wanted)
        rule = 10 if name == "policy_version" else 4
        rows.fault(
            np.flatnonzero(differ),
            {
                int(row): f"response_ids has {wanted[row]} tokens, {name} has {found[row]}"
                for row in np.flatnonzero(differ)
            },
            f"Per-token columns of a row must have equal length (schemas/rollout.md, rule {rule}).",
        )
    mask = rows.column("response_mask")
    if mask is not None:
        owner = np.repeat(np.arange(len(rows)), ragged(mask).lengths)
        rows.fault(
            owner[np.asarray(mask.flatten().is_null())],
            "response_mask contains a null",
            "True where the policy sampled the token, false elsewhere (schemas/rollout.md, rule 3).",
        )
