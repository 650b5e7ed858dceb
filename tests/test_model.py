"""Loading a model, and its head in chunks, against its own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, logits_alone, save, sequences, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.loading import pick_device, pick_dtype
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.sharing import whole_sequences
from trm_audit.engine.wide import in_float32
from trm_audit.errors import BadInput, UsageError

LENGTHS = [41, 23, 5]


def load(folder: Path, **settings: Any) -> TrainerModel:
    return TrainerModel(find_checkpoint(folder), device="cpu", **settings)


def in_parts(model: TrainerModel, rows: list[Tensor], chunk: int = 4, **plan: Any) -> list[Tensor]:
    """[n, V] of each row, the head `chunk` positions at a time."""
    found = whole_sequences(model, [row.numpy() for row in rows], plan.get("rung", "padded"), plan.get("max_tokens"))
    return [torch.cat([model.logits(part) for part in hidden.split(chunk)]).float() for hidden in found]


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of a log-probability."""
    return max(float((a.log_softmax(1) - b.log_softmax(1)).abs().max()) for a, b in zip(found, wanted, strict=True))


def test_the_whole_model_is_itself_again_after_its_parts_were_used(tmp_path: Path) -> None:
    model = load(save(tiny_model("gemma2"), tmp_path))
    rows = sequences(LENGTHS)
    first = in_parts(model, rows)
    in_parts(model, rows, rung="tree")
    assert all(torch.equal(a, b) for a, b in zip(first, in_parts(model, rows), strict=True))


@pytest.mark.parametrize(("kind", "rung"), [("default", "tree"), ("linear", "tree"), ("dynamic", "alone")])
def test_positions_that_depend_on_the_longest_row_are_scored_alone_and_in_any_order(
    kind: str, rung: str, tmp_path: Path
) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    settings = {"max_position_embeddings": 16, "rope_parameters": rope}
    model = load(save(tiny_model("llama", **settings), tmp_path))
    assert model.sharing.rung == rung
    # GIVEN sequences beyond the original length, WHEN a longer one came before
    rows = sequences([20, 50, 8])
    for row in (rows[1], *rows):
        fresh = tiny_model("llama", **settings)
        assert far(in_parts(model, [row], rung=rung), [logits_alone(fresh, row)]) < 1e-4
    # THEN all at once are the same too
    wanted = [logits_alone(tiny_model("llama", **settings), row) for row in rows]
    assert far(in_parts(model, rows, rung=rung), wanted) < 1e-4


def test_longrope_is_scored_alone(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = load(save(tiny_model("phi3", rope_parameters=rope), tmp_path))
    assert model.sharing.rung == "alone"
    assert not model.in_pieces


def test_missing_weights_are_refused_rather_than_made_up(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BadInput, match=f"1 weights are missing.*{name}") as caught:
        load(tmp_path)
    assert "random weights" in caught.value.next_step


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:50].contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"another shape, lm_head\.weight first"):
        load(tmp_path)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "zebra"'))
    with pytest.raises(BadInput, match="transformers cannot load it"):
        load(tmp_path)


def test_a_smaller_vocabulary_cuts_the_head(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    whole, cut = load(tmp_path), load(tmp_path, vocab_size=90)
    rows = sequences([12])
    assert cut.vocab_size == 90
    assert torch.equal(in_parts(cut, rows)[0], in_parts(whole, rows)[0][:, :90])
    for size in (0, VOCAB + 1):
        with pytest.raises(UsageError, match=f"--vocab-size {size}: the model has {VOCAB} tokens"):
            load(tmp_path, vocab_size=size)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_a_float32_head_of_a_bfloat16_model_keeps_its_logits_apart(architecture: str, tmp_path: Path) -> None:
    # GIVEN a model in bfloat16, its head once as it is and once in float32
    save(tiny_model(architecture), tmp_path)
    narrow, wide = load(tmp_path, dtype="bfloat16"), load(tmp_path, dtype="bfloat16", head_dtype="float32")
    rows = sequences([30])
    (hidden,) = whole_sequences(narrow, [rows[0].numpy()], "padded")
    (same,) = whole_sequences(wide, [rows[0].numpy()], "padded")
    assert hidden.dtype is torch.bfloat16
    assert torch.equal(hidden, same)
    a, b = narrow.logits(hidden).float(), wide.logits(hidden)
    # THEN the same hidden states give nearly the same logits, which are no longer rounded to bfloat16
    assert b.dtype is torch.float32
    assert float((a - b).abs().max()) < 0.1
    assert torch.equal(a, a.bfloat16().float())
    assert not torch.equal(b, b.bfloat16().float())


def test_a_float32_head_equals_the_matrix_product_in_float32(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    wide = load(tmp_path, dtype="bfloat16", head_dtype="float32")
    (hidden,) = whole_sequences(wide, [sequences([30])[0].numpy()], "padded")
    weight = load_file(tmp_path / "model.safetensors")["lm_head.weight"].bfloat16().float()
    torch.testing.assert_close(wide.logits(hidden), hidden.float() @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_float32_head_holds_no_second_copy_of_its_weights(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    narrow, wide = (load(tmp_path, dtype="bfloat16", head_dtype=name) for name in ("auto", "float32"))
    sizes = [sum(weight.nbytes for weight in model.module.parameters()) for model in (narrow, wide)]
    assert sizes[0] == sizes[1]


def test_a_narrower_head_than_the_decoder_is_refused(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    with pytest.raises(UsageError, match="--head-dtype bfloat16: float32 or that of --dtype is needed"):
        load(tmp_path, dtype="float32", head_dtype="bfloat16")


def test_a_model_in_float32_layer_by_layer_is_the_float32_model(tmp_path: Path) -> None:
    for architecture in ("llama", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba2"):
        # GIVEN a model in bfloat16, and the same weights in float32
        folder = save(tiny_model(architecture), tmp_path / architecture)
        narrow = load(folder, dtype="bfloat16").module
        wide = tiny_model(architecture)
        for weight in wide.parameters():
            weight.data = weight.data.bfloat16().float()
        before = {name: (weight.dtype, weight.data_ptr()) for name, weight in narrow.named_parameters()}
        (row,) = sequences([41])
        with in_float32(narrow):
            found = logits_alone(narrow, row)
        # THEN one is the other while it lasts, and nothing has changed after it
        assert far([found], [logits_alone(wide, row)]) < 1e-4, architecture
        assert before == {name: (weight.dtype, weight.data_ptr()) for name, weight in narrow.named_parameters()}


def test_a_model_spread_by_device_map_scores_the_same(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path)
    rows = sequences(LENGTHS)
    spread = load(tmp_path, device_map="auto")
    assert spread.sharing.rung == "tree"
    assert far(in_parts(spread, rows, rung="tree"), in_parts(load(tmp_path), rows)) < 1e-4


def test_devices_and_types_go_by_name() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    for name in ("tpu", "cuda:99", "meta"):
        with pytest.raises(UsageError, match=f"--device {name}"):
            pick_device(name)
    with pytest.raises(UsageError, match="--dtype int8"):
        pick_dtype("int8", torch.device("cpu"))
