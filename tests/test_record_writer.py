"""Shards from a process that samples: what is in them, what survives a crash, what is refused before it is written."""

from __future__ import annotations

import enum
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import trm_audit
from trm_audit.errors import AuditError, BadInput, OutputError, UsageError
from trm_audit.pipeline.validate import ValidateResult
from trm_audit.record.evidence import Recipe, TokenEvidence, evidence
from trm_audit.record.writer import RolloutWriter
from trm_audit.rollout import Sampling
from trm_audit.shards.read import find_shards

V = 50
PLAIN = Sampling()
TEMPERED = Sampling(0.7, 0.9, 20, "raw")


def sampled(length: int, seed: int = 0, sampling: Sampling = PLAIN, recipe: Recipe | None = None) -> TokenEvidence:
    """Evidence of tokens drawn from random logits."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, V, generator=rng) * 2
    return evidence(logits, logits.argmax(1), sampling, recipe)


def add(writer: RolloutWriter, length: int = 4, seed: int = 0, **more: Any) -> str:
    """Adds a rollout of tokens that all came of the policy."""
    found = sampled(length, seed)
    given = {
        "prompt_ids": [3, 1],
        "response_ids": found.token_ids.tolist(),
        "evidence": found,
        "sampling": PLAIN,
        **more,
    }
    return writer.add(**given)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("rollouts-*.parquet"))


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(file) for file in shards(folder))


def validated(folder: Path) -> ValidateResult:
    """What `trm-audit validate` finds; an error it finds is raised."""
    found = trm_audit.validate([str(folder)], trm_audit.ValidateOptions())
    for error in found.errors:
        raise error
    return found


def test_what_was_added_is_read_back_as_it_was(tmp_path: Path) -> None:
    # GIVEN a rollout whose third and fourth tokens came of a tool
    found = sampled(3, sampling=TEMPERED)
    a, b, c = found.token_ids.tolist()
    with RolloutWriter(tmp_path / "new" / "folder", engine="mine") as writer:
        name = writer.add(
            prompt_ids=torch.tensor([5, 6, 7]),
            response_ids=np.array([a, b, 9, 8, c]),
            response_mask=[True, True, False, False, True],
            evidence=found,
            sampling=TEMPERED,
            rollout_id="sum-07/s2",
            group_id="sum-07",
            reward=0.5,
            policy_version=3,
            finish_reason="stop",
            note="mine",
            advantage=1,
        )
    row = read(tmp_path / "new" / "folder").to_pylist()[0]
    # THEN each value stands where it belongs, zeros and empty lists at the tool's tokens
    assert name == row["rollout_id"] == "sum-07/s2"
    assert (row["prompt_ids"], row["response_ids"]) == ([5, 6, 7], [a, b, 9, 8, c])
    assert row["response_mask"] == [True, True, False, False, True]
    assert (row["group_id"], row["reward"], row["policy_version"]) == ("sum-07", 0.5, 3)
    assert (row["engine"], row["finish_reason"], row["note"], row["advantage"]) == ("mine", "stop", "mine", 1.0)
    assert (row["temperature"], row["top_p"], row["top_k"]) == (0.7, 0.9, 20)
    assert row["logprobs_mode"] == "processed"
    assert (row["sketch_dim"], row["sketch_seed"], row["sketch_vocab_size"]) == (64, 1, V)
    arrays = found.numpy()
    at = [0, 1, 4]
    vectors = np.frombuffer(row["rollout_sketch"], "<f2").reshape(5, 64)
    assert np.array_equal(vectors[at], arrays["vectors"])
    assert not vectors[2:4].any()
    for column, values in (("logprobs", "logprobs"), ("tail_mass", "tail_mass"), ("entropy", "entropy")):
        stored = np.array(row[f"rollout_{column}"], dtype=np.float32)
        assert np.array_equal(stored[at], arrays[values])
        assert not stored[2:4].any()
    for i, t in enumerate(at):
        there = arrays["topk_logprobs"][i] > -np.inf
        assert row["rollout_topk_ids"][t] == arrays["topk_ids"][i][there].tolist()
        assert row["rollout_topk_logprobs"][t] == arrays["topk_logprobs"][i][there].tolist()
    assert row["rollout_topk_ids"][2] == []


def test_a_shard_is_a_rollout_shard_of_our_types_and_passes_every_rule(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        for seed in range(5):
            add(writer, length=seed, seed=seed)
    found = validated(tmp_path)
    assert (found.shards, found.rows, found.num_tokens) == (1, 5, 10)
    assert found.grades["sketch"] == 4  # one response is empty
    kind = pq.read_schema(shards(tmp_path)[0])
    assert kind.metadata[b"trm_audit.kind"] == b"rollouts"
    assert kind.field("rollout_topk_logprobs").type.value_type.value_type == pa.float16()
    assert kind.field("rollout_sketch").type == pa.large_binary()


def test_rows_of_several_recipes_and_rows_of_sampled_values_stand_in_one_shard(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        wide, narrow = sampled(3, 1, recipe=Recipe(8, 128, 7)), sampled(2, 2)
        add(writer, evidence=wide, response_ids=wide.token_ids)
        add(writer, evidence=narrow, response_ids=narrow.token_ids)
        raw = Sampling(0.5, 1.0, -1, "raw")
        writer.add(
            prompt_ids=[1],
            response_ids=[2, 3],
            logprobs=[-0.5, None],  # type: ignore[list-item]
            response_mask=[True, False],
            sampling=raw,
        )
        writer.add(prompt_ids=[1], response_ids=[2], response_mask=[False], sampling=raw)
    table = read(tmp_path)
    assert table["sketch_dim"].to_pylist() == [128, 64, None, None]
    assert table["sketch_seed"].to_pylist() == [7, 1, None, None]
    assert table["logprobs_mode"].to_pylist() == ["processed", "processed", "raw", "raw"]
    assert table["rollout_logprobs"].to_pylist()[2:] == [[-0.5, 0.0], None]
    assert table["rollout_logprobs"].to_pylist()[0] == wide.logprobs.tolist()
    assert dict(validated(tmp_path).grades) == {"sketch": 2, "sampled": 1}


def test_rewards_may_be_added_to_a_shard_later(tmp_path: Path) -> None:
    # GIVEN a shard without rewards
    with RolloutWriter(tmp_path) as writer:
        names = [add(writer, seed=seed) for seed in range(3)]
    shard = shards(tmp_path)[0]
    table = pq.read_table(shard)
    assert table["reward"].to_pylist() == [None] * 3
    # WHEN they are set as the module's text says
    rewards_by_id = {name: float(i) for i, name in enumerate(names)}
    at = table.schema.get_field_index("reward")
    rewards = [rewards_by_id[name] for name in table["rollout_id"].to_pylist()]
    trm_audit.write_rollout_table(shard, table.set_column(at, "reward", pa.array(rewards, pa.float64())))
    # THEN they are there, and so is the evidence
    assert pq.read_table(shard)["reward"].to_pylist() == [0.0, 1.0, 2.0]
    assert validated(tmp_path).grades["sketch"] == 3


def test_a_shard_is_closed_when_its_rows_are_there(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path, rows_per_shard=2) as writer:
        for seed in range(5):
            add(writer, seed=seed)
        assert len(shards(tmp_path)) == 2
        assert len(writer) == 1
    assert [pq.read_metadata(file).num_rows for file in shards(tmp_path)] == [2, 2, 1]


def test_a_shard_is_closed_at_the_first_row_after_its_time(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path, seconds=0.05) as writer:
        add(writer, seed=0)
        assert shards(tmp_path) == []
        time.sleep(0.06)
        add(writer, seed=1)
        assert len(shards(tmp_path)) == 1
        add(writer, seed=2)  # the time begins anew with the next row
        assert len(shards(tmp_path)) == 1


def test_a_shard_of_long_responses_is_closed_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm_audit.record.writer.BYTES_PER_SHARD", 30_000)
    with RolloutWriter(tmp_path) as writer:
        add(writer, length=50)  # about 14,000 bytes
        assert shards(tmp_path) == []
        add(writer, length=100)
        assert len(shards(tmp_path)) == 1


def test_an_exception_in_the_block_still_publishes_what_was_finished(tmp_path: Path) -> None:
    def generate() -> None:
        with RolloutWriter(tmp_path) as writer:
            add(writer, seed=0)
            add(writer, seed=1)
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        generate()
    assert validated(tmp_path).rows == 2


def test_flush_publishes_at_once_and_nothing_twice(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        writer.flush()
        add(writer)
        writer.flush()
        writer.flush()
        assert validated(tmp_path).rows == 1
    writer.close()
    assert validated(tmp_path).rows == 1
    with pytest.raises(UsageError, match="closed"):
        add(writer, seed=1)


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as first, RolloutWriter(tmp_path) as second:
        add(first, seed=0)
        add(second, seed=1)
    assert len(shards(tmp_path)) == 2
    assert validated(tmp_path).rows == 2


WRITES_FOREVER = """
import sys, torch
from trm_audit.record import Sampling, evidence
from trm_audit.record.writer import RolloutWriter
logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
writer = RolloutWriter(sys.argv[1], rows_per_shard=3)
while True:
    writer.add(prompt_ids=[1], response_ids=logits.argmax(1), sampling=Sampling(),
               evidence=evidence(logits, logits.argmax(1)))
    print(len(writer), flush=True)
