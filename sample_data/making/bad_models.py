"""Checkpoint folders that must be refused, each with one fault: `bad/models/`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 19,
}
FAKE = b"not a real checkpoint\n"


def _config(folder: Path, **extra: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **extra}, indent=1) + "\n")


def _weights(folder: Path) -> None:
    save_file({"model.norm.weight": np.ones(8, dtype=np.float32)}, folder / "model.safetensors")


def _pickled(folder: Path) -> None:
    _config(folder)
    (folder / "pytorch_model.bin").write_bytes(FAKE)


def _remote_code(folder: Path) -> None:
    _config(folder, auto_map={"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"})
    _weights(folder)


def _fsdp(folder: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(FAKE)
    (folder / ".metadata").write_bytes(FAKE)


def _megatron(folder: Path) -> None:
    rank = folder / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    (rank / "model_optim_rng.pt").write_bytes(FAKE)
    (folder / "latest_checkpointed_iteration.txt").write_text("1\n")


def _multimodal(folder: Path) -> None:
    vision = {"hidden_size": 8, "model_type": "clip_vision_model"}
    architecture = ["LlavaForConditionalGeneration"]
    config = {"architectures": architecture, "model_type": "llava", "text_config": CONFIG, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _weights(folder)


def _outside_index(folder: Path) -> None:
    _config(folder)
    index = {"metadata": {"total_size": 32}, "weight_map": {"model.norm.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _no_config(folder: Path) -> None:
    _weights(folder)


MODEL_CASES: list[tuple[str, str, str, Callable[[Path], None]]] = [
    ("pickled-weights", "weights are there as pytorch_model.bin only", "safetensors", _pickled),
    ("remote-code", "config.json asks for remote code (auto_map)", "auto_map", _remote_code),
    ("fsdp-shards", "FSDP shards, not a checkpoint", "FSDP", _fsdp),
    ("megatron-shards", "Megatron shards, not a checkpoint", "Megatron", _megatron),
    ("multimodal", "a multimodal model (vision_config)", "multimodal", _multimodal),
    ("index-points-outside", "the index names ../x.safetensors", "../x.safetensors", _outside_index),
    ("no-config", "config.json is missing", "config.json", _no_config),
]
