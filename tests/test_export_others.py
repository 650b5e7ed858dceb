"""Exports for verl, OpenRLHF, slime, miles, NeMo-RL and prime-rl: what is in them, and what their trainers make of it.

The trainers are too large for a test. How each divides is written down here as its source says it, with the file and
the function, in float64; `tests/test_export_trl.py` takes a step of a real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from export_rows import some_rollouts, table, training_folder

from trm_audit.adapters import TARGETS, load_target, to_nemo_rl, to_openrlhf, to_prime_rl, to_verl
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.export import ExportOptions, export

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_folder(tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_folder(tmp_path_factory.mktemp("dropped"), drop=True)


def to(target: str, train: Path) -> Path:
    """Exports once per folder."""
    out = train.parent / target
    if not out.exists():
        export([str(train)], str(out), ExportOptions(target))
    return out


def at_response(row: dict[str, Any], values: Any) -> list[Any]:
    """What stands at the response of a sequence that has its full length."""
    return list(values)[len(row["prompt_ids"]) : len(row["prompt_ids"]) + len(row["response_ids"])]


# What a trainer that divides by N makes of the shard: the per-token loss is log-probability times advantage, with the
# trainer's own log-probabilities standing in for a forward.


def objective(rows: Rows, weight: Callable[[dict[str, Any]], float]) -> float:
    """Sum over kept rows of weight * advantage * sum over policy tokens, by plain loops."""
    total = 0.0
    for row in rows:
        for value, on in zip(row["trainer_logprobs"] or [], row["response_mask"], strict=True):
            if row["keep"] and on:
                total += weight(row) * row["advantage"] * value
    return total


def policy_tokens(rows: Rows) -> int:
    return sum(sum(row["response_mask"]) for row in rows)


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("slime", "miles", "nemo-rl")])
def test_datasets_polars_and_duckdb_read_every_parquet_file(target: str, train: Path, tmp_path: Path) -> None:
    datasets, duckdb, polars = (pytest.importorskip(name) for name in ("datasets", "duckdb", "polars"))
    files = sorted(to(target, train).glob("*.parquet"))
    assert files
    for file in files:
        rows = pq.read_table(file).num_rows
        assert rows == (4 if file.name == "prompts.parquet" else 16)
        assert len(polars.read_parquet(file)) == rows
        assert duckdb.sql(f"select count(*) from '{file}'").fetchall() == [(rows,)]
        read = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path))
        assert read[0] == pq.read_table(file).slice(0, 1).to_pylist()[0]


@pytest.mark.parametrize("target", list(TARGETS))
def test_every_export_says_how_many_are_rejected_and_what_to_set(target: str, train: Path, tmp_path: Path) -> None:
    rejected = sum(not row["keep"] for row in table(train))
    remarks = export([str(train)], str(tmp_path / "out"), ExportOptions(target)).remarks
    assert remarks[0] == f"{rejected} of 16 sequences are rejected, and keep their place."
    assert len(remarks) >= 2
    assert json.loads((tmp_path / "out" / "export.json").read_text())["remarks"] == remarks
    assert load_target(target).about


class TestVerl:
    def test_tensors_are_padded_as_verl_pads_them(self, train: Path) -> None:
        out = to_verl.load(to("verl", train), 0, reject_by="mask", prompt_length=20, response_length=24)
        tensors = out["tensors"]
        assert all(len(tensor) == 16 for tensor in tensors.values())
        for at, row in enumerate(table(train)):
            prompt, response = row["prompt_ids"], row["response_ids"]
            ids = [0] * (20 - len(prompt)) + prompt + response + [0] * (24 - len(response))
            assert tensors["input_ids"][at].tolist() == ids
            assert tensors["prompts"][at].tolist() + tensors["responses"][at].tolist() == ids
            there = [0] * (20 - len(prompt)) + [1] * (len(prompt) + len(response)) + [0] * (24 - len(response))
            assert tensors["attention_mask"][at].tolist() == there
            inside = tensors["position_ids"][at][tensors["attention_mask"][at] == 1]
            assert inside.tolist() == list(range(len(prompt) + len(response)))
            for name, ours in (("rollout_log_probs", "rollout_logprobs"), ("old_log_probs", "trainer_logprobs")):
                values = tensors[name][at].tolist()
                assert values[: len(response)] == (row[ours] or [])
                assert not any(values[len(response) :])
            assert tensors["token_level_scores"][at].sum() == row["reward"]
            assert tensors["token_level_scores"][at][max(0, len(response) - 1)] == row["reward"]
            assert out["non_tensors"]["uid"][at] == row["group_id"]
            assert out["non_tensors"]["rollout_id"][at] == row["rollout_id"]
        assert out["non_tensors"]["uid"].dtype == object  # DataProto takes no other

    @pytest.mark.parametrize("mode", ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"])
    def test_each_mode_divides_by_all_sequences_or_tokens(self, mode: str, train: Path) -> None:
        # GIVEN agg_loss of verl/trainer/ppo/core_algos.py, with a global_batch_size as ppo_loss gives it
        rows = table(train)
        reject = "advantage" if mode == "token-mean" else "mask"
        tensors = to_verl.load(to("verl", train), 0, reject_by=reject)["tensors"]
        mask = tensors["response_mask"].double()
        losses = tensors["advantages"].double() * tensors["old_log_probs"].double() * mask
        n = 16
        found = {
            "seq-mean-token-sum": losses.sum() / n,
            "seq-mean-token-mean": (losses.sum(-1) / (mask.sum(-1) + 1e-8)).sum() / n,
            "token-mean": losses.sum() / mask.sum(),
        }[mode]
        weight: Callable[[dict[str, Any]], float] = {
            "seq-mean-token-sum": lambda row: 1 / n,
            "seq-mean-token-mean": lambda row: 1 / n / sum(row["response_mask"]),
            "token-mean": lambda row: 1 / policy_tokens(rows),
        }[mode]
        assert float(found) == pytest.approx(objective(rows, weight), rel=1e-6)

    def test_any_mini_batch_divides_by_its_own_tokens_when_the_mask_stays(self, train: Path) -> None:
        for start in range(0, 16, 4):
            some = table(train)[start : start + 4]
            tensors = to_verl.load(to("verl", train), 0, reject_by="advantage", start=start, count=4)["tensors"]
            assert int(tensors["response_mask"].sum()) == policy_tokens(some)

    def test_a_sequence_that_is_too_long_is_not_cut(self, train: Path) -> None:
        with pytest.raises(UsageError, match="tokens, 3 are allowed"):
            to_verl.load(to("verl", train), 0, reject_by="mask", response_length=3)
        with pytest.raises(UsageError, match="row 16 is beyond the end, there are 16 rows"):
            to_verl.load(to("verl", train), 0, reject_by="mask", start=16)


class TestOpenRLHF:
    def test_values_stand_one_before_their_token(self, train: Path) -> None:
        for row, fields in zip(table(train), to_openrlhf.experiences(to("openrlhf", train)), strict=True):
            ids = row["prompt_ids"] + row["response_ids"]
            assert fields["sequences"].tolist() == [ids]
            assert fields["attention_mask"].tolist() == [[1] * len(ids)]
            before = len(row["prompt_ids"]) - 1
            for name, values in (
                ("action_mask", row["response_mask"]),
                ("action_log_probs", row["trainer_logprobs"] or []),
                ("rollout_log_probs", row["rollout_logprobs"] or []),
            ):
                assert fields[name].shape == (1, len(ids) - 1)
                assert fields[name][0, before:].tolist() == values
                assert not fields[name][0, :before].any()
            assert fields["total_length"].tolist() == [len(ids)]
            assert fields["truncated"].tolist() == [row["finish_reason"] == "length"]
            assert fields["rewards"].tolist() == fields["info"]["reward"].tolist() == [row["reward"]]

    @pytest.mark.parametrize("micro_batch", [1, 4, 16])
    def test_no_micro_batch_is_without_tokens_and_rejected_ones_count(self, micro_batch: int, train: Path) -> None:
        # GIVEN masked_mean of openrlhf/models/utils.py: (x * mask).sum() / mask.sum(), micro-batch by micro-batch
        rows = [row for row in table(train) if row["response_ids"]]
        fields = [one for one in to_openrlhf.experiences(to("openrlhf", train)) if one["response_length"] > 0]
        for start in range(0, len(rows), micro_batch):
            some = slice(start, start + micro_batch)
            terms = [(one["advantages"] * one["action_log_probs"]).double().sum() for one in fields[some]]
            tokens = sum(int(one["action_mask"].sum()) for one in fields[some])
            expected = objective(rows[some], lambda row, some=some: 1 / policy_tokens(rows[some]))  # type: ignore[misc]
            assert float(sum(terms)) / tokens == pytest.approx(expected, rel=1e-6, abs=1e-12)


class TestSlime:
    @pytest.mark.parametrize("target", ["slime", "miles"])
    def test_the_file_opens_without_pickled_objects_and_has_the_fields(self, target: str, train: Path) -> None:
        loaded = torch.load(to(target, train) / "rollout_0.pt", weights_only=True)
        assert loaded["rollout_id"] == 0
        rows = {row["rollout_id"]: row for row in table(train)}
        assert len(loaded["samples"]) == 16
        for index, sample in enumerate(loaded["samples"]):
            row = rows[sample["metadata"]["trm_audit"]["rollout_id"]]
            # Sample.from_dict of slime/utils/types.py needs the status, and takes these; lengths as it checks them
            assert set(sample) == {
                *("group_index", "index", "prompt", "tokens", "response", "response_length", "label", "reward"),
                *("loss_mask", "weight_versions", "rollout_log_probs", "remove_sample", "status", "metadata"),
            }
            assert sample["index"] == index
            assert sample["status"] == ("truncated" if row["finish_reason"] == "length" else "completed")
            assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"]) == sample["response_length"]
            assert sample["reward"] == row["reward"]
            assert sample["weight_versions"] == [str(row["policy_version"])]
            if row["response_ids"]:
                assert sample["tokens"] == row["prompt_ids"] + row["response_ids"]
                assert sample["loss_mask"] == [int(on) for on in row["loss_mask"]]
                assert sample["rollout_log_probs"] == row["rollout_logprobs"]
            else:
                assert (sample["response_length"], sample["loss_mask"]) == (1, [0])

    def test_its_mean_over_samples_is_the_objective(self, train: Path) -> None:
        # GIVEN get_sum_of_sample_mean of slime/backends/megatron_utils/cp_utils.py, over the global batch size
        rows = {row["rollout_id"]: row for row in table(train)}
        samples = torch.load(to("slime", train) / "rollout_0.pt", weights_only=True)["samples"]
        total = 0.0
        for sample in samples:
            row = rows[sample["metadata"]["trm_audit"]["rollout_id"]]
            mask = np.array(sample["loss_mask"], dtype=np.float64)
            values = np.array(row["trainer_logprobs"] or [0.0]) * row["advantage"]
            total += float((values * mask).sum() / max(mask.sum(), 1.0))
        expected = objective(table(train), lambda row: 1 / 16 / sum(row["response_mask"]))
        assert total / 16 == pytest.approx(expected, rel=1e-9)

    def test_groups_stand_together_and_versions_of_a_rollout_are_listed_once(self, tmp_path: Path) -> None:
        # GIVEN rows whose groups alternate, and a rollout of two versions
        rows = [row for n in range(4) for row in some_rollouts()[n::4]]
        for row in rows:
            row["policy_version"] = [3] * (len(row["response_ids"]) // 2) + [4] * (-(-len(row["response_ids"]) // 2))
        train = training_folder(tmp_path, rows=rows)
        remarks = export([str(train)], str(tmp_path / "out"), ExportOptions("slime")).remarks
        samples = torch.load(tmp_path / "out" / "rollout_0.pt", weights_only=True)["samples"]
        assert [sample["group_index"] for sample in samples] == [n for n in range(4) for _ in range(4)]
        groups = [sample["metadata"]["trm_audit"]["group_id"] for sample in samples]
        assert len({tuple(groups[n : n + 4]) for n in range(0, 16, 4)}) == 4
        assert all(len(set(groups[n : n + 4])) == 1 for n in range(0, 16, 4))
        assert samples[0]["weight_versions"] == ["3", "4"]
        assert any("--n-samples-per-prompt 4 --rollout-batch-size 4" in line for line in remarks)

    def test_groups_of_other_sizes_and_missing_rewards_are_told(self, tmp_path: Path) -> None:
        train = training_folder(tmp_path / "a", rows=some_rollouts()[:15])
        remarks = export([str(train)], str(tmp_path / "a" / "out"), ExportOptions("slime")).remarks
        assert any("Groups have 3 to 4 samples" in line and "--disable-rewards-norm" in line for line in remarks)
        rows = [{**row, "reward": None if n == 7 else row["reward"]} for n, row in enumerate(some_rollouts())]
        train = training_folder(tmp_path / "b", rows=rows)
        with pytest.raises(BadInput, match=f"rollout_id={rows[7]['rollout_id']}: has no reward"):
            export([str(train)], str(tmp_path / "b" / "out"), ExportOptions("slime"))


class TestNeMoRL:
    def test_a_line_is_a_batch_of_one_with_the_fields_of_the_dump(self, train: Path) -> None:
        # GIVEN log_batched_dict_as_jsonl of nemo_rl/utils/logger.py: lists of one, and idx
        lines = [
            json.loads(line) for line in (to("nemo-rl", train) / "train_data_step0.jsonl").read_text().splitlines()
        ]
        for at, (row, line) in enumerate(zip(table(train), lines, strict=True)):
            ids = row["prompt_ids"] + row["response_ids"]
            assert line["idx"] == at
            assert line["token_ids"] == [ids]
            assert line["input_lengths"] == [len(ids)]
            assert line["rewards"] == [row["reward"]]
            assert line["sample_loss_mask"] == [1.0]
            for name, ours in (
                ("token_loss_mask", row["loss_mask"]),
                ("generation_logprobs", row["rollout_logprobs"] or []),
                ("prev_logprobs", row["trainer_logprobs"] or []),
                ("advantages", [row["advantage"]] * len(row["response_ids"])),
            ):
                assert len(line[name][0]) == len(ids)
                assert at_response(row, line[name][0]) == ours
                assert not any(line[name][0][: len(row["prompt_ids"])])

    @pytest.mark.parametrize("token_level", [False, True])
    def test_both_losses_divide_by_what_was_sampled(self, token_level: bool, train: Path) -> None:
        # GIVEN masked_mean of nemo_rl/algorithms/utils.py, and the sums of sample_mask and token_mask as factors
        rows = table(train)
        data = to_nemo_rl.load(to("nemo-rl", train), 0, reject_by="advantage" if token_level else "mask")
        mask, samples = data["token_mask"].double()[:, 1:], data["sample_mask"].double()
        losses = (data["advantages"] * data["prev_logprobs"]).double()[:, 1:]
        if token_level:
            both = mask * samples[:, None]
            found = (losses * both).sum() / (both.sum() + 1e-8)
            expected = objective(rows, lambda row: 1 / policy_tokens(rows))
        else:
            each = (losses * mask).sum(-1) / (mask.sum(-1) + 1e-8)
            found = (each * samples).sum() / (samples.sum() + 1e-8)
            expected = objective(rows, lambda row: 1 / 16 / sum(row["response_mask"]))
        assert float(found) == pytest.approx(expected, rel=1e-6)

    def test_rows_can_be_taken_in_pieces(self, train: Path) -> None:
        data = to_nemo_rl.load(to("nemo-rl", train), 9, reject_by="mask", start=4, count=3)
        assert data["input_ids"].shape[0] == 3
        assert data["input_ids"].dtype == torch.int64
        lengths = [len(row["prompt_ids"] + row["response_ids"]) for row in table(train)[4:7]]
        assert data["input_lengths"].tolist() == lengths
        for at, length in enumerate(lengths):
            assert set(data["input_ids"][at, length:].tolist()) <= {9}
        with pytest.raises(UsageError, match="no rows from 16 on"):
            to_nemo_rl.load(to("nemo-rl", train), 0, reject_by="mask", start=16)


def training_sample(version: str) -> Any:
    """The fields of prime-rl's TrainingSample (src/prime_rl/transport/types.py), in three of its versions."""
    msgspec = pytest.importorskip("msgspec")
    numbers, flags, ints = list[float], list[bool], list[int]
    fields: dict[str, list[Any]] = {
        "flat": [
            *(
                ("token_ids", ints),
                ("mask", flags),
                ("logprobs", numbers),
                ("temperatures", numbers),
                ("env_name", str),
            ),
            *((name, numbers | None, None) for name in ("ref_logprobs", "rl_weights", "advantages")),
        ],
        "split": [
            *(("prompt_ids", ints), ("prompt_mask", flags), ("completion_ids", ints), ("completion_mask", flags)),
            *(("completion_logprobs", numbers), ("completion_temperatures", numbers)),
            *(("teacher_logprobs", numbers | None, None), ("advantage", float | None, None)),
            ("reward", float | None, None),
        ],
        "unknown": [("token_ids", ints), ("decision_points", ints)],
    }
    return msgspec.defstruct("TrainingSample", fields[version], array_like=True, omit_defaults=True)


