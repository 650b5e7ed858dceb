"""From the columns of some rows to a `RolloutBatch`, rule by rule (the numbers are those of schemas/rollout.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.errors import RowError
from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged, segment_sum
from trm_audit.rollout import Grade, RolloutBatch, Sampling, TopK
from trm_audit.shards import schema

MODES = ("raw", "tempered", "processed")
ROUNDING = 1e-3
PLACEHOLDER = -9000.0
"""vLLM's server writes -9999.0 for what is not there; no sampled token has a probability of e^-9000."""
FLOAT_STEPS = {"halffloat": 2.0**-11, "float": 2.0**-24, "double": 2.0**-24}


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


class _Rows:
    """Columns of one batch, faults by row. The first fault of a row is the one that counts."""

    def __init__(self, columns: pa.RecordBatch, shard: str, row_numbers: Ints) -> None:
        self.columns, self.shard, self.row_numbers = columns, shard, row_numbers
        self.faults: dict[int, RowError] = {}

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def column(self, name: str) -> pa.Array | None:
        return self.columns.column(name) if name in self.columns.schema.names else None

    def place(self, row: int) -> str:
        name = self.columns.column("rollout_id")[row].as_py()
        return f"{self.shard}, row {self.row_numbers[row]} (rollout_id={name})"

    def fault(self, rows: Iterable[int], cause: str | Mapping[int, str], next_step: str) -> None:
        """Notes what is wrong with some rows: one cause for all, or each its own."""
        for row in map(int, rows):
            if row not in self.faults:
                text = cause if isinstance(cause, str) else cause[row]
                self.faults[row] = RowError(text, place=self.place(row), next_step=next_step)


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
    step = _topk_step(batch)
    rows = _Rows(schema.conform(batch, schema.ROLLOUT_COLUMNS, shard), shard, row_numbers)
    _check_names(rows, rules.duplicates)
    _check_ids(rows, rules.vocab_size)
    _check_lengths(rows)
    if not rows.faults:
        out = _take_apart(rows, rules, step)
        if not rows.faults:
            return out, []
    good = [row for row in range(len(rows)) if row not in rows.faults]
    errors = [rows.faults[row] for row in sorted(rows.faults)]
    again, more = read_rows(batch.take(pa.array(good, pa.int64())), shard, row_numbers[good], rules)
    return again, errors + more


def _topk_step(batch: pa.RecordBatch) -> float:
    if "rollout_topk_logprobs" not in batch.schema.names:
        return FLOAT_STEPS["float"]
    kind = batch.schema.field("rollout_topk_logprobs").type
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return FLOAT_STEPS.get(str(kind), FLOAT_STEPS["float"])


