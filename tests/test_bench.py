"""The benchmark measures what it says: shapes of its workloads, agreement of its arms, its count of operations."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from models import VOCAB, save, tiny_model
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import limit as limits
from bench.baselines import Packed, Padded, Scores, attention
from bench.material import FIGURES, Material, make
from bench.measure import CLEAR, Memory, measure
from bench.models import checkpoint
from bench.results import AIMS
from bench.scoring import arguments, main
from bench.workloads import WORKLOADS, Work, trajectories, work

CPU = torch.device("cpu")
MODES = ("sampled", "top64", "full")


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_and_mean_responses_have_the_stated_lengths(name: str) -> None:
    shape = WORKLOADS[name]
    items = trajectories(shape, 1 / 4, groups=2, vocab_size=1000)
    written = [stop - start for item in items for start, stop in item.spans]
    assert len(written) == 2 * shape.trajectories * shape.turns
    assert np.mean(written) == pytest.approx(shape.response / 4, abs=0.5)
    assert {item.spans[0][0] for item in items if not shape.observation} <= {shape.prompt // 4}
    assert np.std(np.log(written)) == pytest.approx(0.7, abs=0.25)


def test_the_rollouts_of_a_group_share_their_prompt_and_those_of_w6_share_nothing() -> None:
    def beginnings(name: str) -> list[set[bytes]]:
        items = trajectories(WORKLOADS[name], 1 / 8, groups=2, vocab_size=50_000)
        return [{item.ids[:32].tobytes() for item in items if item.group == group} for group in (0, 1)]

    for name in ("W1", "W2", "W3", "W4", "W5"):
        first, second = beginnings(name)
        assert len(first) == len(second) == 1
        assert first != second
    assert [len(group) for group in beginnings("W6")] == [16, 16]


def test_a_turn_of_w4_begins_with_all_that_was_before_it() -> None:
    (item, _) = trajectories(WORKLOADS["W4"], 1 / 50, groups=1, vocab_size=1000)
    assert len(item.spans) == 10
    assert item.spans[0][0] > 2048 // 50  # an observation follows the prompt
    assert all(stop < start for (_, stop), (start, _) in zip(item.spans, item.spans[1:], strict=False))
    assert item.spans[-1][1] == len(item.ids)


@pytest.mark.parametrize("name", ["W1", "W4", "W6"])
def test_unique_tokens_and_attended_pairs_are_those_of_a_trie(name: str) -> None:
    items = trajectories(WORKLOADS[name], 1 / 64, groups=2, vocab_size=30)
    prefixes = {tuple(item.ids[:n].tolist()) for item in items for _, stop in item.spans for n in range(1, stop)}
    counted = work(items)
    assert counted.unique_tokens == len(prefixes)
    assert counted.attended == sum(map(len, prefixes))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def material(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Agents in two groups: prompts of different lengths in one batch."""
    items = trajectories(WORKLOADS["W4"], 1 / 100, groups=2, vocab_size=VOCAB)
    return make(items, model, VOCAB, tmp_path_factory.mktemp("material"), MODES)


def some_arms(model: torch.nn.Module, material: Material, mode: str) -> dict[str, Padded | Packed]:
    return {"padded": Padded(model, material, mode), "packed": Packed(model, material, mode, max_tokens=300)}


@pytest.mark.parametrize("mode", MODES)
def test_every_baseline_agrees_with_the_reference(model: torch.nn.Module, material: Material, mode: str) -> None:
    timings = measure(some_arms(model, material, mode), material.reference, Memory(CPU), 1, strict=True)
    expected = {
        "sampled": {"trainer_logprobs", "trainer_entropy"},
        "top64": {"trainer_logprobs", "trainer_entropy", "bucketed_kl"},
        "full": set(FIGURES) - {"bucketed_kl"},
    }
    for timing in timings.values():
        assert timing.failed is None
        assert set(timing.deviation) == expected[mode]
        assert len(timing.seconds) == 1


def test_an_arm_with_wrong_figures_gets_no_time(model: torch.nn.Module, material: Material) -> None:
    right = Padded(model, material, "full")

    def wrong() -> Scores:
        return {name: values * 1.05 for name, values in right().items()}

    def not_a_number() -> Scores:
        return {name: np.full_like(values, np.nan) for name, values in right().items()}

    for strict in (True, False):
        timings = measure({"a": wrong, "b": not_a_number}, material.reference, Memory(CPU), 1, strict=strict)
        assert [timing.wrong for timing in timings.values()] == [True, True]
        assert all(timing.seconds == [] for timing in timings.values())


def test_attention_is_restored_after_the_packed_arm(model: torch.nn.Module, material: Material) -> None:
    with attention(model, "eager"):
        Packed(model, material, "sampled", 300)()
        assert model.config._attn_implementation == "eager"


def test_operations_are_those_that_torch_counts(model: torch.nn.Module) -> None:
    ids, counter = torch.arange(40)[None] % VOCAB, FlopCounterMode(display=False)
    with counter, torch.no_grad(), attention(model, "eager"):
        model(input_ids=ids, use_cache=False)
    whole = Work(rows=1, tokens=40, response_tokens=40, unique_tokens=40, attended=40 * 40)  # eager: every pair
    one_a_second = limits.Rates(layers=1.0, head=1.0, copy=1.0, transfer=None)
    found = limits.limit(model, whole, VOCAB, one_a_second, None)
    rotation = 40 * model.config.head_dim  # cosines and sines of the positions: an outer product
    assert found.compute == pytest.approx(counter.get_total_flops(), abs=2 * rotation)


@pytest.mark.skipif(not CLEAR.exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_that_since_the_reset_above_the_base() -> None:
    memory = Memory(CPU)
    memory.reset()
    block = np.ones(50_000_000, np.uint8)
    assert memory.peak() == pytest.approx(block.nbytes, rel=0.3)
    del block
    memory.reset()
    assert (memory.peak() or 0) < 25_000_000


def test_a_model_is_a_folder_or_shapes_with_random_weights(tmp_path: Path) -> None:
    assert checkpoint(str(tmp_path), tmp_path / "unused", CPU, torch.float32) == tmp_path
    spec = "llama:vocab_size=70,hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2"
    made = checkpoint(spec, tmp_path / "made", CPU, torch.bfloat16)
    config = json.loads((made / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["dtype"]) == ("llama", 70, "bfloat16")


def test_a_run_leaves_its_figures_and_a_page_with_every_ratio_its_aim_and_the_reasons(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "reasons.md").write_text("## Reasons\n\nBecause.\n")
    options = arguments(
        ["--model", str(folder), "--out", "tiny", "--folder", str(tmp_path), "--workloads", "W2", "--rounds", "1"]
    )
    options.scale = Fraction(1, 100)
    assert main(options) == 0
    run = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert [cell["mode"] for cell in run["cells"]] == list(MODES)
    for cell in run["cells"]:
        assert all(timing["failed"] is None for timing in cell["arms"].values())
    page = (tmp_path / "RESULTS.md").read_text()
    assert "Because." in page
    full = run["cells"][2]
    ratio = full["arms"]["padded"]["median"] / full["arms"]["ours"]["median"]
    assert f"{ratio:.2f} ({AIMS['cpu', 'padded', 'full']['W2']})" in page
