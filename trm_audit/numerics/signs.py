"""The matrix of random signs that sketches are made with: the same on any machine, from a hash and not a generator.

sign(i, j) of token i and column j is the top bit of splitmix64's finaliser at i * m + j + (seed + 1) * GOLDEN, all in
unsigned 64 bits: 1 is +1, 0 is -1. With m = 64, seed = 1 token 0 begins - + + + + + - -. torch has no unsigned
arithmetic, so this is int64, which wraps around to the same bits, with shifts that bring in zeros from the left.

The matrix R of a projection has these signs over sqrt(m), so that ||R^T x||^2 has mean ||x||^2, whatever x is.
Sources: Achlioptas (2003) for signs in a projection; Steele, Lea and Flood (2014) for the hash.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
CACHE_BYTES = 256 << 20
"""Matrices are kept up to this size together; a larger one is made for each use."""
MADE_AT_ONCE = 1 << 20
CPU_TOKENS, GPU_TOKENS = 1024, 1 << 16
"""Tokens whose signs are floats at once: on a CPU they stay in the cache, and cost next to nothing that way."""

_lock = Lock()
_kept: OrderedDict[tuple[int, int, int, torch.device], Tensor] = OrderedDict()


def signs(vocab: int, m: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """[vocab, m] int8 of -1 and +1; not to be written to, since the next caller gets the same tensor.

    Args:
        vocab: tokens.
        m: columns; the signs of a token depend on it.
        seed: any integer, taken modulo 2**64.
        device: where the matrix is made and kept.
    """
    key = (vocab, m, seed % 2**64, torch.empty(0, device=device).device)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        made = _made(*key)
        if made.nbytes <= CACHE_BYTES:
            _kept[key] = made
        while sum(one.nbytes for one in _kept.values()) > CACHE_BYTES:
            _kept.popitem(last=False)
        return made


@torch.no_grad()
def project(values: Tensor, m: int, seed: int) -> Tensor:
    """R^T x of each row x, [n, m] float32.

    Args:
        values: [n, V] floating point; computed in float32, with float32 sums.
        m, seed: which R.

    Neither TF32 nor bfloat16 products nor autocast, wherever the process has allowed them: the difference of two
    projections of neighbours would drown in them.
    """
    matrix = signs(values.shape[1], m, seed, values.device)
    tokens = CPU_TOKENS if values.device.type == "cpu" else GPU_TOKENS
    out = torch.zeros(len(values), m, device=values.device)
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, values.shape[1], tokens):
            block = matrix[start : start + tokens].float()
            for part in _parts(values[:, start : start + tokens].float()):
                out.addmm_(part, block)
    return out.div_(m**0.5)


def _made(vocab: int, m: int, seed: int, device: torch.device) -> Tensor:
    out = torch.empty(vocab * m, dtype=torch.int8, device=device)
    origin = _signed((seed + 1) * GOLDEN)
    for start in range(0, len(out), MADE_AT_ONCE):
        stop = min(start + MADE_AT_ONCE, len(out))
        z = torch.arange(start, stop, device=device) + origin
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)  # ^ _shifted(z, 31) leaves the top bit as it is
        out[start:stop] = torch.where(z < 0, 1, -1)
    return out.view(vocab, m)


def _shifted(z: Tensor, places: int) -> Tensor:
    """int64 to the right, zeros coming in: torch's own >> repeats the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(bits: int) -> int:
    """The int64 that has these 64 bits."""
    return (bits + 2**63) % 2**64 - 2**63


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """float32 values as terms whose products with signs are exact in whatever type products are taken.

    One term where that is float32, otherwise three of 8 bits each, which even bfloat16 holds.
    """
    backend = torch.backends.cuda if values.device.type == "cuda" else torch.backends.mkldnn
    if backend.matmul.fp32_precision in ("ieee", "none"):
        return (values,)
    high = _first_bits(values)
    middle = _first_bits(values - high)
    return high, middle, values - high - middle


def _first_bits(values: Tensor) -> Tensor:
    """Truncated to what bfloat16 holds."""
    return (values.contiguous().view(torch.int32) & -65536).view(torch.float32)
