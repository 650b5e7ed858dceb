"""What may be loaded as the training model: a local folder with safetensors and no code of its own.

Looks, does not load.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trm_audit.errors import BadInput

FSDP = ("*.distcp", "pytorch_model_fsdp*", "model_world_size_*_rank_*.pt")
MEGATRON = ("iter_*", "mp_rank_*", "latest_checkpointed_iteration.txt")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that may be loaded.

    Attributes:
        path: the folder.
        config: config.json.
        weights: its safetensors files, sorted.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]

    def digest(self) -> str:
        """SHA-256 over config.json and the bytes of all weights, in order of file name."""
        total = hashlib.sha256()
        for file in (self.path / "config.json", *self.weights):
            with open(file, "rb") as handle:
                total.update(file.name.encode() + b"\0" + hashlib.file_digest(handle, "sha256").digest())
        return total.hexdigest()


def find_checkpoint(folder: Path) -> Checkpoint:
    """Checks a model folder.

    Raises:
        BadInput: not a folder, FSDP or Megatron shards, remote code, pickled weights, a multimodal model, an index that
            names files elsewhere or missing, a damaged safetensors file. The message says how to convert.
    """
    place = str(folder)
    if not folder.is_dir():
        raise BadInput(
            "is not a folder",
            place=place,
            next_step="--model takes a local Hugging Face checkpoint folder; download it first.",
        )
    _refuse_training_shards(folder, place)
    config = _config(folder, place)
    weights = _weights(folder, place)
    for file in weights:
        try:
            with safe_open(str(file), framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"cannot be read as safetensors ({error})", place=str(file), next_step="Fetch the model again."
            ) from error
    return Checkpoint(folder, config, weights)


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _refuse_training_shards(folder: Path, place: str) -> None:
    if _any(folder, FSDP):
        raise BadInput(
            "holds FSDP shards, not a Hugging Face checkpoint",
            place=place,
            next_step="Merge them first: `accelerate merge-weights`, or "
            "`python -m verl.model_merger merge --backend fsdp`.",
        )
    if _any(folder, MEGATRON):
        raise BadInput(
            "holds Megatron shards, not a Hugging Face checkpoint",
            place=place,
            next_step="Export it first (Megatron-Bridge `export_ckpt`, or "
            "`python -m verl.model_merger merge --backend megatron`), or let the trainer write its own "
            "log-probabilities and use --trainer-logprobs stored.",
        )


def _config(folder: Path, place: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput("has no config.json", place=place, next_step="Give the folder that save_pretrained wrote.")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise BadInput(f"is not JSON ({error})", place=str(file)) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput("does not name a model_type", place=str(file))
    if "auto_map" in config:
        raise BadInput(
            "brings its own code (auto_map), which is never run",
            place=str(file),
            next_step=f"If transformers itself knows model_type {config['model_type']!r}, remove the auto_map entry; "
            "otherwise let the trainer write its log-probabilities and use --trainer-logprobs stored.",
        )
    towers = sorted(
        key for key in ("vision_config", "audio_config", "image_token_id", "image_token_index") if key in config
    )
    if towers:
        raise BadInput(
            f"is a multimodal model ({towers[0]}), only text models can be scored",
            place=str(file),
            next_step="Use --trainer-logprobs stored with the trainer's own log-probabilities.",
        )
    return config


def _names(index: Path) -> list[str]:
    """Files that an index names."""
    try:
        names = set(map(str, json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"is not an index of safetensors files ({error!r})", place=str(index), next_step="Fetch the model again."
        ) from error
    return sorted(names)


def _weights(folder: Path, place: str) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _names(index)
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BadInput(f"names {name!r}, which is not a safetensors file of this folder", place=str(index))
            if not (folder / name).is_file():
                raise BadInput(
                    f"names {name}, which is not there", place=str(index), next_step="Fetch the model again."
                )
        return tuple(folder / name for name in names)
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    pickled = _any(folder, PICKLES)
    raise BadInput(
        "has pickled weights only, which are never opened" if pickled else "has no model.safetensors",
        place=place,
        next_step="Convert once where you trust the file: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors.",
    )
