"""What `LLM.generate` of vLLM returns, as rows; with `logprobs=-1` the whole distribution beside them.

    outputs = llm.generate(prompts, params)
    with LogitsTableWriter("rollouts/logits-00000.parquet", "q16") as logits:
        rows = [*rows_of(outputs, params, Given(logprobs_mode="raw"), name="step-17", logits=logits)]
    write_rollout_table("rollouts/part-00000.parquet", table_of(rows))

The engine gives whole distributions with `LLM(..., max_logprobs=-1)`. It holds them as Python objects until `generate`
returns: `SamplingParams(flat_logprobs=True)` is the smaller way, and `trm_audit.record.vllm` needs neither.

Nothing of vLLM is imported: outputs are read by their attributes, as vLLM 0.32 has them. Log-probabilities of a
position are a dict, sampled token first and then by rank, or flat lists, which have the sampled token twice where it
is among the most probable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trm_audit.adapters.answers import DRIFT, FILLER, OFF, Entry, evidence, sampling, versions
from trm_audit.adapters.base import Given, Row
from trm_audit.adapters.vllm import SHAPING, experts_rows, shaped, stage, top_lists
from trm_audit.errors import BadInput, UsageError
from trm_audit.shards.rollout_writer import BLOCK_POSITIONS, LogitsTableWriter
from trm_audit.shards.schema import ROLLOUT_COLUMNS, VERSION_PER_TOKEN

SETTINGS = (*OFF, *SHAPING, "logprob_token_ids", "routed_experts_prompt_start")


def rows_of(
    outputs: Iterable[Any], params: Any, given: Given, *, name: str, logits: LogitsTableWriter | None = None
) -> Iterator[Row]:
    """Rows of what was generated, one for each sample, in order.

    Args:
        outputs: `RequestOutput`s.
        params: the `SamplingParams` that they were generated with, or a list with one for each output.
        given: its `logprobs_mode` is the engine's (`raw` for its default, raw_logprobs); notes what is assumed.
        name: begins each rollout_id; another one for each call of `generate`, which counts its requests from 0.
        logits: where whole distributions go (`logprobs=-1`).

    Raises:
        BadInput: token ids or log-probabilities are missing, or their stage is not known and makes a difference.
        UsageError: whole distributions, and no `logits`.
    """
    outputs = list(outputs)
    every = list(params) if isinstance(params, Sequence) else [params] * len(outputs)
    if len(every) != len(outputs):
        raise UsageError(f"{len(outputs)} outputs and {len(every)} SamplingParams", next_step="Give one for each.")
    for output, own in zip(outputs, every, strict=True):
        if own.logprobs == -1 and logits is None:
            raise UsageError(
                "logprobs=-1 gives whole distributions, and there is nowhere to write them",
                next_step='Pass logits=LogitsTableWriter("rollouts/logits-00000.parquet", "q16").',
            )
        for sample in output.outputs:
            yield _row(output, sample, own, given, name, logits if own.logprobs == -1 else None)


def _row(output: Any, sample: Any, params: Any, given: Given, name: str, logits: LogitsTableWriter | None) -> Row:
    place = f"{name}, request {output.request_id}, sample {sample.index}"
    settings = {key: getattr(params, key, None) for key in SETTINGS}
    if output.prompt_token_ids is None:
        raise BadInput(DRIFT, place=place, next_step="Give vLLM text or token ids as prompts, no embeddings.")
    prompt, response = list(output.prompt_token_ids), list(sample.token_ids)
    if response and (sample.logprobs is None or len(sample.logprobs) != len(response)):
        raise BadInput("has no log-probability for each token", place=place, next_step="Sample with logprobs=20.")
    rollout_id = f"{name}/{output.request_id}/{sample.index}"
    found = [_position(sample.logprobs, at) for at in range(len(response))]
    own = [entries[token] for entries, token in zip(found, response, strict=True)]
    tops = None if logits else top_lists(own, [[*entries.values()] for entries in found], settings, given)
    if logits is not None:
        _store(logits, rollout_id, found, place)
    spans = [
        {"version": s.version, "start": s.start, "end": s.end} for s in getattr(sample, "weight_versions", None) or ()
    ]
    experts, skipped = getattr(sample, "routed_experts", None), int(settings["routed_experts_prompt_start"] or 0)
    row: Row = {
        "rollout_id": rollout_id,
        "group_id": f"{name}/{output.request_id}",
        "prompt_ids": prompt,
        "response_ids": response,
        **evidence(own, tops),
        **sampling(settings, given, "vLLM"),
        "engine": "vllm",
        "finish_reason": sample.finish_reason,
        "policy_version": versions(spans, len(response), given),
        "routed_experts": None
        if experts is None
        else experts_rows(np.asarray(experts), len(prompt) + len(response), skipped, place),
    }
    fillers = any((entry.logprob or 0.0) <= FILLER for entries in found for entry in entries.values())
    row["logprobs_mode"] = stage(row, shaped(settings, given), fillers, given, place)
    return row


def _position(logprobs: Any, at: int) -> dict[int, Entry]:
    """What is known at a position: token id -> entry, in the engine's order."""
    if hasattr(logprobs, "start_indices"):
        where = slice(logprobs.start_indices[at], logprobs.end_indices[at])
        columns = logprobs.token_ids[where], logprobs.logprobs[where], logprobs.ranks[where]
        return {token: Entry(token, value, rank) for token, value, rank in zip(*columns, strict=True)}
    return {token: Entry(token, value.logprob, value.rank) for token, value in logprobs[at].items()}


def _store(logits: LogitsTableWriter, rollout_id: str, found: Sequence[dict[int, Entry]], place: str) -> None:
    """Writes whole distributions, a block of positions at a time."""
    for start in range(0, len(found), BLOCK_POSITIONS):
        block = [_whole(entries, len(found[0]), place) for entries in found[start : start + BLOCK_POSITIONS]]
        logits.add(rollout_id, np.stack(block), start=start)


def _whole(entries: dict[int, Entry], vocab_size: int, place: str) -> NDArray[np.float32]:
    """The distribution [V] of a position, column = token id."""
    ids = np.fromiter(entries, np.int64, len(entries))
    if len(ids) != vocab_size or ids.min() != 0 or ids.max() != vocab_size - 1:
        raise BadInput("has positions without the whole vocabulary", place=place, next_step="Is logprobs=-1 right?")
    row = np.empty(vocab_size, np.float32)
    row[ids] = np.fromiter((entry.logprob for entry in entries.values()), np.float32, vocab_size)
    return row


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table with the columns of schemas/rollout.md in their types, others as they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = {name: column.type for name, column in ROLLOUT_COLUMNS.items()}
    if any(isinstance(row.get("policy_version"), list) for row in rows):
        known["policy_version"] = VERSION_PER_TOKEN.type
    return pa.table({name: pa.array([row.get(name) for row in rows], known.get(name)) for name in names})
