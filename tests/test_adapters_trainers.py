"""From a trainer's dump to rows: real rollouts, written as each project writes them, come back as they were sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from trainer_dumps import (
    Rollout,
    mask_of,
    miles_columns,
    nemo_batch,
    nemo_dump,
    prime_dump,
    prime_record,
    real_rollouts,
    slime_dump,
    slime_sample,
    slime_train_dump,
    with_a_tool,
)

from trm_audit.adapters import load_source
from trm_audit.adapters.base import Given, Row
from trm_audit.errors import BadInput
from trm_audit.pipeline.convert import ConvertOptions, convert

BOTH_SIDES = ("slime", "nemo-rl", "prime-rl")


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """16 real rollouts, one of which called a tool."""
    rows = real_rollouts()
    return [with_a_tool(rows[0]), *rows[1:]]


def dump(name: str, folder: Path, rows: list[Rollout]) -> Path:
    """The rollouts as the project dumps them, in `folder`."""
    samples = [slime_sample(row, i) for i, row in enumerate(rows)]
    write: dict[str, Callable[[], Path]] = {
        "slime-rollouts": lambda: slime_dump(folder / "3.pt", samples),
        "slime": lambda: slime_train_dump(folder / "3_0.pt", rows),
        "miles": lambda: miles_columns(folder / "rollout_3.parquet", samples),
        "nemo-rl": lambda: nemo_dump(folder / "train_data_step7.jsonl", nemo_batch(rows)),
        "prime-rl": lambda: prime_dump(
            folder / "step_7" / "rank_0.jsonl", [prime_record(row, i) for i, row in enumerate(rows)]
        ),
    }
    return write[name]()


def read(name: str, path: Path, given: Given | None = None) -> list[Row]:
    return list(load_source(name.removesuffix("-rollouts")).read(path, given or Given()))


def at_policy_tokens(values: list[float], row: Rollout) -> list[float]:
    return [value for value, sampled in zip(values, mask_of(row), strict=True) if sampled]


@pytest.mark.parametrize("name", ["slime-rollouts", "slime", "miles", "nemo-rl", "prime-rl"])
def test_tokens_masks_and_values_come_back_as_they_were_sampled(
    name: str, rollouts: list[Rollout], tmp_path: Path
) -> None:
    found = read(name, dump(name, tmp_path, rollouts))
    assert len(found) == len(rollouts)
    assert len({row["rollout_id"] for row in found}) == len(found)
    for row, truth in zip(found, rollouts, strict=True):
        assert row["prompt_ids"] == truth["prompt_ids"]
        assert row["response_ids"] == truth["response_ids"]
        assert row["response_mask"] == [bool(value) for value in mask_of(truth)]
        for side in ("rollout_logprobs", "trainer_logprobs"):
            if side in row:
                expected = np.float32(at_policy_tokens(truth[side], truth))
                assert np.array_equal(np.float32(at_policy_tokens(row[side], truth)), expected)
    assert ("trainer_logprobs" in found[0]) == (name in BOTH_SIDES)


@pytest.mark.parametrize("name", BOTH_SIDES)
def test_the_road_from_a_dump_to_a_report(name: str, rollouts: list[Rollout], tmp_path: Path, run: Run) -> None:
    """WHEN a dump with both sides is converted, validated, scored by its own values, filtered and reported
    THEN log-ratios are trainer minus sampler at each policy token, in a plain loop, and every sequence is counted."""
    (tmp_path / "raw").mkdir()
    raw = dump(name, tmp_path / "raw", rollouts)
    folders = {stage: tmp_path / stage for stage in ("rollouts", "scores", "train")}
    result = convert([str(raw)], str(folders["rollouts"]), ConvertOptions(source=name))
    assert (result.rows, dict(result.grades)) == (16, {"sampled": 16})
    for arguments in (
        ("validate", folders["rollouts"]),
        ("score", folders["rollouts"], "--trainer-logprobs", "stored", "-o", folders["scores"]),
        ("filter", folders["scores"], "--delta-max", "0.05", "--max-of", "k2", "-o", folders["train"]),
        ("report", folders["scores"], "-o", tmp_path / "report.json"),
    ):
        outcome = run(*arguments)
        assert outcome.code == 0, outcome.err
    scores = pq.read_table(folders["scores"] / "data").to_pylist()
    for row, truth in zip(scores, rollouts, strict=True):
        ratios = [
            float(np.float32(t)) - float(np.float32(r))
            for t, r, sampled in zip(truth["trainer_logprobs"], truth["rollout_logprobs"], mask_of(truth), strict=True)
            if sampled
        ]
        assert row["num_tokens"] == len(ratios)
        assert row["seq_max_k2"] == pytest.approx(max(0.5 * x * x for x in ratios), rel=1e-6)
    counts = json.loads((folders["train"] / "_SUCCESS").read_text())
    assert counts["n_total"] == 16
    assert 0 < counts["n_kept"] < 16
    kept = pq.read_table(folders["train"] / "data").to_pylist()
    assert [row["advantage"] for row in kept] == [row["reward"] - 0.5 for row in kept]


def test_the_mismatch_kl_that_prime_rl_exports_is_k3(rollouts: list[Rollout], tmp_path: Path, run: Run) -> None:
    raw = dump("prime-rl", tmp_path, rollouts)
    convert([str(raw)], str(tmp_path / "rollouts"), ConvertOptions(source="prime-rl"))
    outcome = run("score", tmp_path / "rollouts", "--trainer-logprobs", "stored", "-o", tmp_path / "scores")
    assert outcome.code == 0, outcome.err
    ours = pq.read_table(tmp_path / "scores" / "data")["seq_mean_k3"].to_pylist()
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    theirs = [np.mean([v for v, m in zip(x["mismatch_kl"], x["loss_mask"], strict=True) if m]) for x in lines]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_nothing_is_shifted_when_a_value_stands_at_its_own_token(rollouts: list[Rollout], tmp_path: Path) -> None:
    """GIVEN full-length fields, WHEN the response is cut out, THEN its first value is that of its first token."""
    for name in ("nemo-rl", "prime-rl"):
        row = read(name, dump(name, tmp_path, rollouts))[1]
        assert row["rollout_logprobs"][0] == rollouts[1]["rollout_logprobs"][0]
        assert row["trainer_logprobs"][-1] == rollouts[1]["trainer_logprobs"][-1]


def test_a_policy_token_without_a_value_leaves_the_whole_list_null(rollouts: list[Rollout], tmp_path: Path) -> None:
    """GIVEN a null, a -9999 and a NaN at policy tokens, and the same where the policy sampled nothing
    THEN the first three lists are null, and the others are kept."""
    record = prime_record(rollouts[1], 0)
    for filler, at in ((None, 3), (-9999.0, 0), (float("nan"), 5)):
        values = list(record["inference_logprobs"])
        values[len(rollouts[1]["prompt_ids"]) + at] = filler
        text = json.dumps({**record, "inference_logprobs": values})
        path = tmp_path / "rank_0.jsonl"
        path.write_text(text + "\n")
        assert read("prime-rl", path)[0]["rollout_logprobs"] is None
    tool = prime_record(rollouts[0], 0)
    start = len(rollouts[0]["prompt_ids"]) + 4
    tool["inference_logprobs"][start : start + 3] = [None, -9999.0, None]
    row = read("prime-rl", prime_dump(tmp_path / "tool.jsonl", [tool]))[0]
    assert row["rollout_logprobs"][4:7] == [0.0] * 3
    assert row["rollout_logprobs"][7:] == rollouts[0]["rollout_logprobs"][7:]


def test_zeros_at_every_policy_token_are_no_evidence(rollouts: list[Rollout], tmp_path: Path) -> None:
    batch = nemo_batch(rollouts[1:3])
    batch["generation_logprobs"][0] = [0.0] * len(batch["generation_logprobs"][0])
    given = Given()
    rows = read("nemo-rl", nemo_dump(tmp_path / "train_data_step1.jsonl", batch), given)
    assert rows[0]["rollout_logprobs"] is None
    assert rows[1]["rollout_logprobs"] is not None
    assert any("exactly 0" in sentence for sentence in given.assumed)


def test_a_trainers_side_that_may_be_a_copy_is_said_to_be_one(rollouts: list[Rollout], tmp_path: Path) -> None:
    batch = nemo_batch(rollouts[1:3])
    own, copied = Given(), Given()
    read("nemo-rl", nemo_dump(tmp_path / "train_data_step1.jsonl", batch), own)
    batch["prev_logprobs"] = batch["generation_logprobs"]
    rows = read("nemo-rl", nemo_dump(tmp_path / "train_data_step2.jsonl", batch), copied)
    assert rows[0]["trainer_logprobs"] == rollouts[1]["rollout_logprobs"]
    assert not any("copied" in sentence for sentence in own.assumed)
    assert any("copied" in sentence for sentence in copied.assumed)


def test_nemo_rl_groups_by_prompt_and_says_what_it_assumed(rollouts: list[Rollout], tmp_path: Path) -> None:
    given = Given(temperature=0.7)
    rows = read("nemo-rl", dump("nemo-rl", tmp_path, rollouts), given)
    prompts = [tuple(row["prompt_ids"]) for row in rollouts]
    groups = [row["group_id"] for row in rows]
    assert [groups.index(group) for group in groups] == [prompts.index(prompt) for prompt in prompts]
    assert {(row["temperature"], row["logprobs_mode"]) for row in rows} == {(0.7, "processed")}
    assert len(given.assumed) == 2


def test_dynamic_sampling_of_nemo_rl_takes_the_reward_of_its_own_row(rollouts: list[Rollout], tmp_path: Path) -> None:
    """GIVEN rewards of all rollouts and filtered_rewards of those trained on, as log_data has them
    THEN a row gets its filtered reward, and lines that hold a reward alone are passed over."""
    batch = {"rewards": [9.0] * 6, **{k: v for k, v in nemo_batch(rollouts[:4]).items() if k != "rewards"}}
    batch["filtered_rewards"] = [row["reward"] for row in rollouts[:4]]
    given = Given()
    rows = read("nemo-rl", nemo_dump(tmp_path / "train_data_step1.jsonl", batch), given)
    assert [row["reward"] for row in rows] == [row["reward"] for row in rollouts[:4]]
    assert any("dynamic sampling" in sentence for sentence in given.assumed)


def test_a_sample_that_nemo_rl_masks_out_has_no_policy_token(rollouts: list[Rollout], tmp_path: Path) -> None:
    batch = nemo_batch(rollouts[:2])
    batch["sample_loss_mask"][1] = 0.0
    rows = read("nemo-rl", nemo_dump(tmp_path / "train_data_step1.jsonl", batch))
    assert any(rows[0]["response_mask"])
    assert not any(rows[1]["response_mask"])
    assert rows[1]["response_ids"] == rollouts[1]["response_ids"]


def test_prime_rl_tokens_of_another_loss_are_not_policy_tokens(rollouts: list[Rollout], tmp_path: Path) -> None:
    """GIVEN weights of the RL loss that are 0 at the first two response tokens (cross entropy trains those)
    THEN the mask is false there; without weights it is the loss mask."""
    start = len(rollouts[1]["prompt_ids"])
    count = start + len(rollouts[1]["response_ids"])
    weights = [0.0] * (start + 2) + [1.0] * (count - start - 2)
    records = [
        prime_record(rollouts[1], 0, rl_weights=weights),
        prime_record(rollouts[1], 1, rl_weights=[None] * count),
    ]
    rows = read("prime-rl", prime_dump(tmp_path / "rank_0.jsonl", records))
    assert rows[0]["response_mask"] == [False, False] + [True] * (count - start - 2)
    assert all(rows[1]["response_mask"])


def test_a_prime_rl_step_without_its_marker_is_read_and_said(rollouts: list[Rollout], tmp_path: Path) -> None:
    records = [prime_record(rollouts[1], 0)]
    told, untold = Given(), Given()
    read("prime-rl", prime_dump(tmp_path / "a" / "rank_0.jsonl", records, stable=False), told)
    read("prime-rl", prime_dump(tmp_path / "b" / "rank_0.jsonl", records), untold)
    assert any("STABLE" in sentence for sentence in told.assumed)
    assert not any("STABLE" in sentence for sentence in untold.assumed)


def test_advantages_that_differ_from_token_to_token_leave_the_column_null(
    rollouts: list[Rollout], tmp_path: Path
) -> None:
    record = prime_record(rollouts[1], 0)
    record["advantages"][-1] += 1.0
    given = Given()
    row = read("prime-rl", prime_dump(tmp_path / "rank_0.jsonl", [record]), given)[0]
    assert row["advantage"] is None
    assert row["reward"] == rollouts[1]["reward"]
    assert any("Advantages that differ" in sentence for sentence in given.assumed)


TEXT = {
    "verl": ({"input": "2 + 2?", "output": "4", "gts": "4", "score": 1.0, "step": 3}, "docs/export_snippets.md"),
    "trl": ({"step": 3, "prompt": "2 + 2?", "completion": "4", "advantage": 0.5}, "rollout_func"),
    "nemo-rl": ({"content": ["4"], "rewards": [1.0], "generation_logprobs": [[0.0]], "idx": 0}, "has token_ids"),
    "prime-rl": ({"prompt": "2 + 2?", "completion": "4", "reward": 1.0}, "token export"),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_without_ids_is_refused_with_what_to_do_instead(name: str, tmp_path: Path) -> None:
    row, next_step = TEXT[name]
    (tmp_path / "3.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match="a third of the sequences") as error:
        read(name, tmp_path / "3.jsonl")
    assert next_step in error.value.next_step
    assert error.value.place.endswith("3.jsonl, line 1")


def test_completions_of_trl_and_text_for_miles_are_refused_as_parquet_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"step": [3], "prompt": ["2 + 2?"], "completion": ["4"]}), tmp_path / "3.parquet")
    for name in ("trl", "miles"):
        with pytest.raises(BadInput, match="no token ids"):
            read(name, tmp_path / "3.parquet")


@pytest.mark.parametrize(("name", "suffix"), [("verl", ".pkl"), ("verl", ".pt"), ("skyrl", ".pkl")])
def test_pickles_are_not_opened(name: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"dump{suffix}").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BadInput, match="can run code") as error:
        read(name, tmp_path / f"dump{suffix}")
    assert "docs/export_snippets.md" in error.value.next_step


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("nemo-rl", ["{", "}"], "line 1: is not JSON"),
        ("nemo-rl", ["[1]"], "is not a JSON object"),
        ("nemo-rl", ['{"token_ids": [[1]], "idx": 0}'], "has no 'input_lengths'"),
        ("prime-rl", ['{"token_ids": [1], "step": 1}'], "has no 'loss_mask'"),
    ],
)
def test_what_is_not_the_format_is_named_with_its_line(
    name: str, lines: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadInput, match=message):
        read(name, tmp_path / "x.jsonl")


def test_another_schema_version_of_prime_rl_is_refused(rollouts: list[Rollout], tmp_path: Path) -> None:
    path = prime_dump(tmp_path / "rank_0.jsonl", [prime_record(rollouts[1], 0, schema_version=2)])
    with pytest.raises(BadInput, match="schema_version 2 is not known"):
        read("prime-rl", path)