"""


def test_a_process_that_is_killed_loses_the_rows_since_its_last_shard_and_no_more(tmp_path: Path) -> None:
    # GIVEN a process that writes a shard for each three rollouts
    folder = tmp_path / "rollouts"
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOREVER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    # WHEN it is killed at any moment after eleven of them
    for _ in range(11):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # THEN whole shards are there, and nothing that a reader stumbles over
    found = validated(folder)
    assert found.rows == 3 * found.shards >= 9
    assert {file.name for file in folder.iterdir() if not file.name.startswith(".")} == {
        file.name for file in shards(folder)
    }
    process.stdout.close()


def test_a_shard_that_a_dying_writer_left_unfinished_is_passed_over(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        add(writer)
    (tmp_path / f".{shards(tmp_path)[0].name}").write_bytes(b"PAR1 and no more")
    found = find_shards([str(tmp_path)], "rollouts")
    assert len(found.shards) == 1
    assert found.bad == []
    assert validated(tmp_path).rows == 1


EXITS = """
import os, sys, torch
from trm_audit.record import Sampling, evidence
from trm_audit.record.writer import RolloutWriter
writer = RolloutWriter(sys.argv[1])
logits = torch.randn(4, 50)
def add(name):
    writer.add(prompt_ids=[1], response_ids=logits.argmax(1), sampling=Sampling(), rollout_id=name,
               evidence=evidence(logits, logits.argmax(1)))
