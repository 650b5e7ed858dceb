"""Agreement of stored routing with the trainer's, against the trainer's router logits and a plain loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Run
from models import ARCHITECTURES, VOCAB, save, tiny_model
from some_rollouts import as_table, write_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from trm_audit.engine import tree
from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.routing import agreement
from trm_audit.engine.scorer import Scorer
from trm_audit.engine.stored import score_stored
from trm_audit.errors import RowError
from trm_audit.rollout import RolloutBatch
from trm_audit.shards.rows import RowRules, read_rows

Row = dict[str, Any]
LAYERS = {"qwen3_moe": [0, 1, 2], "mixtral": [0, 1, 2], "gpt_oss": [0, 1, 2], "deepseek_v3": [1, 2]}
"""Layers with experts, of three."""
RUNGS = {name: ["tree", "fork", "packed", "padded", "alone"] for name in LAYERS} | {"qwen3_next": ["auto", "padded"]}
K, EXPERTS = 2, 8


def chosen_alone(trainer: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """[tokens, layers, k] experts of one sequence, by definition from the logits of the trainer's routers."""
    logits: list[np.ndarray] = []
    routers = [module for module in trainer.modules() if type(module).__name__.lower().endswith("topkrouter")]
    hooks = [
        router.register_forward_hook(
            lambda module, _, out: logits.append(scores_of(module, out if isinstance(out, torch.Tensor) else out[0]))
        )
        for router in routers
    ]
    with torch.no_grad():
        trainer(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return np.argsort(-np.stack(logits, 1), axis=-1)[..., :K]


def scores_of(router: Any, logits: torch.Tensor) -> np.ndarray:
    """What the top k are taken of: logits, or DeepSeek-V3's corrected scores of its best group (report, 2.1.2)."""
    scores = logits.double().numpy()
    if not hasattr(router, "e_score_correction_bias"):
        return scores
    scores = 1 / (1 + np.exp(-scores)) + router.e_score_correction_bias.double().numpy()
    groups = scores.reshape(len(scores), 2, EXPERTS // 2)
    best = np.sort(groups, axis=-1)[..., -2:].sum(-1).argmax(-1)
    return np.where(np.arange(EXPERTS) // (EXPERTS // 2) == best[:, None], scores, -np.inf)


@pytest.fixture(scope="module")
def trainers() -> dict[str, PreTrainedModel]:
    found = {name: tiny_model(name) for name in RUNGS}
    for module in found["deepseek_v3"].modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return found


@pytest.fixture(scope="module")
def models(trainers: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainerModel]:
    folders = {name: save(trainer, tmp_path_factory.mktemp(name)) for name, trainer in trainers.items()}
    return {name: TrainerModel(find_checkpoint(folder), device="cpu") for name, folder in folders.items()}


def rollouts(trainer: PreTrainedModel) -> list[Row]:
    """A group with a shared prompt, turns of an agent, tool tokens; every second row one entry short, as of vLLM."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, 40).tolist()
    dialogue = prompt + rng.integers(0, VOCAB, 60).tolist()
    rows = [(prompt, rng.integers(0, VOCAB, 4 + 5 * i).tolist()) for i in range(4)]
    rows += [(dialogue[:at], dialogue[at : at + 20]) for at in (60, 75)]
    rows += [(rng.integers(0, VOCAB, 1).tolist(), rng.integers(0, VOCAB, 9).tolist())]
    return [
        {
            "rollout_id": f"r{i}",
            "prompt_ids": before,
            "response_ids": response,
            "response_mask": [i % 3 > 0 or not 2 <= t < 4 for t in range(len(response))],
            "rollout_logprobs": [-1.0] * len(response),
            "routed_experts": chosen_alone(trainer, before + response)[: -1 if i % 2 else None].tolist(),
        }
        for i, (before, response) in enumerate(rows)
    ]


def disturbed(rows: list[Row], seed: int = 1) -> list[Row]:
    """The same with every third choice replaced by a random one, and each in random order."""
    rng = np.random.default_rng(seed)
    out = []
    for row in rows:
        experts = np.array(row["routed_experts"])
        others = rng.permuted(np.broadcast_to(np.arange(EXPERTS), (*experts.shape[:2], EXPERTS)), axis=-1)[..., :K]
        experts = np.where(rng.random(experts.shape[:2])[..., None] < 0.33, others, rng.permuted(experts, axis=-1))
        out.append({**row, "routed_experts": experts.tolist()})
    return out


def batch_of(rows: list[Row], table: pa.Table | None = None) -> RolloutBatch:
    table = as_table(rows) if table is None else table
    batch, errors = read_rows(
        table.combine_chunks().to_batches()[0], "memory", np.arange(len(rows)), RowRules(vocab_size=VOCAB)
    )
    assert errors == []
    return batch


def found(model: TrainerModel, rows: list[Row], **settings: Any) -> np.ndarray:
    return Scorer(model, None, **{"head_rows": 7, **settings}).score(batch_of(rows)).tokens["routing_agreement"]


def expected(trainer: PreTrainedModel, rows: list[Row]) -> np.ndarray:
    """Token by token, layer by layer."""
    out = []
    for row in rows:
        own = chosen_alone(trainer, row["prompt_ids"] + row["response_ids"])
        for t, mine in enumerate(row["response_mask"]):
            at = len(row["prompt_ids"]) - 1 + t
            pairs = zip(own[at].tolist(), row["routed_experts"][at], strict=True)
            shared = [len(set(one) & set(other)) for one, other in pairs]
            out.append(sum(shared) / (K * len(shared)) if mine else np.nan)
    return np.array(out)


@pytest.mark.parametrize(("name", "rung"), [(name, rung) for name, rungs in RUNGS.items() for rung in rungs])
def test_agreement_is_that_with_the_router_logits_of_single_sequences(
    name: str, rung: str, models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    # GIVEN rollouts whose routing differs from the trainer's here and there
    model, rows = models[name], disturbed(rollouts(trainers[name]))
    wanted = expected(trainers[name], rows)
    assert 0.6 < np.nanmean(wanted) < 0.9
    # WHEN they are scored by any rung, with long sequences in pieces and prefixes cut anywhere
    before = model.sharing
    model.sharing = replace(before, rung=before.rung if rung == "auto" else rung)
    try:
        for max_tokens in (23, 4096):
            np.testing.assert_array_equal(found(model, rows, max_tokens=max_tokens), wanted)
    finally:
        model.sharing = before


@pytest.mark.parametrize("name", LAYERS)
def test_a_trainer_agrees_with_its_own_routing_and_not_with_that_of_the_next_position(
    name: str, models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    rows = rollouts(trainers[name])
    mask = np.concatenate([row["response_mask"] for row in rows])
    own = found(models[name], rows)
    assert (own[mask] == 1).all()
    assert np.isnan(own[~mask]).all()
    assert [one.layer for one in models[name].experts.layers] == LAYERS[name]
    # WHEN the routing stands one position too early or too late
    for shift in (-1, 1):
        moved = [{**row, "routed_experts": np.roll(row["routed_experts"], shift, axis=0).tolist()} for row in rows]
        assert np.mean(found(models[name], moved)[mask]) < 0.8


def test_an_engine_may_store_the_layers_without_experts_too(
    models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    # GIVEN entries for all three layers, zeros in the dense first one, beside rows with the two others only
    rows = disturbed(rollouts(trainers["deepseek_v3"]))
    whole = [
        {**row, "routed_experts": np.pad(row["routed_experts"], ((0, 0), (1, 0), (0, 0))).tolist()} if i % 2 else row
        for i, row in enumerate(rows)
    ]
    assert np.shape(whole[1]["routed_experts"])[1:] == (3, K)
    np.testing.assert_array_equal(found(models["deepseek_v3"], whole), expected(trainers["deepseek_v3"], rows))


def test_what_is_not_known_gives_no_agreement_and_leaves_the_rest_alone(
    models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    # GIVEN -1 for one expert of response token 4, zeros for all of token 6, no routing in row 2
    rows = disturbed(rollouts(trainers["qwen3_moe"]))
    wanted = expected(trainers["qwen3_moe"], rows)
    before = len(rows[1]["prompt_ids"]) - 1
    experts = np.array(rows[1]["routed_experts"])
    experts[before + 4, 1, 0] = -1
    experts[before + 6] = 0
    rows[1]["routed_experts"], rows[2]["routed_experts"] = experts.tolist(), None
    # WHEN scored THEN these are NaN, and nothing else is
    starts = np.cumsum([0] + [len(row["response_ids"]) for row in rows])
    wanted[[starts[1] + 4, starts[1] + 6, *range(starts[2], starts[3])]] = np.nan
    np.testing.assert_array_equal(found(models["qwen3_moe"], rows), wanted)
    # AND where no row has any, or the file has no column, nothing is known and the model is not listened to
    fresh = models["qwen3_moe"].__dict__.pop("experts")
    for none in ([{**row, "routed_experts": None} for row in rows], [_without_routing(row) for row in rows]):
        assert np.isnan(found(models["qwen3_moe"], none)).all()
    assert "experts" not in vars(models["qwen3_moe"])
    models["qwen3_moe"].experts = fresh


def _without_routing(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "routed_experts"}


@pytest.mark.parametrize("name", ["llama", "jetmoe"])
def test_a_dense_model_and_one_that_hides_its_routing_give_no_agreement(
    name: str, trainers: dict[str, PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GIVEN a dense model, and one whose experts are not given numbers but sorted tokens
    hidden = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(ARCHITECTURES, "jetmoe", hidden)
    model = TrainerModel(find_checkpoint(save(tiny_model(name), tmp_path)), device="cpu")
    assert model.experts.layers == ()
    assert np.isnan(found(model, rollouts(trainers["mixtral"]))).all()


def test_nobody_listens_before_or_after(models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]) -> None:
    model, rows = models["mixtral"], rollouts(trainers["mixtral"])
    found(model, rows)
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    with model.experts.listening():
        assert sum(len(module._forward_pre_hooks) for module in model.module.modules()) == 3
    # AND scores are the same to the bit, listened to or not
    scores = [Scorer(model, None, head_rows=16).score(batch_of(r)) for r in (rows, list(map(_without_routing, rows)))]
    for one, other in zip(scores[0].tokens.items(), scores[1].tokens.items(), strict=True):
        if one[0] != "routing_agreement":
            np.testing.assert_array_equal(one[1], other[1])


def test_routing_in_bfloat16_does_not_depend_on_the_batch(trainers: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    # GIVEN constant shapes, filler included
    checkpoint = find_checkpoint(save(trainers["qwen3_moe"], tmp_path))
    model = TrainerModel(checkpoint, device="cpu", dtype="bfloat16", sharing="padded")
    rows = rollouts(trainers["qwen3_moe"])
    together = found(model, rows, max_tokens=256)
    alone = np.concatenate([found(model, [row], max_tokens=256) for row in rows])
    np.testing.assert_array_equal(together, alone)
    # THEN precision flips some choices, and few
    assert 0.9 < np.nanmean(together) < 1


def test_a_compiled_model_can_be_listened_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # GIVEN a layer that was traced while nobody listened
    monkeypatch.setattr("trm_audit.engine.model.COMPILER", "eager")
    trainer = tiny_model("qwen3_moe", num_hidden_layers=1)
    rows = disturbed(rollouts(trainer)[:2])
    plain = [_without_routing(row) for row in rows]
    try:
        model = TrainerModel(find_checkpoint(save(trainer, tmp_path)), device="cpu", compile=True, sharing="tree")
        assert np.isnan(found(model, plain)).all()
        # THEN routing is heard from when it is asked for, and kept no longer
        np.testing.assert_array_equal(found(model, rows), expected(trainer, rows))
        found(model, plain)
        assert not any(model.experts._given)
    finally:
        tree.register()


@pytest.mark.parametrize(("layers", "k"), [(3, 4), (2, 2), (1, 2), (3, 1)])
def test_routing_of_another_architecture_is_an_error_that_names_the_row(
    layers: int, k: int, models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    rows = rollouts(trainers["qwen3_moe"])
    rows[1]["routed_experts"] = np.tile(np.arange(k), (len(rows[1]["routed_experts"]), layers, 1)).tolist()
    with pytest.raises(
        RowError, match=rf"{k} experts in each of {layers} layers, the model has 2 in 3 layers"
    ) as error:
        found(models["qwen3_moe"], rows)
    assert "rollout_id=r1" in error.value.place
    assert "checkpoint" in error.value.next_step


def test_stored_trainer_values_come_without_agreement(trainers: dict[str, PreTrainedModel]) -> None:
    rows = [{**row, "trainer_logprobs": [-1.0] * len(row["response_ids"])} for row in rollouts(trainers["mixtral"])]
    batch = as_table(rows).combine_chunks().to_batches()[0]
    stored, _ = read_rows(batch, "memory", np.arange(len(rows)), RowRules(stored_trainer=True))
    assert np.isnan(score_stored(stored).tokens["routing_agreement"]).all()


def test_a_score_shard_holds_the_agreement_and_leaves_the_routing_behind(
    trainers: dict[str, PreTrainedModel], tmp_path: Path, run: Run
) -> None:
    rows = disturbed(rollouts(trainers["mixtral"]))
    wanted = expected(trainers["mixtral"], rows)
    rows[3]["routed_experts"] = None
    write_shard(tmp_path / "rollouts" / "a.parquet", rows)
    checkpoint = save(trainers["mixtral"], tmp_path / "model")
    outcome = run("score", tmp_path / "rollouts", "--model", checkpoint, "-o", tmp_path / "scores")
    assert outcome.code == 0, outcome.err
    table = pq.read_table(tmp_path / "scores" / "data" / "a.parquet")
    assert "routed_experts" not in table.schema.names
    assert str(table.schema.field("routing_agreement").type) == "list<element: float>"
    lists = table["routing_agreement"].to_pylist()
    assert lists[3] is None
    starts = np.cumsum([0] + [len(row["response_ids"]) for row in rows])
    for i in (0, 1, 2, 4, 5, 6):
        mine = [np.float32(v) if v == v else None for v in wanted[starts[i] : starts[i + 1]]]
        assert lists[i] == mine


def test_the_samples_routing_differs_at_the_tokens_where_it_flipped() -> None:
    # GIVEN the newest version of tiny-moe, sampled in bfloat16 by the weights that score it in float32
    sample = Path(__file__).resolve().parent.parent / "sample_data" / "tiny-moe"
    shards = [pq.read_table(file) for file in sorted((sample / "rollouts").glob("rollouts-*.parquet"))]
    rows = [row for row in pa.concat_tables(shards).to_pylist() if row["policy_version"] == 200]
    wanted = expected(AutoModelForCausalLM.from_pretrained(sample / "model", dtype=torch.float32).eval(), rows)
    # WHEN scored THEN agreement is that of the router logits, and below 1 at 21 of 1,009 tokens
    result = found(TrainerModel(find_checkpoint(sample / "model"), device="cpu"), rows, head_rows=128)
    np.testing.assert_array_equal(result, wanted)
    assert ((result < 1).sum(), (~np.isnan(result)).sum()) == (21, 1009)


# Reading: rule 12 -----------------------------------------------------------------------------------------------------


def faults(routing: list[Any], kind: pa.DataType | None = None) -> list[RowError]:
    """What is said of rows with 2 + 2 tokens and this routing."""
    ids = [[1, 2]] * len(routing)
    columns = {
        "rollout_id": [f"r{i}" for i in range(len(routing))],
        "prompt_ids": ids,
        "response_ids": ids,
        "rollout_logprobs": [[-1.0, -1.0]] * len(routing),
        "routed_experts": pa.array(routing, kind),
    }
    batch = pa.RecordBatch.from_pydict(columns)
    return read_rows(batch, "memory", np.arange(len(routing)), RowRules())[1]


GOOD = [[[0, 3], [1, 2]]] * 4


@pytest.mark.parametrize(
    ("routing", "cause"),
    [
        pytest.param(GOOD[:2], "4 tokens, but routed_experts has 2 entries", id="too-short"),
        pytest.param(GOOD + GOOD[:1], "4 tokens, but routed_experts has 5 entries", id="too-long"),
        pytest.param([], "4 tokens, but routed_experts has 0 entries", id="empty"),
        pytest.param([*GOOD[:3], [[0, 3]]], "layers or experts", id="one-layer-less"),
        pytest.param([[[0, 3], [1]], *GOOD[:3]], "layers or experts", id="one-expert-less"),
        pytest.param([*GOOD[:3], None], "layers or experts", id="null-entry"),
        pytest.param([*GOOD[:3], [[0, 3], None]], "layers or experts", id="null-layer"),
        pytest.param([[]] * 4, "layers or experts", id="no-layers"),
        pytest.param([[[], []]] * 4, "layers or experts", id="no-experts"),
        pytest.param([*GOOD[:3], [[0, None], [1, 2]]], "a null or a number below -1", id="null-expert"),
        pytest.param([*GOOD[:3], [[0, -2], [1, 2]]], "a null or a number below -1", id="below-minus-1"),
    ],
)
def test_routing_of_another_shape_is_a_fault_of_its_row_alone(routing: list[Any], cause: str) -> None:
    kind = pa.list_(pa.list_(pa.list_(pa.int16())))
    (error,) = faults([None, GOOD, routing, GOOD[:3], GOOD], kind)
    assert cause in str(error)
    assert "rule 12" in str(error)
    assert "row 2 " in error.place


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.list_(pa.uint8()))),
        pa.large_list(pa.large_list(pa.large_list(pa.int64()))),
        pa.list_(pa.list_(pa.list_(pa.int32(), 2), 2)),
    ],
    ids=["uint8", "large-int64", "fixed-size-int32"],
)
def test_other_integers_and_lists_mean_the_same(
    kind: pa.DataType, models: dict[str, TrainerModel], trainers: dict[str, PreTrainedModel]
) -> None:
    assert faults([GOOD, None, GOOD[:3]], kind) == []
    # AND they are read alike, from a slice of a larger table too
    rows = disturbed(rollouts(trainers["deepseek_v3"]))
    rows[2]["routed_experts"] = None
    column = pa.array([row["routed_experts"] for row in rows], kind)
    table = as_table(rows)
    table = table.set_column(table.schema.get_field_index("routed_experts"), "routed_experts", column)
    for start in (0, 2):
        one, other = batch_of(rows[start:], table.slice(start)), batch_of(rows[start:])
        assert one.routed_experts is not None
        assert other.routed_experts is not None
        for name in ("layers", "k"):
            np.testing.assert_array_equal(getattr(one.routed_experts, name), getattr(other.routed_experts, name))
        np.testing.assert_array_equal(one.routed_experts.ids.values, other.routed_experts.ids.values)
        np.testing.assert_array_equal(one.routed_experts.ids.offsets, other.routed_experts.ids.offsets)


def test_agreement_is_what_sets_say() -> None:
    # GIVEN choices with unknown and repeated experts among them
    rng = np.random.default_rng(3)
    stored, chosen = (
        rng.permuted(np.broadcast_to(np.arange(9) - (1 - i), (400, 3, 9)), axis=-1)[..., :2] for i in range(2)
    )
    stored[::50, 1] = 5
    wanted = []
    for theirs, ours in zip(stored.tolist(), chosen.tolist(), strict=True):
        known = all(len({*one}) == 2 and min(one) >= 0 for one in theirs)
        shared = sum(len({*one} & {*other}) for one, other in zip(theirs, ours, strict=True))
        wanted.append(shared / 6 if known else np.nan)
    assert 0.1 < np.isnan(wanted).mean() < 0.9
    result = agreement(torch.from_numpy(stored.astype(np.int16)), torch.from_numpy(chosen.astype(np.int16)))
    assert result.dtype == torch.float64
    np.testing.assert_array_equal(result.numpy(), wanted)
