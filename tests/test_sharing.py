"""Each rung of the sharing ladder against one sequence at a time, for each architecture, and the check that chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, VOCAB, logits_alone, save, tiny_model
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trm_audit.engine import tree
from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.sharing import Sharing, choose, longest_window, probe, whole_sequences
from trm_audit.errors import UsageError
from trm_audit.numerics.ragged import Ints

RECURRENT = {"lfm2", "qwen3_next"}
"""Convolutional or recurrent state, which a tree does not carry along its branches."""
BEST = {name: "fork" if name in RECURRENT else "tree" for name in ARCHITECTURES} | {"mamba2": "padded"}


def load(folder: Path, **settings: Any) -> TrainerModel:
    return TrainerModel(find_checkpoint(folder), device="cpu", **settings)


def family() -> list[Ints]:
    """A group, turns of an agent as rows of their own, an end midway, a stranger, one of one token."""
    text = np.random.default_rng(3).integers(0, VOCAB, 400)
    prompt, turn = text[:50], text[50:80]
    branches = [text[100 + 20 * i : 100 + 20 * i + n] for i, n in enumerate((3, 19, 11))]
    rows = [np.concatenate([prompt, branch]) for branch in branches]
    rows += [np.concatenate([prompt, turn, branch]) for branch in (text[200:217], text[220:221])]
    rows += [np.concatenate([prompt, turn]), prompt[:33], text[300:361], text[5:6]]
    return [row.astype(np.int64) for row in rows]


def far(model: TrainerModel, rows: list[Ints], rung: str, max_tokens: int, wanted: list[torch.Tensor]) -> float:
    found = [model.logits(hidden).float() for hidden in whole_sequences(model, rows, rung, max_tokens)]
    return max(float((a.log_softmax(1) - b.log_softmax(1)).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_rung_equals_one_sequence_at_a_time(architecture: str, tmp_path: Path) -> None:
    # GIVEN sequences longer than any sliding window, in steps that cut nodes and sequences anywhere, and in one step
    own = tiny_model(architecture)
    model = load(save(own, tmp_path))
    rows = family()
    wanted = [logits_alone(own, torch.from_numpy(row)) for row in rows]
    assert float(torch.cat(wanted).log_softmax(1).std()) > 0.2  # distributions that could be told apart
    # THEN the best rung is taken, and each that is possible is exact, soft caps, windows, sinks and all
    assert model.sharing.rung == BEST[architecture]
    possible = {"tree": ["tree", "packed", "fork", "padded"], "fork": ["fork", "padded"], "padded": ["padded"]}
    for rung in possible[model.sharing.rung]:
        for max_tokens in (37, 10_000):
            assert far(model, rows, rung, max_tokens, wanted) < 1e-4, (rung, max_tokens)


@pytest.mark.parametrize("architecture", [*sorted(RECURRENT), "mamba2"])
def test_a_rung_that_is_wrong_cannot_be_taken(architecture: str, tmp_path: Path) -> None:
    folder = save(tiny_model(architecture), tmp_path)
    sharing = load(folder).sharing
    assert set(sharing.refused) == ({"tree"} if architecture in RECURRENT else {"tree", "fork", "packed"})
    for rung in list(sharing.refused)[:1]:
        with pytest.raises(UsageError, match=f"--sharing {rung} is not possible with this model"):
            load(folder, sharing=rung)


def test_an_attention_that_a_model_does_not_have_is_found_out(tmp_path: Path) -> None:
    # GIVEN the library's own attention in the place of ours, to which a jump in positions is a new document, or nothing
    model = load(save(tiny_model("llama"), tmp_path))
    assert model.sharing == Sharing("tree", model.sharing.check)
    try:
        AttentionInterface.register(tree.NAME, sdpa_attention_forward)
        found = choose(model, "auto")
    finally:
        tree.register()
    # THEN what would have been silently wrong is refused with its figure
    assert found.rung == "fork"
    assert isinstance(found.refused["tree"], float)
    assert found.refused["tree"] > 0.1
    assert choose(model, "auto").rung == "tree"


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_a_window_that_is_not_kept_is_found_out(architecture: str, tmp_path: Path) -> None:
    # GIVEN our attention without the window that the model asks for
    model = load(save(tiny_model(architecture), tmp_path))
    assert longest_window(model.module) == 13

    def blind(module: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["sliding_window"] = 1 << 20
        return tree.tree_attention(module, *args, **kwargs)

    try:
        AttentionInterface.register(tree.NAME, blind)
        refused = choose(model, "auto").refused
    finally:
        tree.register()
    assert isinstance(refused["tree"], float)
    assert refused["tree"] > 1e-3


def test_the_probe_is_longer_than_the_window_and_not_longer_than_the_model() -> None:
    assert max(map(len, probe(100, 0, 1 << 40))) < 100
    assert min(map(len, probe(100, 500, 1 << 40)[:5])) > 500
    assert max(map(len, probe(100, 4096, 600))) <= 600
    assert max(map(len, probe(100, 0, 16))) <= 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_check_is_made_in_float32_whatever_the_precision(dtype: str, tmp_path: Path) -> None:
    for architecture in ("llama", "gpt_oss", "lfm2"):
        folder = save(tiny_model(architecture), tmp_path / architecture)
        sharing = load(folder, dtype=dtype).sharing
        assert sharing.rung == BEST[architecture]
        assert sharing.check is not None
        assert sharing.check < 1e-4


def test_a_forced_rung_is_taken_and_checked(tmp_path: Path) -> None:
    folder = save(tiny_model("qwen2"), tmp_path)
    for rung in ("tree", "fork", "packed", "padded"):
        sharing = load(folder, sharing=rung).sharing
        assert sharing.rung == rung
        assert sharing.check is not None
        assert sharing.check < 1e-4
    with pytest.raises(UsageError, match="--sharing ladder: auto, tree, fork, packed, padded"):
        load(folder, sharing="ladder")


def test_batch_invariance_contradicts_varying_shapes(tmp_path: Path) -> None:
    folder = save(tiny_model("llama"), tmp_path)
    assert load(folder, batch_invariant=True).sharing.rung == "padded"
    with pytest.raises(UsageError, match="--batch-invariant and --sharing tree contradict"):
        load(folder, batch_invariant=True, sharing="tree")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_padded_scores_in_bfloat16_do_not_depend_to_the_bit_on_batch_neighbours(
    architecture: str, tmp_path: Path
) -> None:
    # GIVEN one sequence alone, with others of all lengths, and in the middle of many like it
    model = load(save(tiny_model(architecture), tmp_path), dtype="bfloat16", sharing="padded")
    rows = family()
    mine = rows[1]
    companies = [[mine], [*rows, mine], [row for row in rows for _ in range(3)], [mine[::-1].copy()] * 7 + [mine] * 2]
    seen = []
    for company in companies:
        at = next(place for place, row in enumerate(company) if np.array_equal(row, mine))
        hidden = whole_sequences(model, company, "padded", 512)[at]
        seen.append(model.logits(hidden))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_the_sentence_for_the_user_names_the_rung_and_its_check(tmp_path: Path) -> None:
    sharing = Sharing("fork", 4e-6, {"tree": 0.31})
    assert sharing.sentence() == (
        "sequences are scored with forked caches, each common prefix once (checked in float32: off by 4.0e-06 at most)"
        "; not tree: scores would be off by 3.1e-01"
    )
