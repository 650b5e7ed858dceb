"""What may be loaded as the training model, and how each refusal says what to do instead."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.errors import BadInput


def put(folder: Path, config: dict[str, object] | None = None, shards: int = 1) -> Path:
    """A folder with config.json and weights in one file, or in several with an index."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    weights = {f"w{i}": np.full((2, 2), i, dtype=np.float32) for i in range(4)}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = [f"model-{i:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in list(weights)[i::shards]}, folder / file)
    index(folder, {f"w{i}": files[i % shards] for i in range(4)})
    return folder


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path) -> str:
    """The whole message, which names a place and a next step."""
    with pytest.raises(BadInput) as caught:
        find_checkpoint(folder)
    assert caught.value.place
    assert caught.value.next_step
    return str(caught.value)


def test_a_folder_with_one_file_of_weights_is_found(tmp_path: Path) -> None:
    found = find_checkpoint(put(tmp_path))
    assert found.weights == (tmp_path / "model.safetensors",)
    assert found.config["model_type"] == "llama"


def test_a_folder_with_an_index_is_found(tmp_path: Path) -> None:
    assert [file.name for file in find_checkpoint(put(tmp_path, shards=2)).weights] == [
        "model-00000.safetensors",
        "model-00001.safetensors",
    ]


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "download it first" in refusal(tmp_path / "HuggingFaceTB" / "SmolLM2")


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "pytorch_model_fsdp_0", "model_world_size_8_rank_0.pt", "pytorch_model_fsdp.bin"]
)
def test_fsdp_shards_are_refused_with_the_command_that_merges_them(name: str, tmp_path: Path) -> None:
    (put(tmp_path) / name).touch()
    message = refusal(tmp_path)
    assert "FSDP" in message
    assert "accelerate merge-weights" in message
    assert "verl.model_merger" in message


@pytest.mark.parametrize("name", ["iter_0000100", "mp_rank_00", "latest_checkpointed_iteration.txt"])
def test_megatron_shards_are_refused_with_the_tool_that_exports_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    message = refusal(tmp_path)
    assert "Megatron" in message
    assert "export_ckpt" in message
    assert "--trainer-logprobs stored" in message


def test_remote_code_is_refused_and_the_message_says_what_to_remove(tmp_path: Path) -> None:
    message = refusal(put(tmp_path, {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}))
    assert "never run" in message
    assert "remove the auto_map entry" in message
    assert "'llama'" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_never_opened(name: str, tmp_path: Path) -> None:
    (put(tmp_path) / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"not even a pickle")
    message = refusal(tmp_path)
    assert "pickled weights only" in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (put(tmp_path) / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["vision_config", "audio_config", "image_token_id"])
def test_multimodal_models_are_refused_plainly(key: str, tmp_path: Path) -> None:
    message = refusal(put(tmp_path, {key: {}}))
    assert "multimodal" in message
    assert key in message
    assert "--trainer-logprobs stored" in message


@pytest.mark.parametrize(
    "name", ["../elsewhere/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "w.bin"]
)
def test_an_index_that_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path, shards=2)
    index(tmp_path, {"w0": name})
    with pytest.raises(BadInput, match="not a safetensors file of this folder"):
        find_checkpoint(tmp_path)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    (put(tmp_path, shards=2) / "model-00001.safetensors").unlink()
    message = refusal(tmp_path)
    assert "names model-00001.safetensors, which is not there" in message
    assert "Fetch the model again" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (put(tmp_path, shards=2) / "model.safetensors.index.json").write_text(text)
    assert "is not an index" in refusal(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    (put(tmp_path) / "config.json").unlink()
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(("text", "cause"), [("{", "is not JSON"), ("[1]", "model_type"), ('{"a": 1}', "model_type")])
def test_a_damaged_config_is_refused(text: str, cause: str, tmp_path: Path) -> None:
    (put(tmp_path) / "config.json").write_text(text)
    with pytest.raises(BadInput, match=cause):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    file = put(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert "cannot be read as safetensors" in message
    assert str(file) in message


def test_the_digest_changes_with_one_weight_and_with_the_config_and_with_nothing_else(tmp_path: Path) -> None:
    first = find_checkpoint(put(tmp_path)).digest()
    (tmp_path / "README.md").write_text("notes")
    assert find_checkpoint(put(tmp_path)).digest() == first
    # WHEN one number differs
    weights = load_file(tmp_path / "model.safetensors")
    weights["w2"][1, 1] += 1e-6
    save_file(weights, tmp_path / "model.safetensors")
    second = find_checkpoint(tmp_path).digest()
    assert second != first
    # THEN so does the digest, and for a setting likewise
    assert find_checkpoint(put(tmp_path, {"rope_theta": 1e6})).digest() not in (first, second)
