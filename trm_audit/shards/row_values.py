"""Rules 5 to 8 and 12 of schemas/rollout.md: log-probabilities, top-K lists, sampling, policy versions, routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trm_audit.numerics.ragged import Bools, Floats, Ints, Ragged
from trm_audit.rollout import RoutedExperts, Sampling, TopK
from trm_audit.shards.faults import Rows
from trm_audit.shards.lists import per_token, ragged

MODES = ("raw", "tempered", "processed")
ROUNDING = 1e-3
PLACEHOLDER = -9000.0
"""vLLM's server writes -9999.0 for what is not there; no sampled token has a probability of e^-9000."""
FLOAT_STEPS = {"halffloat": 2.0**-11, "float": 2.0**-24, "double": 2.0**-24}


def topk_step(batch: pa.RecordBatch) -> float:
    """Largest relative rounding error of the stored log-probabilities, by the types that the file has them in."""
    steps = [FLOAT_STEPS["float"]]
    for name in ("rollout_topk_logprobs", "rollout_logprobs"):
        if name in batch.schema.names:
            kind = batch.schema.field(name).type
            while hasattr(kind, "value_type"):
                kind = kind.value_type
            steps.append(FLOAT_STEPS.get(str(kind), FLOAT_STEPS["float"]))
    return max(steps)


def read_logprobs(rows: Rows, name: str, response: Ragged, mask: Bools) -> tuple[Floats, Bools]:
    """Rule 5. Values over all response tokens, and which rows have them."""
    column = rows.column(name)
    if column is None:
        return np.full(len(response.values), np.nan), np.zeros(len(rows), dtype=np.bool_)
    has = np.asarray(column.is_valid())
    values = per_token(column, response, np.nan)
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


def read_topk(
    rows: Rows, response: Ragged, mask: Bools, sampling: Sequence[Sampling], step: float, vocab_size: int | None
) -> tuple[TopK | None, Bools]:
    """Rule 6. -inf at the end of a list of processed values is left out, positions outside the mask are empty."""
    ids, values = rows.column("rollout_topk_ids"), rows.column("rollout_topk_logprobs")
    if ids is None or values is None:
        _refuse_half(rows, ids if values is None else values)
        return None, np.zeros(len(rows), dtype=np.bool_)
    half = np.asarray(ids.is_valid()) != np.asarray(values.is_valid())
    rows.fault(np.flatnonzero(half).tolist(), HALF_TOPK, "Both columns of a row are there, or both are null (rule 6).")
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
    _check_topk(rows, response, mask, sampling, entry_token, tokens, logprobs, step, vocab_size)
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


HALF_TOPK = "only one of rollout_topk_ids and rollout_topk_logprobs is there"


def _refuse_half(rows: Rows, other: pa.Array | None) -> None:
    """Faults rows that have one of the two columns of top-K evidence where the file lacks the other."""
    if other is not None:
        there = np.flatnonzero(np.asarray(other.is_valid())).tolist()
        rows.fault(there, HALF_TOPK, "Both columns of a row are there, or both are null (rule 6).")


