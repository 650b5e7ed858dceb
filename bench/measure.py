"""Interleaved rounds of several arms in one process: seconds, peak memory, and agreement with the reference.

An arm is a function without arguments that scores a workload and returns its figures, token by token. Rounds go
A B C A B C ..., so that a machine that slows down slows all of them. The first rounds are not counted; each arm's
figures of the first one are compared with the reference, and an arm that is wrong is not timed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers

from bench.baselines import NotMeasured, Scores
from trm_audit.errors import UsageError

WARM_UP = 2
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""What of a CPU's abilities matters to a matrix product."""

Arm = Callable[[], Scores]

STRICT = {"trainer_logprobs": (2e-4, 1e-5), "kl": (1e-4, 1e-2), "bucketed_kl": (2e-4, 2e-2), "tv": (2e-4, 1e-3)}
STRICT |= {"rollout_entropy": (1e-3, 1e-4), "trainer_entropy": (1e-3, 1e-4)}
"""float32: largest difference from the reference, absolute and relative."""
ON_AVERAGE = {"trainer_logprobs": 0.05, "kl": 0.01, "bucketed_kl": 0.01, "tv": 0.02}
ON_AVERAGE |= {"rollout_entropy": 1e-3, "trainer_entropy": 0.05}
"""Half precision, whose noise depends on the composition of a batch: mean difference. Rows of a wrong prefix are off
by 0.1 and more; the float32 run is the one that shows exactness."""


@dataclass
class Timing:
    """What was measured of one arm.

    Attributes:
        seconds: of each counted round.
        peak_bytes: largest memory of a counted round above `Memory.base`; None where it cannot be measured.
        deviation: figure -> (largest, mean) absolute difference from the reference.
        failed: why the arm has no time: too large, not available, or wrong figures.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    deviation: dict[str, tuple[float, float]] = field(default_factory=dict)
    failed: str | None = None
    wrong: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Memory:
    """Peak memory since `reset`, above what was there when this was made (the weights).

    On a CPU the kernel's own high-water mark of the resident set, mapped files included; freed memory that the
    allocators kept from another arm is given back first. On a GPU the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0
        self.reset()
        self._base = self.peak() or 0

    def reset(self) -> None:
        gc.collect(1)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        pa.default_memory_pool().release_unused()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        if os.access(CLEAR, os.W_OK):
            CLEAR.write_text("5")

    def peak(self) -> int | None:
        """Bytes above the base, None where the system does not say."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._base
        if not os.access(CLEAR, os.W_OK):
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        return None if found is None else int(found[1]) * 1024 - self._base


def measure(
    arms: Mapping[str, Arm], reference: Scores, memory: Memory, rounds: int, *, strict: bool, cold: Path | None = None
) -> dict[str, Timing]:
    """Times some arms on one workload.

    Args:
        arms: name -> arm.
        reference: figure -> [tokens], NaN where there is none.
        memory: as it was with the weights alone.
        rounds: that count.
        strict: whether figures are held to float32's tolerance.
        cold: a file to drop from the page cache before each arm.
    """
    timings = {name: Timing() for name in arms}
    for turn in range(WARM_UP + rounds):
        for name, arm in arms.items():
            timing = timings[name]
            if timing.failed is not None:
                continue
            memory.reset()
            if cold is not None:
                forget(cold)
            try:
                seconds, scores = _timed(arm)
            except NotMeasured as error:
                timing.failed = str(error)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            if turn == 0:
                _check(timing, scores, reference, strict)
            if turn >= WARM_UP:
                peak = memory.peak()
                timing.seconds.append(seconds)
                timing.peak_bytes = peak if peak is None else max(timing.peak_bytes or 0, peak)
            del scores
    return timings


def _timed(arm: Arm) -> tuple[float, Scores]:
    began = time.perf_counter()
    try:
        scores = arm()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        raise NotMeasured("out of memory") from None
    except UsageError as error:  # out of memory too, or a way of sharing that this model has not
        raise NotMeasured(str(error).splitlines()[0]) from None
    return time.perf_counter() - began, scores


def _check(timing: Timing, scores: Scores, reference: Scores, strict: bool) -> None:
    """Notes how far an arm is off, and fails it if that is too far. Missing figures are right; NaN is not."""
    for name, expected in reference.items():
        if name not in scores:
            continue
        there = ~np.isnan(expected)
        off = np.abs(scores[name][there] - expected[there])
        timing.deviation[name] = (float(off.max()), float(off.mean()))
        if strict:
            absolute, relative = STRICT[name]
            right = bool((off <= absolute + relative * np.abs(expected[there])).all())
        else:
            right = bool(off.mean() <= ON_AVERAGE[name])
        if not right:
            timing.wrong = True
            timing.failed = f"wrong: {name} is off by {off.max():.1e}, {off.mean():.1e} on average"
            return


def forget(file: Path) -> None:
    """Drops a file from the page cache, as far as the system lets us."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def machine(device: torch.device) -> dict[str, object]:
    """What was measured on, without names of hosts or people."""
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", described)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.*)", described)
    have = set(flags[1].split()) if flags else set()
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": [flag for flag in FLAGS if flag in have],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pa.__version__,
    }
