"""Sums over rows of logits by Triton, for a GPU: one program a row, two visits to it.

The first visit finds both sides' maxima and masses (the maximum as it goes, earlier sums brought to the new one), the
second all sums over pairs. Sums are float32 lanes, a block's width of them, added up block after block in order and
once across at the end, so a figure does not depend on what else runs. The kernels store these plain sums; the few
logarithms per row that turn them into figures are float64 torch code. torch_rows.py is the reference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from trm_audit.numerics.torch_rows import tail as tail  # by a sort, which is torch's own kernel on a GPU

OPTIONS = {"block": 2048, "num_warps": 8, "enable_fp_fusion": True}  # 100 registers a thread, none spilled
PAIR_SUMS, SINGLE_SUMS = 15, 4

SMALL = tl.constexpr(0.5)
OUTSIDE = tl.constexpr(-1e30)  # stands for -inf in shifted logits
LOWEST = tl.constexpr(-3.4028234663852886e38)


def pair(rollout: Tensor, trainer: Tensor, ids: Tensor | None) -> Tensor:
    """`torch_rows.pair` for float16, bfloat16 and float32 on a GPU."""
    rollout, trainer = _dense(rollout), _dense(trainer)
    n, vocab = rollout.shape
    sums = torch.empty(n, PAIR_SUMS, dtype=torch.float32, device=rollout.device)
    if n:
        with _on(rollout):
            strides = rollout.stride(0), trainer.stride(0)
            _pair_kernel[(n,)](rollout, trainer, _ids(rollout, ids), sums, *strides, vocab, **OPTIONS)
    token_p, token_q, *plain = sums.double().unbind(1)
    peak_p, mass_p, dot_p, peak_q, mass_q, dot_q, forward, reverse, gap, distance, slope, by_q, by_p = plain
    logsumexp_p, logsumexp_q = peak_p + mass_p.log(), peak_q + mass_q.log()
    unknown = ~(logsumexp_p.isfinite() & logsumexp_q.isfinite())
    figures = [
        torch.where(by_q > 0, torch.inf, forward).masked_fill_(unknown, torch.nan),
        torch.where(by_p > 0, torch.inf, reverse).masked_fill_(unknown, torch.nan),
        ((distance - gap * slope) / 2).clamp(0, 1).masked_fill_(unknown, torch.nan),
        mass_p.log() - dot_p / mass_p,
        mass_q.log() - dot_q / mass_q,
        token_p - logsumexp_p,
        token_q - logsumexp_q,
        logsumexp_p,
        logsumexp_q,
    ]
    return torch.stack(figures, 1)


def single(logits: Tensor, ids: Tensor | None) -> Tensor:
    """`torch_rows.single` for float16, bfloat16 and float32 on a GPU."""
    logits = _dense(logits)
    n, vocab = logits.shape
    sums = torch.empty(n, SINGLE_SUMS, dtype=torch.float32, device=logits.device)
    if n:
        with _on(logits):
            _single_kernel[(n,)](logits, _ids(logits, ids), sums, logits.stride(0), vocab, **OPTIONS)
    token, peak, mass, dot = sums.double().unbind(1)
    logsumexp = peak + mass.log()
    return torch.stack([token - logsumexp, mass.log() - dot / mass, logsumexp], 1)


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _ids(logits: Tensor, ids: Tensor | None) -> Tensor:
    """-1, which is in no vocabulary, where there are none: the kernel reads NaN for it."""
    return torch.full_like(logits[:, 0], -1, dtype=torch.int64) if ids is None else ids.contiguous()


def _on(logits: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one the logits are on."""
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


