"""A step of TRL's GRPOTrainer on an exported shard: what it trains on, and by what it divides.

The reference is the objective itself, by plain loops over the kept rows in float64, with torch's autograd for the
gradient of a log-probability.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from export_rows import TINY, some_rollouts, table, training_folder

from trm_audit.adapters.to_trl import Replay
from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.export import ExportOptions, export

# TRL warns that rollout_func is experimental, and its stack of older names.
pytestmark = pytest.mark.filterwarnings("ignore")
MAX_LENGTH = 24
DIVIDES_BY_SEQUENCES = ("sapo", "luspo")
DIVIDES_BY_UNMASKED_TOKENS = ("bnpo", "cispo", "vespo")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_folder(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def exported(train: Path) -> Path:
    export([str(train)], str(train.parent / "export"), ExportOptions("trl"))
    return train.parent / "export"


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """TRL would report its use, and look for a model card's base model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield


Gradient = dict[str, Any]
Step = Callable[..., Gradient]


@pytest.fixture(scope="module")
def step(offline: None, tmp_path_factory: pytest.TempPathFactory) -> Step:
    """Runs one optimizer step of GRPOTrainer on a replay of 16 rollouts; the gradient that the optimizer would take."""
    trl = pytest.importorskip("trl")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Catch(TrainerCallback):  # type: ignore[misc]
        gradient: Gradient

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            named = more["model"].named_parameters()
            self.gradient = {name: p.grad.double().clone() for name, p in named if p.grad is not None}

    def run(replay: Replay, **settings: Any) -> Gradient:
        torch.manual_seed(0)
        config: dict[str, Any] = {
            "per_device_train_batch_size": 16,
            "num_generations": replay.num_generations,
            "max_completion_length": MAX_LENGTH,
            "scale_rewards": "none",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            **settings,
        }
        catch = Catch()
        trainer = trl.GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32),
            args=trl.GRPOConfig(str(tmp_path_factory.mktemp("out")), **config),
            processing_class=AutoTokenizer.from_pretrained(TINY / "model"),
            train_dataset=replay.dataset(),
            rollout_func=replay.rollouts,
            reward_funcs=replay.reward,
            callbacks=[catch],
        )
        trainer.train()
        return catch.gradient

    return run


@pytest.fixture(scope="module")
def plain(exported: Path, step: Step) -> Callable[[str], Gradient]:
    """The gradient of the export as it is, by loss type; each taken once."""
    return functools.cache(lambda loss_type: step(Replay(exported), loss_type=loss_type))