def _check_topk(
    rows: Rows,
    response: Ragged,
    mask: Bools,
    sampling: Sequence[Sampling],
    token: Ints,
    ids: Ints,
    logprobs: Floats,
    rounding: float,
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
    least = np.minimum(logprobs, 0) * (1 + rounding)  # as rounding may have raised them
    mass = np.bincount(token, np.where(np.isfinite(logprobs), np.exp(least), 0), len(mask))
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


def read_sampling(rows: Rows, defaults: Sampling, mode_given: bool) -> list[Sampling]:
    """Rules 7 and 8. Settings of each row; `defaults` stand in for what it does not state (see `RowRules`)."""
    given: dict[str, list[object]] = {}
    for name in ("temperature", "top_p", "top_k", "logprobs_mode"):
        column = rows.column(name)
        given[name] = [None] * len(rows) if column is None else column.to_pylist()
    return [
        _sampling_of_row(rows, row, {name: values[row] for name, values in given.items()}, defaults, mode_given)
        for row in range(len(rows))
    ]


def _sampling_of_row(
    rows: Rows, row: int, given: Mapping[str, object], defaults: Sampling, mode_given: bool
) -> Sampling:
    def number(name: str) -> float:
        value = given[name]
        return float(value if isinstance(value, int | float) else getattr(defaults, name))

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
    sampling = Sampling(temperature, top_p, top_k, str(mode or defaults.logprobs_mode))
    if mode is None and not mode_given and (temperature != 1 or sampling.truncates):
        rows.fault(
            [row],
            f"logprobs_mode is missing, and at temperature {temperature:g}, top_p {top_p:g}, top_k {top_k} "
            "raw and processed values differ",
            "Say which they are with --logprobs-mode raw|tempered|processed (schemas/rollout.md, rule 8).",
        )
    return sampling


def read_version(rows: Rows, response: Ragged, mask: Bools) -> Floats | None:
    """Oldest policy version of each row (over its policy tokens where it is a list), NaN for null."""
    column = rows.column("policy_version")
    if column is None:
        return None
    if not pa.types.is_list(column.type):
        return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False))
    values = per_token(column, response, np.nan)
    out = np.full(len(rows), np.nan)
    for row in range(len(rows)):
        part = values[response.offsets[row] : response.offsets[row + 1]]
        part = part[mask[response.offsets[row] : response.offsets[row + 1]] & ~np.isnan(part)]
        out[row] = part.min() if len(part) else np.nan
    return out


def read_routing(rows: Rows, num_positions: Ints) -> RoutedExperts | None:
    """Rule 12.

    Args:
        num_positions: [rows] tokens of prompt and response.
    """
    column = rows.column("routed_experts")
    if column is None:
        return None
    entries = column.flatten()
    choices, lengths = entries.flatten(), _lengths(column)
    missing = np.where(np.asarray(column.is_valid()), num_positions - lengths, 0)
    rows.fault(
        off := np.flatnonzero((missing != 0) & (missing != 1)),
        {int(row): f"{num_positions[row]} tokens, but routed_experts has {lengths[row]} entries" for row in off},
        "One for each token of prompt_ids and response_ids, or for all but the last (schemas/rollout.md, rule 12).",
    )
    owner = np.repeat(np.arange(len(rows)), lengths)
    layers, uneven = _sizes(entries, owner, len(rows))
    owner = np.repeat(owner, _lengths(entries))
    k, uneven_choices = _sizes(choices, owner, len(rows))
    rows.fault(
        [*uneven, *uneven_choices],
        "routed_experts names other numbers of layers or experts from one entry to the next, or none",
        "Every entry is [layers, k] of one size; -1 stands for what is not known (schemas/rollout.md, rule 12).",
    )
    ids = pc.fill_null(choices.flatten(), -2).to_numpy(zero_copy_only=False)
    if (ids < -1).any():
        cause = "routed_experts contains a null or a number below -1"
        owner = np.repeat(owner, _lengths(choices))
        rows.fault(owner[ids < -1], cause, "-1 stands for an expert that is not known (rule 12).")
    offsets = np.concatenate([[0], np.cumsum(lengths * layers * k)]).astype(np.int64)
    return RoutedExperts(Ragged(ids, offsets), layers, k)


def _sizes(lists: pa.Array, owner: Ints, num_rows: int) -> tuple[Ints, Ints]:
    """Size of the first list of each row, 0 without one, and the owners of lists that are empty or of another size."""
    sizes = _lengths(lists)
    first = np.zeros(num_rows, dtype=np.int64)
    first[owner[::-1]] = sizes[::-1]  # what is written last stays
    return first, owner[(sizes != first[owner]) | (sizes == 0)]


def _lengths(lists: pa.Array) -> Ints:
    """Entries of each list, 0 for null."""
    lengths: Ints = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths
