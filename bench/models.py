"""Which model is measured: a checkpoint folder, or shapes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

PRESETS = {
    "7b": "qwen2:hidden_size=3584,intermediate_size=18944,num_hidden_layers=28,num_attention_heads=28,"
    "num_key_value_heads=4,vocab_size=152064,max_position_embeddings=131072",
    "wide": "llama:hidden_size=64,intermediate_size=128,num_hidden_layers=2,num_attention_heads=2,"
    "num_key_value_heads=1,vocab_size=151936,max_position_embeddings=131072",
}
"""`7b` has the shapes of Qwen2-7B; `wide` is all vocabulary, for the memory of the scoring step."""


def checkpoint(spec: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """The folder of a checkpoint.

    Args:
        spec: a folder, one of `PRESETS`, or `model_type:name=value,...` as transformers calls them.
        folder: where random weights are written.
        device: where they are drawn; large models take minutes on a CPU.
        dtype: their type.
    """
    if Path(spec).is_dir():
        return Path(spec)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind, _, settings = PRESETS.get(spec, spec).partition(":")
    config = AutoConfig.for_model(kind, **dict(map(_setting, filter(None, settings.split(",")))))
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def _setting(text: str) -> tuple[str, int | float | bool]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, float(value) if "." in value else int(value)