class TestPrimeRL:
    def test_flat_samples_are_the_rows_and_survive_the_wire(self, train: Path) -> None:
        msgspec = pytest.importorskip("msgspec")
        kind = training_sample("flat")
        wire = msgspec.msgpack.encode(list(to_prime_rl.samples(to("prime-rl", train), kind, env_name="sums")))
        for row, sample in zip(table(train), msgspec.msgpack.decode(wire, type=list[kind]), strict=True):
            ids = row["prompt_ids"] + row["response_ids"]
            assert sample.token_ids == ids
            assert at_response(row, sample.mask) == row["loss_mask"]
            assert at_response(row, sample.logprobs) == (row["rollout_logprobs"] or [])
            assert at_response(row, sample.advantages) == [row["advantage"]] * len(row["response_ids"])
            assert not any(sample.mask[: len(row["prompt_ids"])])
            assert sample.temperatures == [row["temperature"]] * len(ids)
            assert sample.env_name == "sums"

    def test_split_samples_are_the_rows(self, train: Path) -> None:
        for row, sample in zip(
            table(train), to_prime_rl.samples(to("prime-rl", train), training_sample("split")), strict=True
        ):
            assert (sample.prompt_ids, sample.completion_ids) == (row["prompt_ids"], row["response_ids"])
            assert sample.completion_mask == row["loss_mask"]
            assert sample.completion_logprobs == (row["rollout_logprobs"] or [])
            assert sample.reward == row["reward"]

    @pytest.mark.parametrize("version", ["flat", "split"])
    def test_a_step_divides_by_every_sampled_token(self, version: str, train: Path) -> None:
        # GIVEN a sum over unmasked tokens over their number in the step (prime_rl/trainer/rl/loss.py, train.py)
        rows = table(train)
        total, tokens = 0.0, 0
        for row, sample in zip(rows, to_prime_rl.samples(to("prime-rl", train), training_sample(version)), strict=True):
            mask = at_response(row, sample.mask) if version == "flat" else sample.completion_mask
            weights = at_response(row, sample.rl_weights) if version == "flat" else [1.0] * len(mask)
            advantages = at_response(row, sample.advantages) if version == "flat" else [sample.advantage] * len(mask)
            for value, on, weight, advantage in zip(
                row["trainer_logprobs"] or [], mask, weights, advantages, strict=True
            ):
                total += on * weight * advantage * value
                tokens += on
        assert total / tokens == pytest.approx(objective(rows, lambda row: 1 / policy_tokens(rows)), rel=1e-9)

    def test_a_version_with_unknown_fields_is_refused(self, train: Path) -> None:
        with pytest.raises(UsageError, match="TrainingSample needs decision_points, which is not known here"):
            next(to_prime_rl.samples(to("prime-rl", train), training_sample("unknown")))


