"""NeMo-RL: `train_data_step{N}.jsonl`, one line per rollout of a step, both sides of the log-probabilities in it.

Each field of a line is a batch of one: {"token_ids": [[...]], "rewards": [1.0], ..., "idx": 0}. Sequences are padded
on the right to the longest of the step, `input_lengths` says where they end. All per-token fields have the full length:
what stands at position i is of token i, given those before it, so nothing is shifted and position 0 is a filler.

vLLM is run with `processed_logprobs`; a token whose value it did not return is left at 0.0. The trainer's values
(`prev_logprobs`) are made with the same temperature, top-p and top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import both_sides, integers, json_lines, need, one_value, sampling
from trm_audit.errors import BadInput

FIELDS = ("token_ids", "input_lengths", "token_loss_mask", "generation_logprobs", "prev_logprobs", "idx")
IDS = (
    "Use a NeMo-RL whose train_data_step*.jsonl has token_ids, with env.should_log_nemo_gym_responses off, which logs "
    "the responses alone."
)


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of one step's file, in its order.

    Raises:
        BadInput: a line has other fields, or text without token ids.
    """
    prompts: dict[bytes, int] = {}
    for place, line in json_lines(path):
        if line.get("token_ids") == []:
            given.assume("Lines without token ids (rewards of rollouts that dynamic sampling dropped) are passed over.")
            continue
        need(line, FIELDS, place, SOURCE.about, IDS)
        sample = {name: _only(value, name, place) for name, value in line.items() if name != "idx"}
        row = _row(sample, place, given)
        group = prompts.setdefault(integers(row["prompt_ids"]).tobytes(), len(prompts))
        yield {"rollout_id": f"{path.stem}/{line['idx']}", "group_id": f"{path.stem}/prompt{group}", **row}


def _only(value: Any, name: str, place: str) -> Any:
    """The one entry of a batch of one; None where there is none."""
    if not isinstance(value, list) or len(value) > 1:
        raise BadInput(f"{name} is not a list of one entry", place=place, next_step=f"Is this {SOURCE.about}?")
    return value[0] if value else None


def _row(sample: Mapping[str, Any], place: str, given: Given) -> Row:
    """A rollout. Its prompt ends where the policy's first token stands."""
    length = int(sample["input_lengths"])
    ids = integers(sample["token_ids"])
    per_token = ("token_loss_mask", "generation_logprobs", "prev_logprobs")
    short = [name for name in per_token if len(sample[name]) < length]
    if len(ids) < length or short:
        raise BadInput(f"{short[0] if short else 'token_ids'} is shorter than input_lengths ({length})", place=place)
    trains = [value > 0 for value in sample["token_loss_mask"][:length]]
    start = trains.index(True) if True in trains else length
    mask = trains[start:]
    if sample.get("sample_loss_mask") == 0:
        given.assume(
            "Samples with sample_loss_mask 0 are not trained on: none of their tokens is, and they count in N."
        )
        mask = [False] * len(mask)
    reward = sample.get("filtered_rewards", sample.get("rewards"))
    advantages = _per_token(sample.get("advantages"), start, length)
    return {
        "prompt_ids": ids[:start].tolist(),
        "response_ids": ids[start:length].tolist(),
        "response_mask": mask,
        **both_sides(sample["generation_logprobs"][start:length], sample["prev_logprobs"][start:length], mask, given),
        "reward": None if reward is None else float(reward),
        "advantage": one_value(advantages, mask, "Advantages", given),
        "engine": "vllm",
        **sampling(given, "processed", "NeMo-RL runs vLLM with processed_logprobs, which is taken for granted."),
    }


def _per_token(values: Any, start: int, end: int) -> Any:
    """Advantages of the response; a single number holds for all of it."""
    if isinstance(values, list):
        return values[start:end] if len(values) >= end else values * (end - start) if len(values) == 1 else None
    return None if values is None else [values] * (end - start)


SOURCE = Source(
    name="nemo-rl",
    about="NeMo-RL's train_data_step*.jsonl",
    suffixes=(".jsonl",),
    grade="sampled",
    switch_on="nothing: train_data_step*.jsonl is in the log folder (env.should_log_nemo_gym_responses has to be off)",
    read=read,
)
