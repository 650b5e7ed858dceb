"""Sums over rows of logits in C++ (rows.cpp), for a CPU: compiled where a compiler is at hand, and kept for next time.

Why not torch.compile: side by side on two busy AVX-512 cores, V = 49152, float16 against float32, it took 35 s to start
(5 s with its cache) and 0.39 ms a row pair, this 2 s (nothing from the cache) and 0.10 ms; one needs a C++ compiler
either way, and the other Python's headers too.

A library is kept under the hash of source, compiler and CPU, and used by rows.py only after a comparison with torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-trapping-math", "-shared", "-fPIC")
BLOCK = 1024  # of rows.cpp
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_ROWS = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]  # logits, their type, logits from row to row
_COUNT, _AT = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "trm_single": [*_ROWS, _COUNT, _COUNT, _AT, _AT],
    "trm_pair": [*_ROWS, *_ROWS, _COUNT, _COUNT, _AT, _AT, _AT],
    "trm_tail": [*_ROWS, _COUNT, _COUNT, _AT, _COUNT, _AT, _AT, _AT],
}


def pair(rollout: Tensor, trainer: Tensor, ids: Tensor | None) -> Tensor:
    """`torch_rows.pair` for the types of TYPES on a CPU."""
    n, vocab = rollout.shape
    rollout, trainer, ids = _dense(rollout), _dense(trainer), None if ids is None else ids.contiguous()
    out = torch.empty(n, 9, dtype=torch.float64)

    def work(start: int, end: int) -> None:
        scratch = torch.empty(2 * (_padded(vocab) + _padded(vocab) // BLOCK))
        both = *_rows(rollout, start), *_rows(trainer, start), end - start, vocab
        _library().trm_pair(*both, _at(ids, start), scratch.data_ptr(), _at(out, start))

    _spread(n, work)
    return out


def single(logits: Tensor, ids: Tensor | None) -> Tensor:
    """`torch_rows.single` for the types of TYPES on a CPU."""
    n, vocab = logits.shape
    logits, ids = _dense(logits), None if ids is None else ids.contiguous()
    out = torch.empty(n, 3, dtype=torch.float64)

    def work(start: int, end: int) -> None:
        _library().trm_single(*_rows(logits, start), end - start, vocab, _at(ids, start), _at(out, start))

    _spread(n, work)
    return out


def tail(logits: Tensor, ids: Tensor, count: Tensor) -> Tensor:
    """`torch_rows.tail` for the types of TYPES on a CPU."""
    n, vocab = logits.shape
    logits, ids, count = _dense(logits), ids.contiguous(), count.contiguous()
    out = torch.empty(n, 6, dtype=torch.float64)

    def work(start: int, end: int) -> None:
        scratch = torch.empty(2 * _padded(vocab))
        known = _at(ids, start), ids.shape[1], _at(count, start)
        _library().trm_tail(*_rows(logits, start), end - start, vocab, *known, scratch.data_ptr(), _at(out, start))

    _spread(n, work)
    return out


def available() -> bool:
    """Whether the compiled code is there or can be made now: the first call may take the seconds of a compilation."""
    try:
        _library()
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError):  # RuntimeError: there is no home
        return False
    return True


def _spread(rows: int, work: Callable[[int, int], None]) -> None:
    """Runs `work` on ranges of rows, on as many threads as torch uses.

    There are more ranges than threads, so that the threads end together.
    """
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        work(0, rows)
        return
    step = max(1, rows // (4 * threads))
    starts = range(0, rows, step)
    list(_pool(threads, os.getpid()).map(lambda start: work(start, min(start + step, rows)), starts))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """`process`: a forked process has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="trm-rows")


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _padded(vocab: int) -> int:
    return -(-vocab // BLOCK) * BLOCK


def _rows(logits: Tensor, start: int) -> tuple[int, int, int]:
    step = logits.stride(0)
    return logits.data_ptr() + start * step * logits.element_size(), TYPES[logits.dtype], step


def _at(values: Tensor | None, start: int) -> int | None:
    return None if values is None else values.data_ptr() + start * values.stride(0) * values.element_size()


@cache
def _library() -> ctypes.CDLL:
    """The compiled rows.cpp.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: no compiler, nowhere to keep what it makes, or it fails.
    """
    source = files("trm_audit.numerics").joinpath("rows.cpp").read_bytes()
    compiler = _compiler()
    made_with = "\0".join([*compiler, *FLAGS, _version(compiler), _cpu()])
    kept = _folder() / f"rows-{hashlib.sha256(source + made_with.encode()).hexdigest()[:24]}.so"
    if not kept.exists():
        _compile(compiler, source, kept)
    library = ctypes.CDLL(str(kept))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, chosen[:1] or ("g++", "c++", "clang++"))), None)
    if found is None:
        raise FileNotFoundError("no C++ compiler")
    return [found, *chosen[1:]]


def _version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout


def _cpu() -> str:
    """What tells CPUs apart that run different instructions: homes are shared by machines that are not alike."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return " ".join(platform.uname())
    changing = ("processor", "cpu MHz", "bogomips", "BogoMIPS", "physical id", "core id", "apicid", "initial apicid")
    return "\n".join(line for line in first.splitlines() if not line.startswith(changing))


def _folder() -> Path:
    """The user's own cache folder: what lies in it is loaded as code, so nobody else may write there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "trm-audit"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    return folder


def _compile(compiler: list[str], source: bytes, kept: Path) -> None:
    """Two processes may do this at once: each writes a file of its own, and the last one renamed stays."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        made, text = Path(folder) / "rows.so", Path(folder) / "rows.cpp"
        text.write_bytes(source)
        subprocess.run([*compiler, *FLAGS, str(text), "-o", str(made)], capture_output=True, check=True, timeout=120)
        made.replace(kept)