def ragged(array: pa.Array) -> Ragged:
    """A list column as values and offsets; null rows are empty. Slices and values under nulls are taken care of."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets)


def _check_names(rows: _Rows, duplicates: Mapping[str, tuple[str, int]]) -> None:
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


def _check_ids(rows: _Rows, vocab_size: int | None) -> None:
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


def _check_range(rows: _Rows, name: str, values: pa.Array, owner: Ints, vocab_size: int | None) -> None:
    numbers = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
    limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    bad = np.flatnonzero((numbers < 0) | (numbers >= limit))
    first = {int(owner[i]): int(numbers[i]) for i in bad[::-1]}
    rows.fault(
        sorted(first),
        {row: f"{name} contains {value}, outside 0..{limit - 1}" for row, value in first.items()},
        "Ids are those of the model's tokenizer, without padding (schemas/rollout.md, rule 2).",
    )


def _check_lengths(rows: _Rows) -> None:
    """Rules 3, 4 and 10."""
    wanted = ragged(rows.columns.column("response_ids")).lengths
    names = ["response_mask", "rollout_logprobs", "rollout_topk_ids", "rollout_topk_logprobs", "trainer_logprobs"]
    for name in [*names, "policy_version"]:
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


def _take_apart(rows: _Rows, rules: RowRules, step: float) -> RolloutBatch:
    response = ragged(rows.columns.column("response_ids"))
    prompt = ragged(rows.columns.column("prompt_ids"))
    mask = _per_token(rows.column("response_mask"), response, fill=True).astype(np.bool_)
    sampling = _sampling(rows, rules)
    logprobs, has_logprobs = _logprobs(rows, "rollout_logprobs", response, mask)
    trainer, has_trainer = _logprobs(rows, "trainer_logprobs", response, mask)
    if not rules.stored_trainer:
        rows.faults = {row: e for row, e in rows.faults.items() if not e.cause.startswith("trainer_logprobs")}
    topk, has_topk = _topk(rows, response, mask, sampling, step, rules.vocab_size)
    num_tokens = segment_sum(mask.astype(np.float64), response.offsets)
    version = _version(rows, response, mask)
    ids: list[str] = rows.columns.column("rollout_id").to_pylist()
    grade = _grades(rows, rules, ids, response, num_tokens, has_logprobs, has_topk)
    if rules.stored_trainer:
        rows.fault(
            np.flatnonzero(~has_trainer & (num_tokens > 0)),
            "trainer_logprobs is null or absent",
            "--trainer-logprobs stored needs the trainer's own values; --model DIR scores with a checkpoint.",
        )
    groups = rows.column("group_id")
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
        stored_trainer_logprobs=trainer if rules.stored_trainer else None,
        topk=topk,
        sampling=sampling,
        policy_version=version,
        grade=grade,
    )


def _per_token(column: pa.Array | None, response: Ragged, fill: float) -> Floats:
    """A per-token column over all response tokens, `fill` where the column or its row is null."""
    out = np.full(len(response.values), fill, dtype=np.float64)
    if column is not None:
        there = np.repeat(np.asarray(column.is_valid()), response.lengths)
        values = column.flatten()
        if pa.types.is_boolean(values.type):
            values = pc.cast(values, pa.int8())
        out[there] = values.to_numpy(zero_copy_only=False)  # nulls inside become NaN
    return out


def _logprobs(rows: _Rows, name: str, response: Ragged, mask: Bools) -> tuple[Floats, Bools]:
    """Rule 5. Values over all response tokens, and which rows have them."""
    column = rows.column(name)
    if column is None:
        return np.full(len(response.values), np.nan), np.zeros(len(rows), dtype=np.bool_)
    has = np.asarray(column.is_valid())
    values = _per_token(column, response, np.nan)
    looked_at = mask & np.repeat(has, response.lengths)
    with np.errstate(invalid="ignore"):
        bad = looked_at & ~((values <= ROUNDING) & (values > PLACEHOLDER))
    owner = np.repeat(np.arange(len(rows)), response.lengths)
    first = {int(owner[i]): int(i - response.offsets[owner[i]]) for i in np.flatnonzero(bad)[::-1]}

    causes = {}
    for row, at in first.items():
        value = column[row][at].as_py()
        if value is None:
            causes[row] = f"{name} at position {at} is null"
            continue
        kind = "positive" if value > 0 else "a placeholder" if np.isfinite(value) else "not finite"
        causes[row] = f"{name} at position {at} is {value:g}: {kind}"
    rows.fault(
        sorted(first),
        causes,
        "Log-probabilities of sampled tokens are finite and at most 0; mark tokens that the policy did not sample in "
        "response_mask, or leave the whole list null (schemas/rollout.md, rule 5).",
    )
    return values, has


def _topk(
    rows: _Rows, response: Ragged, mask: Bools, sampling: Sequence[Sampling], step: float, vocab_size: int | None
) -> tuple[TopK | None, Bools]:
    """Rule 6. -inf at the end of a list of processed values is left out, positions outside the mask are empty."""
    ids, values = rows.column("rollout_topk_ids"), rows.column("rollout_topk_logprobs")
    if ids is None or values is None:
        return None, np.zeros(len(rows), dtype=np.bool_)
    has = np.asarray(ids.is_valid()) & np.asarray(values.is_valid())
    there = np.repeat(has, response.lengths)
    usable = pc.if_else(pa.array(has), ids, None), pc.if_else(pa.array(has), values, None)
    flat_ids, flat = (ragged(column.flatten()) for column in usable)
    owner = np.repeat(np.arange(len(rows)), response.lengths)[there]
    unequal = np.flatnonzero(flat_ids.lengths != flat.lengths)
    if len(unequal):
        rows.fault(
            owner[unequal],
            "rollout_topk_ids and rollout_topk_logprobs have lists of different length",
            "One id for each value (schemas/rollout.md, rule 6).",
        )
        return None, has
    entry_token = np.repeat(np.flatnonzero(there), flat.lengths)
    logprobs = flat.values.astype(np.float64)
    tokens = np.nan_to_num(flat_ids.values.astype(np.float64), nan=-1).astype(np.int64)  # null ids are NaN
    _check_topk(rows, response, mask, sampling, entry_token, tokens, logprobs, vocab_size)
    keep = mask[entry_token] & ~np.isneginf(logprobs)
    lengths = np.bincount(entry_token[keep], minlength=len(response.values))
    short = np.flatnonzero(there & mask & (lengths == 0))
    rows.fault(
        np.repeat(np.arange(len(rows)), response.lengths)[short],
        "a top-K list is empty where response_mask is true",
        "Leave both columns of the row null, or store at least one entry (schemas/rollout.md, rule 6).",
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TopK(tokens[keep], logprobs[keep], offsets, step), has


def _check_topk(
    rows: _Rows,
    response: Ragged,
    mask: Bools,
    sampling: Sequence[Sampling],
    token: Ints,
    ids: Ints,
    logprobs: Floats,
    vocab_size: int | None,
) -> None:
    limit = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    owner_of_token = np.repeat(np.arange(len(rows)), response.lengths)
    processed = np.array([s.logprobs_mode == "processed" for s in sampling], dtype=np.bool_)
    looked_at = mask[token]
    owner = owner_of_token[token]
    fill = np.isneginf(logprobs) & processed[owner]
    with np.errstate(invalid="ignore"):
        bad_value = looked_at & ~fill & ~((logprobs <= ROUNDING) & (logprobs > PLACEHOLDER))
        same_token = token[1:] == token[:-1]
        rising = looked_at[1:] & same_token & ~(logprobs[1:] <= logprobs[:-1])
    mass = np.bincount(token, np.where(np.isfinite(logprobs), np.exp(np.minimum(logprobs, 0)), 0), len(mask))
    order = np.lexsort((ids, token))
    twice = (ids[order][1:] == ids[order][:-1]) & (token[order][1:] == token[order][:-1])
    twice &= looked_at[order][1:] & ~fill[order][1:]
    step = "A list holds exactly the K most probable tokens, descending, without filler (schemas/rollout.md, rule 6)."

    def note(entries: Ints, what: str) -> None:
        first = {int(owner[i]): int(i) for i in entries[::-1]}
        at = {row: int(token[i] - response.offsets[row]) for row, i in first.items()}
        said = {row: what.format(value=logprobs[i], id=ids[i]) for row, i in first.items()}
        rows.fault(sorted(first), {row: f"the top-K list at position {at[row]} {said[row]}" for row in first}, step)

    note(np.flatnonzero(looked_at & ((ids < 0) | (ids >= limit))), f"names token {{id}}, outside 0..{limit - 1}")
    note(np.flatnonzero(bad_value), "holds {value:g}, which is no log-probability")
    note(np.flatnonzero(rising) + 1, "is not in descending order")
    note(order[1:][twice], "names token {id} twice")
    heavy = np.flatnonzero(mask & (mass > 1 + ROUNDING))
    sums = {int(owner_of_token[i]): f"the probabilities of a top-K list sum to {mass[i]:.4g}" for i in heavy[::-1]}
    rows.fault(sorted(sums), sums, step)


def _sampling(rows: _Rows, rules: RowRules) -> list[Sampling]:
    """Rules 7 and 8."""
    given: dict[str, list[object]] = {}
    for name in ("temperature", "top_p", "top_k", "logprobs_mode"):
        column = rows.column(name)
        given[name] = [None] * len(rows) if column is None else column.to_pylist()
    return [
        _sampling_of_row(rows, row, {name: values[row] for name, values in given.items()}, rules)
        for row in range(len(rows))
    ]


def _sampling_of_row(rows: _Rows, row: int, given: Mapping[str, object], rules: RowRules) -> Sampling:
    def number(name: str) -> float:
        value = given[name]
        return float(value if isinstance(value, int | float) else getattr(rules.defaults, name))

    temperature, top_p, top_k = number("temperature"), number("top_p"), int(number("top_k"))
    mode = given["logprobs_mode"]
    rule = "See schemas/rollout.md, rule 7."
    if not temperature > 0 or temperature == np.inf:
        greedy = "Greedy decoding has no distribution to compare; leave such rows out (rule 7)."
        rows.fault([row], f"temperature is {temperature:g}, above 0 is needed", greedy)
    if not 0 < top_p <= 1:
        rows.fault([row], f"top_p is {top_p:g}, outside (0, 1]", rule)
    if top_k < -1:
        rows.fault([row], f"top_k is {top_k}, at least -1 is needed", rule)
    if mode is not None and mode not in MODES:
        rows.fault([row], f"logprobs_mode is {mode!r}, one of {', '.join(MODES)} is needed", "See rule 8.")
    sampling = Sampling(temperature, top_p, top_k, str(mode or rules.defaults.logprobs_mode))
    if mode is None and not rules.mode_given and (temperature != 1 or sampling.truncates):
        rows.fault(
            [row],
            f"logprobs_mode is missing, and at temperature {temperature:g}, top_p {top_p:g}, top_k {top_k} "
            "raw and processed values differ",
            "Say which they are with --logprobs-mode raw|tempered|processed (schemas/rollout.md, rule 8).",
        )
    return sampling


def _version(rows: _Rows, response: Ragged, mask: Bools) -> Floats | None:
    """Oldest policy version of each row (over its policy tokens where it is a list), NaN for null."""
    column = rows.column("policy_version")
    if column is None:
        return None
    if not pa.types.is_list(column.type):
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    values = _per_token(column, response, np.nan)
    out = np.full(len(rows), np.nan)
    for row in range(len(rows)):
        part = values[response.offsets[row] : response.offsets[row + 1]]
        part = part[mask[response.offsets[row] : response.offsets[row + 1]] & ~np.isnan(part)]
        out[row] = part.min() if len(part) else np.nan
    return out


def _grades(
    rows: _Rows,
    rules: RowRules,
    ids: Sequence[str],
    response: Ragged,
    num_tokens: Floats,
    has_logprobs: Bools,
    has_topk: Bools,
) -> list[Grade]:
    """Rules 9 and 11: the best grade each row's evidence allows."""
    grades: list[Grade] = []
    for row, name in enumerate(ids):
        if rules.logits is not None and name in rules.logits and not rules.stored_trainer:
            grades.append("exact")
            try:
                rules.logits.check(
                    name, int(response.lengths[row]), rules.vocab_size, rows.place(row), wider=rules.wider_logits
                )
            except RowError as error:
                rows.faults.setdefault(row, error)
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
        "Store rollout_logprobs (grade sampled), with top-K lists (interval), or full logits (exact): "
        "schemas/rollout.md, rule 9.",
    )
    return grades
