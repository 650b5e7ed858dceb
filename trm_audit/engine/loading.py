"""From a checkpoint to a loaded transformers model on a device, or several."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any

import torch

from trm_audit.engine.checkpoint import Checkpoint
from trm_audit.errors import BadInput, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:i` as a device. Raises UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: auto, cpu or cuda[:i] is needed") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: auto, cpu or cuda[:i] is needed")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there is no such GPU", next_step="Use --device cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A type by name; `auto` is float32 on a CPU and bfloat16 on a GPU. Raises UsageError for other names."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: auto, {', '.join(DTYPES)} are known")
    return DTYPES[name]


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> Any:
    """The model in evaluation mode.

    Args:
        device: where it goes.
        device_map: `auto` spreads it over all GPUs instead (accelerate does).

    Raises:
        BadInput: weights are missing or of another shape, or transformers does not know the architecture.
        UsageError: accelerate is missing.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if device_map is not None and find_spec("accelerate") is None:
        raise UsageError(f"--device-map {device_map} needs accelerate", next_step="pip install accelerate")
    try:
        auto: Any = transformers.AutoModelForCausalLM
        model, info = auto.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BadInput(f"transformers cannot load it ({_first_line(error)})", place=str(checkpoint.path)) from error
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
    wrong = sorted([*info.get("missing_keys", ()), *mismatched])
    if wrong:
        raise BadInput(
            f"{len(wrong)} weights are missing or of another shape, {wrong[0]} first",
            place=str(checkpoint.path),
            next_step="A model with random weights would score without complaint: fetch or convert it again.",
        )
    return (model if device_map is not None else model.to(device)).eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
