"""The `.pt` dumps of slime and miles: what their conventions do to a row, and what is not opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainer_dumps import Rollout, miles_columns, real_rollouts, slime_columns, slime_dump, slime_sample, with_a_tool

from trm_audit.adapters import load_source
from trm_audit.adapters.base import Given, Row
from trm_audit.errors import BadInput, RowError
from trm_audit.pipeline.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    return real_rollouts()


def read(path: Path, given: Given | None = None, name: str = "slime") -> list[Row]:
    return list(load_source(name).read(path, given or Given()))


def one(rollout: Rollout, tmp_path: Path, given: Given | None = None, **more: Any) -> Row:
    return read(slime_dump(tmp_path / "3.pt", [slime_sample(rollout, 0, **more)]), given)[0]


def test_settings_that_the_dump_does_not_have_are_assumed_and_said(rollouts: list[Rollout], tmp_path: Path) -> None:
    given = Given()
    row = one(rollouts[0], tmp_path, given)
    assert (row["temperature"], row["top_p"], row["top_k"], row["logprobs_mode"]) == (1.0, 1.0, -1, "tempered")
    assert len(given.assumed) == 2
    stated = Given(temperature=0.8, top_p=0.9, top_k=50, logprobs_mode="raw")
    row = one(rollouts[0], tmp_path, stated)
    assert (row["temperature"], row["top_p"], row["top_k"], row["logprobs_mode"]) == (0.8, 0.9, 50, "raw")
    assert stated.assumed == []


def test_names_groups_and_endings_come_from_the_sample(rollouts: list[Rollout], tmp_path: Path) -> None:
    row = one(rollouts[0], tmp_path, status="truncated", group_index=5, index=41, weight_versions=["12"])
    assert (row["rollout_id"], row["group_id"], row["finish_reason"]) == ("3/41", "3/5", "length")
    assert (row["policy_version"], row["weight_versions"], row["engine"]) == (12, "12", "sglang")


def test_several_weight_versions_give_the_oldest_and_are_kept(rollouts: list[Rollout], tmp_path: Path) -> None:
    given = Given()
    row = one(rollouts[0], tmp_path, given, weight_versions=["10", "9"])
    assert (row["policy_version"], row["weight_versions"]) == (9, "10,9")
    assert any("oldest" in sentence for sentence in given.assumed)
    assert one(rollouts[0], tmp_path, weight_versions=["default"])["policy_version"] is None


def test_a_removed_sample_keeps_its_place_without_a_policy_token(rollouts: list[Rollout], tmp_path: Path) -> None:
    row = one(rollouts[0], tmp_path, remove_sample=True)
    assert not any(row["response_mask"])
    path = slime_dump(
        tmp_path / "3.pt", [slime_sample(rollouts[0], 0, remove_sample=True), slime_sample(rollouts[1], 1)]
    )
    result = convert([str(path)], str(tmp_path / "out"), ConvertOptions(source="slime"))
    assert (result.rows, dict(result.grades)) == (2, {"sampled": 1})


def test_zeros_on_tool_tokens_are_no_log_probabilities(rollouts: list[Rollout], tmp_path: Path) -> None:
    tool = with_a_tool(rollouts[0])
    row = one(tool, tmp_path)
    assert row["response_mask"][3:8] == [True, False, False, False, True]
    assert row["rollout_logprobs"][4:7] == [0.0] * 3


def test_samples_that_share_an_index_get_names_of_their_own(rollouts: list[Rollout], tmp_path: Path) -> None:
    samples = [slime_sample(rollouts[i], 0, index=index) for i, index in enumerate((7, 7, None, 8))]
    rows = read(slime_dump(tmp_path / "3.pt", samples))
    assert [row["rollout_id"] for row in rows] == ["3/7", "3/7.1", "3/row2", "3/8"]


def test_routed_experts_come_through_as_arrays_and_as_tensors(rollouts: list[Rollout], tmp_path: Path) -> None:
    """GIVEN [tokens - 1, layers, k] as np.frombuffer gives it, which torch.save pickles as an array
    THEN it is read with weights_only, under the names of NumPy, and fits the schema."""
    import torch

    count = len(rollouts[0]["prompt_ids"] + rollouts[0]["response_ids"]) - 1
    experts = np.random.default_rng(0).integers(0, 8, (count, 2, 2), dtype=np.int32)
    for found in (np.frombuffer(experts.tobytes(), np.int32).reshape(experts.shape), torch.tensor(experts)):
        row = one(rollouts[0], tmp_path, rollout_routed_experts=found, reward=np.float64(0.5))
        assert np.array_equal(row["routed_experts"], experts)
        assert row["reward"] == 0.5
    result = convert([str(tmp_path / "3.pt")], str(tmp_path / "out"), ConvertOptions(source="slime"))
    assert result.rows == 1
    with pytest.raises(BadInput, match="has 2 dimensions"):
        one(rollouts[0], tmp_path, rollout_routed_experts=experts[:, 0])


def test_a_class_in_the_dump_is_named_and_not_run(rollouts: list[Rollout], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="pathlib") as error:
        one(rollouts[0], tmp_path, metadata={"folder": Path("x")})
    assert "can run code" in error.value.cause
    assert "docs/export_snippets.md" in error.value.next_step


def test_a_damaged_file_and_another_payload_are_refused(tmp_path: Path) -> None:
    import torch

    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pt")
    for name, message in (("cut.pt", "cut.pt"), ("model.pt", "holds neither samples nor rollout_data")):
        with pytest.raises(BadInput, match=message):
            read(tmp_path / name)


def test_nuclei_to_replay_need_the_users_word_on_top_p(rollouts: list[Rollout], tmp_path: Path) -> None:
    nuclei = {"rollout_top_p_token_ids": [1, 2], "rollout_top_p_token_offsets": [0, 1, 2]}
    with pytest.raises(BadInput, match="sampled with top-p"):
        one(rollouts[0], tmp_path, Given(top_p=0.9), **nuclei)
    row = one(rollouts[0], tmp_path, Given(top_p=0.9, logprobs_mode="processed"), **nuclei)
    assert (row["top_p"], row["logprobs_mode"]) == (0.9, "processed")


def test_a_reward_that_is_a_dict_is_null_and_said(rollouts: list[Rollout], tmp_path: Path) -> None:
    given = Given()
    assert one(rollouts[0], tmp_path, given, reward={"score": 1.0})["reward"] is None
    assert any("dict" in sentence for sentence in given.assumed)


def test_a_mask_of_another_length_is_an_error_of_its_row(rollouts: list[Rollout], tmp_path: Path) -> None:
    samples = [slime_sample(rollouts[0], 0, loss_mask=[1, 1]), slime_sample(rollouts[1], 1)]
    path = slime_dump(tmp_path / "3.pt", samples)
    with pytest.raises(RowError, match="response_mask"):
        convert([str(path)], str(tmp_path / "out"), ConvertOptions(source="slime"))
    result = convert([str(path)], str(tmp_path / "most"), ConvertOptions(source="slime", skip_bad=True))
    assert (result.rows, result.num_skipped) == (1, 1)
    with pytest.raises(BadInput, match="a response of 10000"):
        one(rollouts[0], tmp_path, response_length=10000)


def test_columns_of_one_rank_are_read_as_rows(rollouts: list[Rollout], tmp_path: Path) -> None:
    """The train dump of miles and of older slime: torch.save(dict(rollout_id=, rank=, rollout_data=columns))."""
    import torch

    torch.save({"rollout_id": 3, "rank": 1, "rollout_data": slime_columns(rollouts)}, tmp_path / "3_1.pt")
    rows = read(tmp_path / "3_1.pt", name="miles")
    assert [row["rollout_id"] for row in rows] == [f"3/{i}" for i in range(len(rollouts))]
    assert [row["reward"] for row in rows] == [row["reward"] for row in rollouts]
    assert [row["advantage"] for row in rows] == [row["reward"] - 0.5 for row in rollouts]
    assert np.array_equal(np.float32(rows[2]["trainer_logprobs"]), np.float32(rollouts[2]["trainer_logprobs"]))


def test_ranks_that_dump_the_same_samples_are_refused_as_duplicates(rollouts: list[Rollout], tmp_path: Path) -> None:
    import torch

    for rank in (0, 1):
        payload = {"rollout_id": 3, "rank": rank, "rollout_data": slime_columns(rollouts[:2])}
        torch.save(payload, tmp_path / f"3_{rank}.pt")
    with pytest.raises(RowError, match="3/0"):
        convert([str(tmp_path)], str(tmp_path / "out"), ConvertOptions(source="miles"))


def test_the_parquet_of_miles_says_what_its_pt_says(rollouts: list[Rollout], tmp_path: Path) -> None:
    samples = [slime_sample(row, i) for i, row in enumerate([with_a_tool(rollouts[0]), *rollouts[1:]])]
    from_pt = read(slime_dump(tmp_path / "3.pt", samples), name="miles")
    from_parquet = read(miles_columns(tmp_path / "rollout_3.parquet", samples), name="miles")
    for a, b in zip(from_pt, from_parquet, strict=True):
        assert {name: a[name] for name in b if name != "rollout_logprobs"} == {
            name: b[name] for name in b if name != "rollout_logprobs"
        }
        assert np.array_equal(np.float32(a["rollout_logprobs"]), np.float32(b["rollout_logprobs"]))
    assert "group_id" not in from_parquet[0]