def test_dropped_rows_leave_their_factor_in_the_advantages(dropped: Path) -> None:
    rows = table(dropped)
    assert 4 <= len(rows) <= 12
    factor = len(rows) / 16
    wanted = [row["advantage"] * factor for row in rows]
    tensors = to_verl.load(to("verl", dropped), 0, reject_by="mask")["tensors"]
    assert tensors["advantages"].abs().amax(1).tolist() == pytest.approx(np.abs(wanted))
    data = to_nemo_rl.load(to("nemo-rl", dropped), 0, reject_by="mask")
    assert data["advantages"].abs().amax(1).tolist() == pytest.approx(np.abs(wanted))
    # THEN verl's mean over the rows that are there is the objective's over N
    n = len(rows)
    mean = (tensors["advantages"] * tensors["old_log_probs"]).double().sum() / n
    assert float(mean) == pytest.approx(objective(rows, lambda row: 1 / 16), rel=1e-6)


def test_a_trainer_without_a_place_for_the_factor_refuses_dropped_rows(dropped: Path) -> None:
    for target in ("slime", "trl", "openrlhf", "prime-rl"):
        with pytest.raises(BadInput, match="would divide by the rest, and has no place for the factor"):
            export([str(dropped)], str(dropped.parent / f"no-{target}"), ExportOptions(target))


