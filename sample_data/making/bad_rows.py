"""Rows that break one rule of schemas/rollout.md each, and a good one to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from making import digit_sums as task

Row = dict[str, Any]


def good_row(index: int) -> Row:
    """A row without fault: "3+8=" answered with ";11<eos>"."""
    return {
        "rollout_id": f"good-{index}",
        "group_id": "good",
        "prompt_ids": task.encode("3+8="),
        "response_ids": [*task.encode(";11"), task.EOS],
        "rollout_logprobs": [-0.105, -0.693, -0.01, -0.25],
        "reward": 1.0,
        "temperature": 1.0,
        "logprobs_mode": "raw",
    }


def overwrite(**values: Any) -> Callable[[Row], Any]:
    """A fault that overwrites columns of the bad row."""
    return lambda row: row.update(values)


def topk(ids: list[int], logprobs: list[float]) -> Callable[[Row], Any]:
    """Top-K evidence at every position of the bad row; the first position is the faulty one."""
    rest = [[2, 3]] * 3, [[-0.1, -2.5]] * 3
    return overwrite(rollout_topk_ids=[ids, *rest[0]], rollout_topk_logprobs=[logprobs, *rest[1]])


def sketched(**values: Any) -> Callable[[Row], Any]:
    """Evidence of grade `sketch` at every position of the bad row: a list of two, a tail of 2 % on 64 numbers."""
    right = {
        "rollout_topk_ids": [[2, 3]] * 4,
        "rollout_topk_logprobs": [[-0.1, -2.573]] * 4,  # .905 and .076
        "rollout_tail_mass": [0.02] * 4,
        "rollout_sketch": sketch_bytes("<f2"),
        "sketch_dim": 64,
        "sketch_seed": 1,
        "sketch_vocab_size": task.VOCAB_SIZE,
    }
    return overwrite(**right | values)


def sketch_bytes(kind: str, positions: int = 4) -> bytes:
    """Positions of 64 numbers whose squares sum to 0.02."""
    return np.full(positions * 64, (0.02 / 64) ** 0.5, dtype=kind).tobytes()


NAN, INF = float("nan"), float("inf")
ROW_CASES: list[tuple[str, int, bool, str, str, Callable[[Row], Any]]] = [
    ("null-rollout-id", 1, False, "rollout_id is null", "rollout_id", overwrite(rollout_id=None)),
    ("empty-rollout-id", 1, False, "rollout_id is an empty string", "rollout_id", overwrite(rollout_id="")),
    ("duplicate-id", 1, False, "rows 0 and 1 have one rollout_id", "good-0", overwrite(rollout_id="good-0")),
    (
        "null-response",
        2,
        False,
        "response_ids is null",
        "response_ids",
        overwrite(response_ids=None, rollout_logprobs=None),
    ),
    ("null-token", 2, False, "a token id is null", "response_ids", overwrite(response_ids=[2, None, 3, 1])),
    ("negative-token", 2, False, "a token id is -1", "-1", overwrite(response_ids=[2, -1, 3, 1])),
    ("token-beyond-vocabulary", 2, True, "a token id is 999", "999", overwrite(response_ids=[2, 999, 3, 1])),
    ("empty-prompt", 2, False, "the prompt is empty, the response is not", "prompt_ids", overwrite(prompt_ids=[])),
    (
        "mask-with-null",
        3,
        False,
        "response_mask contains a null",
        "response_mask",
        overwrite(response_mask=[True, None, True, True]),
    ),
    (
        "mask-of-other-length",
        4,
        False,
        "response_mask has 3 entries, response_ids 4",
        "response_mask",
        overwrite(response_mask=[True] * 3),
    ),
    (
        "logprobs-of-other-length",
        4,
        False,
        "rollout_logprobs has 3 entries, response_ids 4",
        "rollout_logprobs",
        overwrite(rollout_logprobs=[-0.1] * 3),
    ),
    (
        "positive-logprob",
        5,
        False,
        "a log-probability is 0.5",
        "0.5",
        overwrite(rollout_logprobs=[-0.1, 0.5, -0.1, -0.1]),
    ),
    (
        "nan-logprob",
        5,
        False,
        "a log-probability is NaN",
        "rollout_logprobs",
        overwrite(rollout_logprobs=[-0.1, NAN, -0.1, -0.1]),
    ),
    (
        "null-logprob",
        5,
        False,
        "one log-probability of a list is null",
        "rollout_logprobs",
        overwrite(rollout_logprobs=[-0.1, None, -0.1, -0.1]),
    ),
    (
        "placeholder-logprob",
        5,
        False,
        "a log-probability is the placeholder -9999",
        "-9999",
        overwrite(rollout_logprobs=[-0.1, -9999.0, -0.1, -0.1]),
    ),
    ("topk-ascending", 6, False, "top-K values ascend", "top-K", topk([2, 3], [-2.5, -0.1])),
    ("topk-duplicate-ids", 6, False, "a top-K list names one id twice", "top-K", topk([2, 2], [-0.7, -0.8])),
    (
        "topk-of-other-length",
        6,
        False,
        "a top-K list has 3 ids and 2 values",
        "rollout_topk",
        topk([2, 3, 4], [-0.1, -2.5]),
    ),
    ("topk-filler", 6, False, "a raw top-K list is filled up with -inf", "top-K", topk([2, 3], [-0.1, -INF])),
    (
        "topk-sums-to-1.5",
        6,
        False,
        "top-K probabilities sum to 1.5",
        "1.5",
        topk([2, 3], [float(np.log(0.8)), float(np.log(0.7))]),
    ),
    ("zero-temperature", 7, False, "temperature is 0", "temperature", overwrite(temperature=0.0)),
    ("top-p-above-1", 7, False, "top_p is 1.5", "top_p", overwrite(top_p=1.5)),
    ("top-k-below-minus-1", 7, False, "top_k is -2", "top_k", overwrite(top_k=-2)),
    ("unknown-logprobs-mode", 8, False, "logprobs_mode is `cooked`", "cooked", overwrite(logprobs_mode="cooked")),
    (
        "missing-logprobs-mode",
        8,
        False,
        "temperature is 0.6 and nothing says at which stage values were stored",
        "logprobs_mode",
        overwrite(temperature=0.6, logprobs_mode=None),
    ),
    (
        "no-evidence",
        9,
        False,
        "neither log-probabilities nor top-K lists nor logits",
        "evidence",
        overwrite(rollout_logprobs=None),
    ),
    (
        "policy-version-of-other-length",
        10,
        False,
        "policy_version has 2 entries, response_ids 4",
        "policy_version",
        overwrite(policy_version=[7, 8]),
    ),
    (
        "routing-of-other-length",
        12,
        False,
        "routed_experts has 4 entries for 4 tokens of prompt and 4 of response",
        "routed_experts has 4 entries",
        overwrite(routed_experts=[[[0, 5], [3, 1]]] * 4),
    ),
    (
        "routing-of-uneven-layers",
        12,
        False,
        "an entry of routed_experts names the experts of one layer, the others of two",
        "layers or experts",
        overwrite(routed_experts=[*[[[0, 5], [3, 1]]] * 6, [[0, 5]]]),
    ),
    ("sketch-without-seed", 13, False, "sketch_seed is null", "sketch_seed", sketched(sketch_seed=None)),
    (
        "sketch-of-three-positions",
        13,
        False,
        "rollout_sketch is of 3 positions, response_ids of 4",
        "384 bytes",
        sketched(rollout_sketch=sketch_bytes("<f2", 3)),
    ),
    (
        "sketch-in-big-endian",
        13,
        False,
        "the numbers of rollout_sketch are big-endian",
        "length of its tail mass",
        sketched(rollout_sketch=sketch_bytes(">f2")),
    ),
    (
        "sketch-with-the-tail-of-another-position",
        13,
        False,
        "list and tail mass sum to 1.02 at one position",
        "do not make 1 together",
        sketched(rollout_tail_mass=[0.02, 0.02, 0.04, 0.02]),
    ),
    (
        "sketch-of-other-vocabulary",
        13,
        True,
        "sketch_vocab_size is 999, the model has 20 tokens",
        "999 tokens",
        sketched(sketch_vocab_size=999),
    ),
]


def as_table(rows: list[Row]) -> pa.Table:
    """Rows as a table in the types of schemas/rollout.md; a column appears if a row has it."""
    types = {
        "rollout_id": pa.string(),
        "group_id": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.int32()),
        "rollout_logprobs": pa.list_(pa.float32()),
        "rollout_topk_ids": pa.list_(pa.list_(pa.int32())),
        "rollout_topk_logprobs": pa.list_(pa.list_(pa.float32())),
        "response_mask": pa.list_(pa.bool_()),
        "reward": pa.float64(),
        "temperature": pa.float64(),
        "top_p": pa.float64(),
        "top_k": pa.int64(),
        "logprobs_mode": pa.string(),
        "policy_version": pa.list_(pa.int64()),
        "routed_experts": pa.list_(pa.list_(pa.list_(pa.int16()))),
        "rollout_sketch": pa.large_binary(),
        "rollout_tail_mass": pa.list_(pa.float32()),
        "sketch_dim": pa.int32(),
        "sketch_seed": pa.int64(),
        "sketch_vocab_size": pa.int32(),
    }
    used = [name for name in types if any(name in row for row in rows)]
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, types[name]) for name in used]))