@triton.jit
def _load(row: tl.tensor, columns: tl.tensor, vocab: int) -> tl.tensor:
    """Logits as float32, -inf beyond the end of the row."""
    return tl.load(row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _shifted(logits: tl.tensor, peak: tl.tensor) -> tl.tensor:
    """Logits less a finite maximum, OUTSIDE for -inf; NaN stays NaN."""
    s = logits - peak
    return tl.where(s < OUTSIDE, OUTSIDE, s)


@triton.jit
def _token(row: tl.tensor, ids: tl.tensor, vocab: int) -> tl.tensor:
    """One logit; NaN where the id is not in the vocabulary."""
    at = tl.load(ids + tl.program_id(0))
    return tl.load(row + at, mask=(at >= 0) & (at < vocab), other=float("nan")).to(tl.float32)


@triton.jit
def _scan(row: tl.tensor, vocab: int, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A row's maximum, and relative to it the sums of exp(s) and s exp(s)."""
    peak = LOWEST
    mass = tl.zeros([block], tl.float32)
    dot = tl.zeros([block], tl.float32)
    for at in range(0, vocab, block):
        logits = _load(row, at + tl.arange(0, block), vocab)
        top = tl.maximum(peak, tl.max(logits, 0))
        s = _shifted(logits, top)
        e = tl.exp(s)
        shrink = tl.exp(peak - top)
        dot = shrink * (dot + (peak - top) * mass) + e * s
        mass = shrink * mass + e
        peak = top
    return peak, tl.sum(mass, 0), tl.sum(dot, 0)


@triton.jit
def _single_kernel(
    logits: tl.tensor, ids: tl.tensor, sums: tl.tensor, stride: int, vocab: int, block: tl.constexpr
) -> None:
    row = logits + tl.program_id(0).to(tl.int64) * stride
    out = sums + tl.program_id(0).to(tl.int64) * 4
    peak, mass, dot = _scan(row, vocab, block)
    tl.store(out, _token(row, ids, vocab))
    tl.store(out + 1, peak)
    tl.store(out + 2, mass)
    tl.store(out + 3, dot)


@triton.jit
def _pair_kernel(
    rollout: tl.tensor,
    trainer: tl.tensor,
    ids: tl.tensor,
    sums: tl.tensor,
    stride_p: int,
    stride_q: int,
    vocab: int,
    block: tl.constexpr,
) -> None:
    row_p = rollout + tl.program_id(0).to(tl.int64) * stride_p
    row_q = trainer + tl.program_id(0).to(tl.int64) * stride_q
    out = sums + tl.program_id(0).to(tl.int64) * 15
    peak_p, mass_p, dot_p = _scan(row_p, vocab, block)
    peak_q, mass_q, dot_q = _scan(row_q, vocab, block)
    tl.store(out, _token(row_p, ids, vocab))
    tl.store(out + 1, _token(row_q, ids, vocab))
    tl.store(out + 2, peak_p)
    tl.store(out + 3, mass_p)
    tl.store(out + 4, dot_p)
    tl.store(out + 5, peak_q)
    tl.store(out + 6, mass_q)
    tl.store(out + 7, dot_q)
    _compare(row_p, row_q, peak_p, mass_p, peak_q, mass_q, out + 8, vocab, block)


@triton.jit
def _compare(
    row_p: tl.tensor,
    row_q: tl.tensor,
    peak_p: tl.tensor,
    mass_p: tl.tensor,
    peak_q: tl.tensor,
    mass_q: tl.tensor,
    out: tl.tensor,
    vocab: int,
    block: tl.constexpr,
) -> None:
    """Stores the sums over pairs: both KL, q - p, its size, its slope, and whether either side excludes a token."""
    log_ratio = tl.log(mass_q / mass_p)
    scale_p, scale_q = 1.0 / mass_p, 1.0 / mass_q
    forward = tl.zeros([block], tl.float32)
    reverse = tl.zeros([block], tl.float32)
    gap = tl.zeros([block], tl.float32)
    distance = tl.zeros([block], tl.float32)
    slope = tl.zeros([block], tl.float32)
    by_q = tl.zeros([block], tl.float32)
    by_p = tl.zeros([block], tl.float32)
    for at in range(0, vocab, block):
        columns = at + tl.arange(0, block)
        shifted_p = _shifted(_load(row_p, columns, vocab), peak_p)
        shifted_q = _shifted(_load(row_q, columns, vocab), peak_q)
        p = tl.exp(shifted_p) * scale_p
        q = tl.exp(shifted_q) * scale_q
        x = (shifted_q - shifted_p) - log_ratio
        small = tl.abs(x) < SMALL
        xx = x * x
        even = xx * (1 / 2 + xx * (1 / 24 + xx * (1 / 720 + xx * (1 / 40320))))
        odd = x * xx * (1 / 6 + xx * (1 / 120 + xx * (1 / 5040 + xx * (1 / 362880))))
        difference = tl.where(small, p * (x + even + odd), q - p)
        forward += tl.where(small, p * (even + odd), difference - p * x)
        reverse += tl.where(small, q * (even - odd), q * x - difference)
        gap += difference
        distance += tl.abs(difference)
        slope += tl.where(difference > 0, q, -q)
        by_q += tl.where((shifted_q == OUTSIDE) & (shifted_p > OUTSIDE), 1.0, 0.0)
        by_p += tl.where((shifted_p == OUTSIDE) & (shifted_q > OUTSIDE), 1.0, 0.0)
    tl.store(out, tl.sum(forward, 0))
    tl.store(out + 1, tl.sum(reverse, 0))
    tl.store(out + 2, tl.sum(gap, 0))
    tl.store(out + 3, tl.sum(distance, 0))
    tl.store(out + 4, tl.sum(slope, 0))
    tl.store(out + 5, tl.sum(by_q, 0))
    tl.store(out + 6, tl.sum(by_p, 0))
