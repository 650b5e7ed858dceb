"""Roads in and out: one module per foreign format, found by the name that the command line calls it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trm_audit.adapters.base import Source, Target

SOURCES = {
    "vllm": "vllm",
    "sglang": "sglang",
    "llama-cpp": "llama_cpp",
    "slime": "slime",
    "miles": "miles",
    "nemo-rl": "nemo_rl",
    "prime-rl": "prime_rl",
    "verl": "verl",
    "skyrl": "skyrl",
    "trl": "trl",
}
"""Name -> module that reads it (`SOURCE`)."""
TARGETS = {
    "trl": "to_trl",
    "verl": "to_verl",
    "openrlhf": "to_openrlhf",
    "slime": "to_slime",
    "miles": "to_slime",
    "nemo-rl": "to_nemo_rl",
    "prime-rl": "to_prime_rl",
}
"""Name -> module that writes it (`TARGET`)."""


def load_source(name: str) -> Source:
    """The adapter that reads a format. Raises KeyError for an unknown one."""
    found: Source = import_module(f"trm_audit.adapters.{SOURCES[name]}").SOURCE
    return found


def load_target(name: str) -> Target:
    """The adapter that writes a format. Raises KeyError for an unknown one."""
    found: Target = import_module(f"trm_audit.adapters.{TARGETS[name]}").TARGET
    return found