def test_no_factor_of_sequences_makes_a_mean_over_tokens_right(dropped: Path) -> None:
    for target, module in (("verl", to_verl), ("nemo-rl", to_nemo_rl)):
        with pytest.raises(BadInput, match="a mean over tokens would divide by the rest"):
            module.load(to(target, dropped), 0, reject_by="advantage")


@pytest.mark.parametrize("target", ["verl", "openrlhf", "nemo-rl", "prime-rl"])
def test_a_kept_row_without_an_advantage_is_refused_and_a_rejected_one_is_not(target: str, tmp_path: Path) -> None:
    keep = [row["keep"] for row in table(training_folder(tmp_path / "first"))]
    for kept, at in ((True, keep.index(True)), (False, keep.index(False))):
        rows = [{**row, "advantage": None if n == at else 0.5} for n, row in enumerate(some_rollouts())]
        train = training_folder(tmp_path / str(kept), rows=rows)
        if kept:
            with pytest.raises(
                BadInput, match=f"rollout_id={rows[at]['rollout_id']}: advantage is null, and the row is"
            ):
                export([str(train)], str(tmp_path / "out"), ExportOptions(target))
        else:
            export([str(train)], str(tmp_path / "out"), ExportOptions(target))


def test_scores_without_rollouts_or_advantages_cannot_be_exported(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "reward"} for row in some_rollouts()]
    train = training_folder(tmp_path, rows=rows)
    with pytest.raises(BadInput, match="the training shards have no column 'advantage'"):
        export([str(train)], str(tmp_path / "out"), ExportOptions("verl"))
    with pytest.raises(BadInput, match="there is no column 'reward'"):
        export([str(train)], str(tmp_path / "out"), ExportOptions("slime"))
    with pytest.raises(BadInput, match="is not there"):
        to_verl.load(tmp_path, 0, reject_by="mask")
    with pytest.raises(BadInput, match="is not there"):
        to_nemo_rl.load(tmp_path, 0, reject_by="mask")
