"""(c) What the machine could do at best, from rates measured in the same run.

    seconds = max(compute, read, copy)
    compute = (2 P u + 4 L D a) / r_layers + 2 H V t / r_head
    read    = stored bytes / read rate                                    mode full only
    copy    = (stored bytes + 4 V t) / copy rate                          each logit of either side touched once

P weights of the decoder's linear layers, u unique tokens (each shared prefix once), L layers, D = heads x head size,
a (query, key) pairs of the unique tokens, H hidden size, V vocabulary, t response tokens. r are rates of matrix
products at the shapes of this model in its own type: every linear layer of one decoder layer on as many tokens as a
forward takes, and the head on as many rows as go through it at once. Attention is charged at the layers' rate.
Reading is the same file as the arms find it (in the page cache unless `--cold`), on a GPU then over PCIe from pinned
memory. No arm can reach it on a CPU, where the same cores read, copy and multiply; dense models only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.measure import forget
from bench.workloads import Work

REPEATS = 3
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rates:
    """What was measured.

    Attributes:
        layers, head: floating-point operations per second.
        copy: bytes per second read by a copy within the device's memory (each is written too).
        transfer: bytes per second from pinned memory to a GPU; None on a CPU.
    """

    layers: float
    head: float
    copy: float
    transfer: float | None


@dataclass(frozen=True)
class Limit:
    """The parts in seconds; `seconds` is the largest."""

    compute: float
    read: float
    copy: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.read, self.copy)


@torch.inference_mode()
def rates(hf: Any, tokens: int, head_rows: int) -> Rates:
    """Rates at the model's own shapes.

    Args:
        hf: the model.
        tokens: of one forward.
        head_rows: rows that go through the head at once.
    """
    head = hf.get_output_embeddings()
    layer = next(module for module in hf.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)[0]
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    device = head.weight.device
    done = 2.0 * tokens * sum(module.weight.numel() for module in linear)
    block = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    transfer = None
    if device.type == "cuda":
        pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        transfer = COPY_BYTES / best(lambda: target.copy_(pinned, non_blocking=True), device)
    return Rates(
        layers=done / best(_products(linear, tokens), device),
        head=2.0 * head_rows * head.weight.numel() / best(_products([head], head_rows), device),
        copy=COPY_BYTES / best(lambda: target.copy_(block), device),
        transfer=transfer,
    )


def _products(linear: list[Any], rows: int) -> Callable[[], None]:
    inputs = [
        torch.ones(rows, module.weight.shape[1], dtype=module.weight.dtype, device=module.weight.device)
        for module in linear
    ]

    def run() -> None:
        for module, x in zip(linear, inputs, strict=True):
            torch.nn.functional.linear(x, module.weight)

    return run


def best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, after one that does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def read_rate(file: Path, *, cold: bool) -> float:
    """Bytes per second of reading a whole file into one buffer."""
    buffer = bytearray(8 * 2**20)
    size = file.stat().st_size
    fastest = float("inf")
    for _ in range(REPEATS):
        if cold:
            forget(file)
        began = time.perf_counter()
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
        fastest = min(fastest, time.perf_counter() - began)
    return size / fastest


def limit(hf: Any, work: Work, vocab_size: int, measured: Rates, logits: Path | None, *, cold: bool = False) -> Limit:
    """The formula above for one workload. logits: the file of mode full, None in other modes."""
    config, head = hf.config, hf.get_output_embeddings()
    weights = sum(m.weight.numel() for m in hf.modules() if isinstance(m, nn.Linear) and m is not head)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    products = 2.0 * weights * work.unique_tokens + 4.0 * config.num_hidden_layers * width * work.attended
    head_products = 2.0 * head.weight.numel() * work.response_tokens
    stored = 0 if logits is None else logits.stat().st_size
    read = 0.0 if logits is None else stored / read_rate(logits, cold=cold)
    if measured.transfer is not None:
        read = max(read, stored / measured.transfer)
    return Limit(
        compute=products / measured.layers + head_products / measured.head,
        read=read,
        copy=(stored + 4.0 * vocab_size * work.response_tokens) / measured.copy,
    )