add("parent")
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    add("child")
"""


def test_what_was_added_is_published_when_the_interpreter_exits_and_a_fork_writes_only_its_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", EXITS, str(tmp_path)], check=True)
    assert len(shards(tmp_path)) == 2
    assert sorted(read(tmp_path)["rollout_id"].to_pylist()) == ["child", "parent"]


def test_rows_are_kept_while_the_folder_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    writer = RolloutWriter(folder)
    add(writer, rollout_id="kept")
    folder.rmdir()
    with pytest.raises(OutputError, match="1 rollouts are kept in memory"):
        writer.flush()
    folder.mkdir()
    writer.close()
    assert read(folder)["rollout_id"].to_pylist() == ["kept"]


def test_a_disk_that_is_full_leaves_neither_a_shard_nor_a_part_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path) -> None:
        assert file.name.startswith(".")  # readers pass it over
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RolloutWriter(tmp_path, rows_per_shard=2) as writer:
        add(writer, rollout_id="a")
        with monkeypatch.context() as patch:
            patch.setattr("trm_audit.record.writer.sync_file", full)
            with pytest.raises(OutputError, match="No space left on device") as raised:
                add(writer, seed=1, rollout_id="b")
            assert "flush() tries again" in raised.value.next_step
        assert [*tmp_path.iterdir()] == []
        add(writer, seed=2, rollout_id="c")
    assert read(tmp_path)["rollout_id"].to_pylist() == ["a", "b", "c"]


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        RolloutWriter(tmp_path / "file")
    with pytest.raises(UsageError, match="rows_per_shard = 0"):
        RolloutWriter(tmp_path / "folder", rows_per_shard=0)


def test_policy_versions_are_numbers_or_a_list_for_each_token(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path, rows_per_shard=2) as writer:
        add(writer, length=2, policy_version=5)
        add(writer, length=2, seed=1)
        add(writer, length=2, seed=2, policy_version=np.int64(7))
        add(writer, length=2, seed=3, policy_version=[7, 8])
    numbers, lists = (pq.read_table(file)["policy_version"].to_pylist() for file in shards(tmp_path))
    assert numbers == [5, None]
    assert lists == [[7, 7], [7, 8]]
    assert validated(tmp_path).rows == 4


def test_a_column_of_ones_own_takes_a_type_that_holds_all_its_values(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        for seed, value in enumerate((None, 1, 2.5, np.float32(3))):
            add(writer, seed=seed, score=value, tags=[] if seed == 0 else ["a"])
        add(writer, seed=9)
        with pytest.raises(BadInput, match="column 'score' cannot hold 'high'"):
            add(writer, seed=10, score="high")
    table = read(tmp_path)
    assert table["score"].to_pylist() == [None, 1.0, 2.5, 3.0, None]
    assert table["tags"].to_pylist() == [[], ["a"], ["a"], ["a"], None]


def test_a_column_is_not_widened_at_the_cost_of_digits(tmp_path: Path) -> None:
    with RolloutWriter(tmp_path) as writer:
        add(writer, seed=0, step=2**60 + 1)
        with pytest.raises(BadInput, match=r"column 'step' cannot hold 0\.5"):
            add(writer, seed=1, step=0.5)
        add(writer, seed=2, step=7)
    assert read(tmp_path)["step"].to_pylist() == [2**60 + 1, 7]


def test_after_a_failed_attempt_add_waits_before_the_next_and_what_waits_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # GIVEN a disk that is full, and room in memory for some rows of about 16,000 bytes
    monkeypatch.setattr("trm_audit.record.writer.BYTES_WAITING", 70_000)
    attempts = []

    def full(file: Path) -> None:
        attempts.append(file)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = RolloutWriter(tmp_path, rows_per_shard=2, seconds=1000)
    with monkeypatch.context() as patch:
        patch.setattr("trm_audit.record.writer.sync_file", full)
        add(writer, 50, rollout_id="0")
        with pytest.raises(OutputError):
            add(writer, 50, rollout_id="1")
        # WHEN more are added
        for i in range(2, 12):
            add(writer, 50, rollout_id=str(i))
            assert len(writer) <= 5
        # THEN no further attempt is made, and the log says how many were dropped
        assert len(attempts) == 1
        assert writer.blocked
    writer.close()
    kept = read(tmp_path)["rollout_id"].to_pylist()
    assert kept == [str(i) for i in range(12 - len(kept), 12)]
    assert f"{12 - len(kept)} in all, " in caplog.records[-1].message
    assert not writer.blocked


def test_after_its_time_add_tries_again(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    with RolloutWriter(folder, rows_per_shard=1, seconds=0.05) as writer:
        folder.rmdir()
        with pytest.raises(OutputError):
            add(writer, seed=0)
        folder.mkdir()
        add(writer, seed=1)
        held = len(writer)
        time.sleep(0.06)
        add(writer, seed=2)
        assert (held, len(writer)) == (2, 0)


def test_a_folder_that_became_a_file_is_an_output_error_too(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    writer = RolloutWriter(folder)
    add(writer)
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        writer.flush()
    folder.unlink()
    folder.mkdir()
    writer.close()
    assert read(folder).num_rows == 1


def test_of_several_threads_each_row_is_published_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with RolloutWriter(tmp_path, rows_per_shard=5) as writer, ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda seed: add(writer, seed=seed), range(60)))
    assert sorted(read(tmp_path)["rollout_id"].to_pylist()) == sorted(names)


NAN = evidence(torch.full((4, V), torch.nan), torch.zeros(4, dtype=torch.long))
EXCLUDED = evidence(torch.where(torch.arange(V) == 3, -torch.inf, torch.zeros(4, V)), torch.full((4,), 3))
REFUSED: dict[str, tuple[dict[str, Any], type[AuditError], str]] = {
    "evidence-of-other-tokens": ({"response_ids": [1, 2, 3, 4]}, BadInput, "evidence 0 is of token"),
    "evidence-too-short": ({"evidence": sampled(3)}, BadInput, "4 tokens were sampled by the policy, evidence is of 3"),
    "mask-too-short": ({"response_mask": [True]}, BadInput, "response_ids has 4 tokens, response_mask has 1"),
    "versions-too-short": ({"policy_version": [1]}, BadInput, "response_ids has 4 tokens, policy_version has 1"),
    "stored-too-short": ({"trainer_logprobs": [-1.0]}, BadInput, "trainer_logprobs has 1"),
    "padded-prompt": ({"prompt_ids": [-100, 3]}, BadInput, f"prompt_ids contains -100, outside 0..{V - 1}"),
    "prompt-beyond-the-vocabulary": ({"prompt_ids": [V]}, BadInput, f"prompt_ids contains {V}, outside"),
    "prompt-as-text": ({"prompt_ids": "hello"}, BadInput, "a list of token ids is needed"),
    "no-prompt": ({"prompt_ids": []}, BadInput, "prompt_ids is empty"),
    "no-evidence": ({"evidence": None}, UsageError, "carries no evidence"),
    "both": ({"logprobs": [-1.0] * 4}, UsageError, "carries evidence and logprobs"),
    "greedy": ({"sampling": Sampling(0.0)}, UsageError, "temperature is 0, above 0 is needed"),
    "top-p": ({"sampling": Sampling(top_p=0.0)}, UsageError, "top_p is in"),
    "stage": ({"sampling": Sampling(logprobs_mode="cooked")}, UsageError, "logprobs_mode one of raw"),
    "nan-logits": ({"response_ids": [0] * 4, "evidence": NAN}, BadInput, "evidence 0 is not finite"),
    "excluded-token": ({"response_ids": [3] * 4, "evidence": EXCLUDED}, BadInput, "evidence 0 is not finite"),
    "positive": ({"evidence": None, "logprobs": [-1, -1, 0.5, -1]}, BadInput, "logprobs at position 2 is 0.5"),
    "not-a-number": ({"evidence": None, "logprobs": [-1, np.nan, -1, -1]}, BadInput, "logprobs at position 1 is nan"),
    "logprobs-too-short": ({"evidence": None, "logprobs": [-1]}, BadInput, "logprobs has 1"),
    "unnamed": ({"rollout_id": ""}, UsageError, "rollout_id is empty"),
    "twice": ({"rollout_id": "first"}, BadInput, "was added before"),
    "reason-as-number": ({"finish_reason": 3}, BadInput, "cannot be stored"),
    "reason-as-enum": ({"finish_reason": enum.Enum("Reason", "STOP").STOP}, BadInput, "cannot be stored"),  # type: ignore[attr-defined]
    "version-beyond-64-bits": ({"policy_version": 2**63}, BadInput, "cannot be stored"),
    "lone-surrogate-in-id": ({"rollout_id": "a\ud800"}, BadInput, "cannot be stored"),
    "lone-surrogate-in-group": ({"group_id": "a\ud800"}, BadInput, "cannot be stored"),
    "lone-surrogate-in-reason": ({"finish_reason": "a\ud800"}, BadInput, "cannot be stored"),
    "tensor-as-temperature": ({"sampling": Sampling(torch.tensor(0.8))}, BadInput, "cannot be stored"),  # type: ignore[arg-type]
    "empty-struct": ({"note": {}}, BadInput, "column 'note' cannot hold"),
    "empty-struct-within": ({"note": [{"a": {}}]}, BadInput, "column 'note' cannot hold"),
    "uneven-evidence": ({"evidence": replace(sampled(4), entropy=torch.zeros(3))}, BadInput, "of different lengths"),
    "column-of-ours": ({"rollout_sketch": b""}, UsageError, "column 'rollout_sketch' is written from the evidence"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_reader_would_refuse_is_refused_at_once_and_leaves_no_row(tmp_path: Path, case: str) -> None:
    change, error, message = REFUSED[case]
    with RolloutWriter(tmp_path) as writer:
        add(writer, rollout_id="first", seed=5)
        with pytest.raises(error, match=message.replace("(", r"\(")) as raised:
            add(writer, **{"rollout_id": "r7", **change})
        assert str(change.get("rollout_id", "r7")) in raised.value.place
    assert read(tmp_path)["rollout_id"].to_pylist() == ["first"]


def test_the_output_of_a_command_is_no_place_to_record_to(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="output of a trm-audit command"):
        RolloutWriter(tmp_path)
