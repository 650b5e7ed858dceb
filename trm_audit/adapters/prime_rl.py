"""prime-rl: `token_exports/step_N/rank_K.jsonl`, one line per sequence that was trained on, both sides in it.

Per-token fields are as long as `token_ids`, the prompt included, and what stands at position i is of token i: the
trainer has shifted its values back before it exports them, so nothing is shifted here. At the first token of a sequence
stands a filler. Values that were not finite are null. vLLM is run with `processed_logprobs`.

Sequences without a trained token are never exported: what was dropped before is not there to audit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import both_sides, integers, json_lines, need, one_value, sampling
from trm_audit.errors import BadInput

SCHEMA_VERSION = 1
FIELDS = ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs", "step", "rank", "export_sequence_idx")
IDS = "Switch the trainer's token export on: it has the ids and both sides' log-probabilities."
SAMPLED = ("rl_weights", "ref_kl_weights")
"""Weights of the losses that need the sampler's log-probabilities; a token with neither was not sampled for them."""


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of one rank's file, in its order.

    Raises:
        BadInput: a line has other fields, another schema version, or text without token ids.
    """
    if not (path.parent / "STABLE").exists():
        given.assume("There is no file STABLE beside the export: the step may not be complete.")
    given.assume("prime-rl exports sequences that are trained on, no others: N is their number.")
    for place, line in json_lines(path):
        need(line, FIELDS, place, SOURCE.about, IDS)
        if line.get("schema_version") != SCHEMA_VERSION:
            raise BadInput(
                f"schema_version {line.get('schema_version')!r} is not known, only {SCHEMA_VERSION}",
                place=place,
                next_step="Use a trm-audit that knows it.",
            )
        yield _row(line, place, given)


def _row(line: Mapping[str, Any], place: str, given: Given) -> Row:
    """A sequence. Its prompt ends where the first trained token stands."""
    ids = integers(line["token_ids"])
    names = ("loss_mask", "inference_logprobs", "trainer_logprobs")
    uneven = [name for name in names if len(line[name]) != len(ids)]
    if uneven:
        raise BadInput(f"{uneven[0]} has {len(line[uneven[0]])} entries for {len(ids)} tokens", place=place)
    trained = [bool(value) for value in line["loss_mask"]]
    start = trained.index(True) if True in trained else len(ids)
    mask = [a and b for a, b in zip(trained, _weighed(line, len(ids)), strict=True)][start:]
    if line.get("training_mode") == "sft":
        mask = [False] * len(mask)
    return {
        "rollout_id": f"step_{line['step']}/rank_{line['rank']}/{line['export_sequence_idx']}",
        "prompt_ids": ids[:start].tolist(),
        "response_ids": ids[start:].tolist(),
        "response_mask": mask,
        **both_sides(line["inference_logprobs"][start:], line["trainer_logprobs"][start:], mask, given),
        "reward": one_value((line.get("rewards") or [])[start:], mask, "Rewards", given),
        "advantage": one_value((line.get("advantages") or [])[start:], mask, "Advantages", given),
        "step": int(line["step"]),
        "env_name": str(line.get("env_name") or ""),
        "engine": "vllm",
        **sampling(given, "processed", "prime-rl runs vLLM with processed_logprobs, which is taken for granted."),
    }


def _weighed(line: Mapping[str, Any], count: int) -> list[bool]:
    """Where a token weighs in a loss that compares it with the sampler; everywhere where no weights are exported."""
    streams = [line[name] for name in SAMPLED if line.get(name) is not None and line[name] != [None] * count]
    if line.get(SAMPLED[0]) in (None, [None] * count):
        return [True] * count
    return [any(bool(stream[at]) for stream in streams) for at in range(count)]


SOURCE = Source(
    name="prime-rl",
    about="prime-rl's token_exports/step_*/rank_*.jsonl",
    suffixes=(".jsonl",),
    grade="sampled",
    switch_on="the trainer's token export (enable_token_export; experimental.token_export in older releases)",
    read=read,
)
