"""Which code computes sums over rows of logits: C++ on a CPU, Triton on a GPU, torch wherever neither can be had.

The choice is automatic and silent: a compiled kernel is used once it has given the torch code's figures on a few rows
(at its first use in a process), and never again if it has not. TRM_AUDIT_NATIVE=0 in the environment turns them off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from trm_audit.numerics import native, torch_rows

COMPILED_TYPES = (torch.float16, torch.bfloat16, torch.float32)

_lock = Lock()
_off = 0


class Kernel(Protocol):
    """Figures of rows of logits, [n, ...] float64 each; torch_rows.py says what they are."""

    def pair(self, rollout: Tensor, trainer: Tensor, ids: Tensor | None, /) -> Tensor:
        """[n, 9], as TokenDivergences."""

    def single(self, logits: Tensor, ids: Tensor | None, /) -> Tensor:
        """[n, 3], as RowStatistics."""

    def tail(self, logits: Tensor, ids: Tensor, count: Tensor, /) -> Tensor:
        """[n, 6], of the tokens that are not in ids."""


def kernel(*logits: Tensor) -> Kernel:
    """The fastest kernel that can take these rows.

    Args:
        logits: [n, V] each, on one device.
    """
    if _off or any(rows.dtype not in COMPILED_TYPES for rows in logits):
        return torch_rows
    with _lock:
        return _compiled(logits[0].device.type) or torch_rows


@contextmanager
def torch_only() -> Iterator[None]:
    """Within it, in every thread, torch computes everything: to compare with, to measure what a kernel is worth."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def checked_ids(ids: Tensor, vocab: int) -> Tensor:
    """The ids as int64.

    Raises:
        ValueError: an id is not below `vocab`. On a GPU, where looking would mean waiting, such an id gives NaN.
    """
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise ValueError(f"token ids {int(ids.min())} .. {int(ids.max())}, and a vocabulary of {vocab}")
    return ids.long()


@cache
def _compiled(device: str) -> Kernel | None:
    if os.environ.get("TRM_AUDIT_NATIVE", "") == "0":
        return None
    found: Kernel | None = None
    if device == "cpu" and native.available():
        found = native
    elif device == "cuda" and find_spec("triton"):
        from trm_audit.numerics import triton_rows

        found = triton_rows
    return found if found and _agrees(found, device) else None


def _agrees(found: Kernel, device: str) -> bool:
    """Whether a kernel gives the torch code's figures of three small pairs of rows."""
    rng = torch.Generator().manual_seed(0)
    trainer = 4 * torch.randn(3, 1500, generator=rng)
    rollout = (trainer + torch.randn(3, 1500, generator=rng)).half()
    rollout[1, 7] = trainer[2, 1400] = trainer[0, 9] = -torch.inf
    rollout, trainer = rollout.to(device), trainer.to(device)
    ids, count = torch.tensor([5, 8, 1499], device=device), torch.tensor([0, 200, 1500], device=device)
    try:
        return all(
            torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            for ours, theirs in (
                (found.pair(rollout, trainer, ids), torch_rows.pair(rollout, trainer, ids)),
                (found.single(rollout, ids), torch_rows.single(rollout, ids)),
                (found.tail(trainer, ids[:, None], count), torch_rows.tail(trainer, ids[:, None], count)),
            )
        )
    except Exception:  # whatever a driver or a compiler may raise: the torch code is there
        return False
