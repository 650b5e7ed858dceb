"""From the columns of some rows to a `RolloutBatch`, rule by rule (the numbers are those of schemas/rollout.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pyarrow as pa

from trm_audit.errors import RowError
from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged, segment_sum
from trm_audit.rollout import Grade, RolloutBatch, Sampling
from trm_audit.shards import schema
from trm_audit.shards.faults import Rows
from trm_audit.shards.lists import per_token, ragged
from trm_audit.shards.row_shape import check_ids, check_lengths, check_names
from trm_audit.shards.row_values import (
    read_logprobs,
    read_routing,
    read_sampling,
    read_topk,
    read_version,
    topk_step,
)
from trm_audit.shards.sketches import read_sketches


class LogitsIndex(Protocol):
    """What is asked of stored logits here; `shards.logits.StoredLogits` answers it."""

    def __contains__(self, rollout_id: str) -> bool: ...

    def check(
        self, rollout_id: str, num_tokens: int, vocab_size: int | None, place: str, *, wider: bool = False
    ) -> None: ...


@dataclass(frozen=True)
class RowRules:
    """What the rows are held against besides the schema.

    Attributes:
        vocab_size: of the model, None without one.
        logits: stored full logits, None where there are none.
        wider_logits: stored logits may have more columns than `vocab_size`; they are cut.
        defaults: stands in for sampling columns that are null or absent; its mode is used only where it was given.
        mode_given: whether `--logprobs-mode` was given.
        stored_trainer: the trainer's stored log-probabilities are needed.
        duplicates: ids that occur more than once in the run -> (shard, row) of the first occurrence.
    """

    vocab_size: int | None = None
    logits: LogitsIndex | None = None
    wider_logits: bool = False
    defaults: Sampling = field(default_factory=Sampling)
    mode_given: bool = False
    stored_trainer: bool = False
    duplicates: Mapping[str, tuple[str, int]] = field(default_factory=dict)


def read_rows(
    batch: pa.RecordBatch, shard: str, row_numbers: Ints, rules: RowRules
) -> tuple[RolloutBatch, list[RowError]]:
    """Checks the rows of one batch and takes their columns apart.

    Args:
        batch: as read, already renamed.
        shard: file name, for messages.
        row_numbers: [rows] index of each row in the file.
        rules: what else the rows are held against.

    Returns:
        The rows that are right, and one RowError for each that is not.

    Raises:
        BadInput: a column is missing or mistyped.
    """
    step = topk_step(batch)
    rows = Rows(schema.conform(batch, schema.ROLLOUT_COLUMNS, shard), shard, row_numbers)
    check_names(rows, rules.duplicates)
    check_ids(rows, rules.vocab_size)
    check_lengths(rows)
    if not rows.faults:
        out = _take_apart(rows, rules, step)
        if not rows.faults:
            return out, []
    good = [row for row in range(len(rows)) if row not in rows.faults]
    errors = [rows.faults[row] for row in sorted(rows.faults)]
    again, more = read_rows(batch.take(pa.array(good, pa.int64())), shard, row_numbers[good], rules)
    return again, errors + more


def _take_apart(rows: Rows, rules: RowRules, step: float) -> RolloutBatch:
    response = ragged(rows.columns.column("response_ids"))
    prompt = ragged(rows.columns.column("prompt_ids"))
    mask = per_token(rows.column("response_mask"), response, fill=True).astype(np.bool_)
    sampling = read_sampling(rows, rules.defaults, rules.mode_given)
    logprobs, has_logprobs = read_logprobs(rows, "rollout_logprobs", response, mask)
    topk, has_topk = read_topk(rows, response, mask, sampling, step, rules.vocab_size)
    sketches, has_sketch = read_sketches(rows, response, mask, topk, has_topk, rules.vocab_size)
    num_tokens = segment_sum(mask.astype(np.float64), response.offsets)
    version = read_version(rows, response, mask)
    ids: list[str] = rows.columns.column("rollout_id").to_pylist()
    grade = _grades(rows, rules, ids, response, num_tokens, has_logprobs, has_topk, has_sketch)
    groups, entropy = rows.column("group_id"), rows.column("rollout_entropy")
    return RolloutBatch(
        shard=rows.shard,
        row_numbers=rows.row_numbers,
        columns=rows.columns,
        rollout_id=ids,
        group_id=None if groups is None else groups.to_pylist(),
        prompt=replace(prompt, values=prompt.values.astype(np.int64)),
        response=replace(response, values=response.values.astype(np.int64)),
        response_mask=mask,
        rollout_logprobs=logprobs,
        stored_trainer_logprobs=_stored_trainer(rows, response, mask, num_tokens) if rules.stored_trainer else None,
        topk=topk,
        sampling=sampling,
        policy_version=version,
        grade=grade,
        routed_experts=read_routing(rows, prompt.lengths + response.lengths),
        sketches=sketches,
        stored_entropy=None if entropy is None else per_token(entropy, response, np.nan),
    )


def _stored_trainer(rows: Rows, response: Ragged, mask: Bools, num_tokens: Floats) -> Floats:
    """The trainer's own values, which every row with policy tokens has to have."""
    values, there = read_logprobs(rows, "trainer_logprobs", response, mask)
    rows.fault(
        np.flatnonzero(~there & (num_tokens > 0)),
        "trainer_logprobs is null or absent",
        "--trainer-logprobs stored needs the trainer's own values; --model DIR scores with a checkpoint.",
    )
    return values


def _grades(
    rows: Rows,
    rules: RowRules,
    ids: Sequence[str],
    response: Ragged,
    num_tokens: Floats,
    has_logprobs: Bools,
    has_topk: Bools,
    has_sketch: Bools,
) -> list[Grade | None]:
    """Rules 9 and 11: the best grade each row's evidence allows, None without policy tokens."""
    grades: list[Grade | None] = []
    for row, name in enumerate(ids):
        if num_tokens[row] == 0:
            grades.append(None)
        elif rules.logits is not None and name in rules.logits and not rules.stored_trainer:
            grades.append("exact")
            try:
                rules.logits.check(
                    name, int(response.lengths[row]), rules.vocab_size, rows.place(row), wider=rules.wider_logits
                )
            except RowError as error:
                rows.faults.setdefault(row, error)
        elif has_sketch[row] and not rules.stored_trainer:
            grades.append("sketch")
        elif has_topk[row] and not rules.stored_trainer:
            grades.append("interval")
        else:
            grades.append("sampled")
    needy = np.array([grade != "exact" for grade in grades], dtype=np.bool_) & (num_tokens > 0) & ~has_logprobs
    rows.fault(
        np.flatnonzero(needy),
        {
            int(row): "top-K evidence without rollout_logprobs"
            if has_topk[row]
            else "no evidence of the rollout policy"
            for row in np.flatnonzero(needy)
        },
        "Store rollout_logprobs (grade sampled), with top-K lists (interval), a sketch, or full logits (exact): "
        "schemas/rollout.md, rule 9.",
    )
    return grades