def objective(rows: list[dict[str, Any]], weight: Callable[[dict[str, Any]], float]) -> Gradient:
    """Gradient of -sum over kept rows of weight * advantage * sum of log-probabilities, in float64, row by row."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        if row["keep"]:
            ids = row["prompt_ids"] + row["response_ids"]
            logits = model(torch.tensor([ids])).logits[0]
            for t, token in enumerate(row["response_ids"]):
                if row["response_mask"][t]:
                    at = len(row["prompt_ids"]) + t - 1
                    loss = loss - weight(row) * row["advantage"] * torch.log_softmax(logits[at], -1)[token]
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(one: Gradient, other: Gradient) -> float:
    """Length of the difference over the length of the second."""
    assert one.keys() == other.keys()
    difference = sum(float(((one[name] - other[name]) ** 2).sum()) for name in one)
    return float((difference / sum(float((g**2).sum()) for g in other.values())) ** 0.5)


def with_other_text(replay: Replay, train: Path) -> Replay:
    """The same replay, in which rejected rows say something else, of another length."""
    other = copy.deepcopy(replay)
    rejected = {row["rollout_id"] for row in table(train) if not row["keep"]}
    assert 4 <= len(rejected) <= 12
    columns = other.columns
    for at, name in enumerate(columns["rollout_id"]):
        if name in rejected:
            columns["completion_ids"][at] = [5, 7, 3, 9, 4, 1]
            columns["logprobs"][at] = [-0.5] * 6
            columns["env_mask"][at] = [0] * 6
    return other


def test_the_shard_has_what_makes_a_step_hard(train: Path) -> None:
    rows = table(train)
    assert len(rows) == 16
    assert any(row["keep"] and not all(row["response_mask"]) for row in rows)
    assert [row["rollout_id"] for row in rows if not row["response_ids"]] == [rows[-1]["rollout_id"]]
    assert len({row["group_id"] for row in rows if row["keep"] and row["advantage"]}) >= 2


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_a_step_is_the_masked_objective_divided_by_all_sequences(
    loss_type: str, train: Path, plain: Callable[[str], Gradient]
) -> None:
    # GIVEN the objective of schemas/training.md: N counts the rejected sequences
    rows = table(train)
    n = len(rows)
    weights = {
        "grpo": lambda row: 1 / n / row["num_tokens"],
        "dr_grpo": lambda row: 1 / n / MAX_LENGTH,
    }
    # THEN TRL's gradient is that of the objective
    assert distance(plain(loss_type), objective(rows, weights[loss_type])) < 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_what_rejected_sequences_say_does_not_matter(
    loss_type: str, train: Path, exported: Path, step: Step, plain: Callable[[str], Gradient]
) -> None:
    other = step(with_other_text(Replay(exported), train), loss_type=loss_type)
    assert distance(other, plain(loss_type)) < 1e-5


def test_the_default_loss_divides_by_the_unmasked_tokens_as_the_export_says(
    train: Path, plain: Callable[[str], Gradient]
) -> None:
    rows = table(train)
    kept = sum(row["num_tokens"] for row in rows if row["keep"])
    everything = sum(row["num_tokens"] for row in rows)
    found = plain("dapo")
    # THEN the kept rows weigh as if the rejected ones had never been sampled
    assert distance(found, objective(rows, lambda row: 1 / kept)) < 1e-5
    assert distance(found, objective(rows, lambda row: 1 / everything)) == pytest.approx(
        everything / kept - 1, rel=1e-4
    )
    remarks = " ".join(export([str(train)], str(train.parent / "again"), ExportOptions("trl")).remarks)
    assert "Set loss_type='grpo' or 'dr_grpo'" in remarks
    assert "'dapo'" in remarks


@pytest.mark.parametrize("loss_type", [*DIVIDES_BY_SEQUENCES, *DIVIDES_BY_UNMASKED_TOKENS])
def test_the_families_of_the_other_losses_are_as_the_export_says(
    loss_type: str, train: Path, exported: Path, step: Step
) -> None:
    # GIVEN the same shard with one more sequence rejected, whose advantage is made 0: only the denominator can change
    replay = Replay(exported)
    columns, rows = replay.columns, {row["rollout_id"]: row for row in table(train)}
    at = next(n for n, name in enumerate(columns["rollout_id"]) if rows[name]["keep"] and rows[name]["num_tokens"] > 3)
    group = [n for n, key in enumerate(columns["prompt"]) if key == columns["prompt"][at]]
    for n in group:  # a group of equal rewards: all its advantages are 0
        columns["reward"][n] = 1.0
    fewer = copy.deepcopy(replay)
    fewer.columns["env_mask"][at] = [0] * len(fewer.columns["env_mask"][at])
    more = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    before, after = (step(one, loss_type=loss_type, **more) for one in (replay, fewer))
    # THEN it stays for one family and shrinks for the other
    if loss_type in DIVIDES_BY_SEQUENCES:
        assert distance(after, before) < 1e-5
    else:
        unmasked = [sum(sum(mask) for mask in one.columns["env_mask"]) for one in (replay, fewer)]
        assert distance(after, before) == pytest.approx(unmasked[0] / unmasked[1] - 1, rel=1e-3)


def test_processes_that_share_a_group_get_different_rollouts_of_it(exported: Path) -> None:
    replay = Replay(exported)
    prompts = [key for key in replay.dataset()["prompt"] for _ in range(4)]

    @dataclasses.dataclass
    class Process:
        process_index: int
        num_generations: int = 4

        @property
        def accelerator(self) -> Process:
            return self

    whole = replay.rollouts(prompts, Process(0))["rollout_id"]
    assert len(set(whole)) == 16
    halves = [replay.rollouts(prompts[8 * k : 8 * k + 8], Process(k))["rollout_id"] for k in range(2)]
    assert halves[0] + halves[1] == whole
    sixths = [replay.rollouts(prompts[6 * k : 6 * k + 6], Process(k))["rollout_id"] for k in range(2)]
    assert sixths[0] + sixths[1] == whole[:12]
    with pytest.raises(UsageError, match="Set num_generations=4"):
        replay.rollouts(prompts, Process(0, num_generations=8))
    with pytest.raises(UsageError, match="no rollouts for the prompt 'What"):
        replay.rollouts(["What is 2 + 2?"], Process(0))


def test_what_trl_is_given_is_what_the_shard_holds(train: Path, exported: Path) -> None:
    found = {row["rollout_id"]: row for row in pq.read_table(exported / "rollouts.parquet").to_pylist()}
    for row in table(train):
        out = found[row["rollout_id"]]
        assert out["prompt"] == row["group_id"]
        assert (out["prompt_ids"], out["reward"], out["advantage"]) == (
            row["prompt_ids"],
            row["reward"],
            row["advantage"],
        )
        if row["response_ids"]:
            assert out["completion_ids"] == row["response_ids"]
            assert out["env_mask"] == [int(on) for on in row["loss_mask"]]
            assert out["logprobs"] == row["rollout_logprobs"]
        else:  # TRL looks at the last token of each completion
            assert (out["completion_ids"], out["env_mask"]) == (row["prompt_ids"][-1:], [0])


def test_rewards_stand_for_advantages_and_missing_logprobs_are_said_to_be_missing(tmp_path: Path) -> None:
    rows = [{**row, "trainer_logprobs": row["rollout_logprobs"]} for row in some_rollouts()]
    train = training_folder(tmp_path, rows=rows)
    file = train / "data" / "part-0.parquet"
    whole = pq.read_table(file)
    less = whole.drop_columns(["reward", "rollout_logprobs"])
    pq.write_table(less.replace_schema_metadata(pq.read_metadata(file).metadata), file)
    remarks = export([str(train)], str(tmp_path / "out"), ExportOptions("trl")).remarks
    assert any("the advantages stand in" in line for line in remarks)
    replay = Replay(tmp_path / "out")
    assert replay.columns["advantage"] == whole.column("advantage").to_pylist()
    assert "logprobs" not in replay.columns


def test_what_trl_cannot_replay_is_refused(tmp_path: Path) -> None:
    rows = some_rollouts()
    cases = [
        ("drop", rows, True, "rows were dropped: TRL would divide by the rest"),
        ("sizes", rows[:15], False, "has 3 rollouts, group .* has 4: TRL repeats every prompt"),
        ("single", rows[:1], False, "at least twice"),
        ("ungrouped", [{**row, "group_id": None} for row in rows], False, "16 rows have no group_id"),
        ("rewardless", [{k: v for k, v in row.items() if k != "reward"} for row in rows], False, "no column 'reward'"),
    ]
    for name, some, drop, cause in cases:
        train = training_folder(tmp_path / name, rows=some, drop=drop)
        with pytest.raises(BadInput, match=cause):
            export([str(train)], str(tmp_path / name / "out"), ExportOptions("trl"))
        assert not (tmp_path / name / "out").exists()
    with pytest.raises(BadInput, match="is not there"):
        Replay(tmp_path)
