"""What is done today, written the way a careful user writes it: the arms that trm-audit is compared with.

`Padded` is a batch of 8 through `model(...)`, prompts padded on the left and responses on the right, rows in the order
of the file; the head runs on response positions only (`logits_to_keep`). `Packed` lays sequences end to end without
padding, as training stacks do, with exact attention inside each. Both know nothing of shared prefixes. Stored logits
come from the same Parquet table, read with plain pyarrow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bench.material import Material

Scores = dict[str, NDArray[np.float64]]
BATCH = 8
CPU_ROWS, GPU_ROWS = 128, 1024
"""Rows of the packed arm's bundle at a time."""


class NotMeasured(Exception):
    """An arm cannot run here: it needs more memory than there is, or a part that is not there."""


def bundle(stored: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """KL, TV and both entropies, eagerly. stored, log_q: [..., V]."""
    log_p = stored.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "tv": (p - q).abs().sum(-1) / 2,
        "rollout_entropy": -(p * log_p).sum(-1),
        "trainer_entropy": -(q * log_q).sum(-1),
    }


def kl_alone(stored: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """The one-liner that most people write. stored, log_q: [..., V]."""
    log_p = stored.float().log_softmax(-1)
    return {"kl": (log_p.exp() * (log_p - log_q)).sum(-1)}


def entropy(log_q: Tensor) -> dict[str, Tensor]:
    return {"trainer_entropy": -(log_q.exp() * log_q).sum(-1)}


def bucketed_kl(ids: Tensor, log_p: Tensor, sampled: Tensor, sampled_logp: Tensor, log_q: Tensor) -> Tensor:
    """KL over a top-K list and the sampled token, the rest of either side as one bucket.

    Args:
        ids, log_p: [..., K].
        sampled, sampled_logp: [...].
        log_q: [..., V].
    """
    listed = (ids == sampled[..., None]).any(-1)
    ids = torch.cat([ids, sampled[..., None]], -1)
    p = torch.cat([log_p, sampled_logp.masked_fill(listed, -torch.inf)[..., None]], -1).double()
    q = log_q.gather(-1, ids).double()
    inside = torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum(-1)
    last = torch.cat([torch.zeros_like(ids[..., :-1], dtype=torch.bool), listed[..., None]], -1)
    r = (1 - p.exp().sum(-1)).clamp(min=1e-12)
    s = (1 - q.exp().masked_fill(last, 0).sum(-1)).clamp(min=1e-12)
    return inside + r * (r / s).log()


class PlainLogits:
    """The long table, row group by row group, the last one kept: rows are asked for in the order of the file."""

    def __init__(self, file: Path) -> None:
        self._file = pq.ParquetFile(file)
        self._blocks: dict[str, list[tuple[int, int, int, int]]] = {}
        for group in range(self._file.num_row_groups):
            table = self._file.read_row_group(group, columns=["rollout_id", "count", "vocab_size"])
            for row, (name, count, width) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
                self._blocks.setdefault(name, []).append((group, row, count, width))
        self._group = -1
        self._data: Any = None

    def __getitem__(self, name: str) -> Tensor:
        """[T, V] float16."""
        parts = []
        for group, row, count, width in self._blocks[name]:
            if group != self._group or self._data is None:
                self._group, self._data = group, self._file.read_row_group(group, columns=["data"]).column("data")
            values = np.frombuffer(self._data[row].as_buffer(), np.float16).reshape(count, width)
            parts.append(values)
        return torch.from_numpy(np.concatenate(parts))


class _Baseline(ABC):
    """What both have in common: where results go.

    Args:
        hf: the model of transformers.
        material: what is scored.
        mode: `sampled`, `top64` or `full`.
        figures: the divergences of mode `full`.
    """

    def __init__(self, hf: Any, material: Material, mode: str, figures: Any = bundle) -> None:
        self.hf, self.material, self.mode, self.figures = hf, material, mode, figures
        self.device = next(hf.parameters()).device
        self.logits: PlainLogits | None = None

    def __call__(self) -> Scores:
        self.logits = PlainLogits(self.material.logits_file()) if self.mode == "full" else None
        self.out: Scores = {}
        with torch.inference_mode():
            self._run()
        return self.out

    @abstractmethod
    def _run(self) -> None:
        """Fills `out`."""

    def _put(self, tokens: NDArray[np.int64], figures: dict[str, Tensor]) -> None:
        for name, values in figures.items():
            if name not in self.out:
                self.out[name] = np.full(int(self.material.offsets[-1]), np.nan)
            self.out[name][tokens] = values.double().cpu().numpy()

    def _evidence(self, tokens: NDArray[np.int64], ids: Tensor, log_q: Tensor, stored: Tensor | None) -> None:
        """Figures of some tokens. tokens: [n]; ids: [n]; log_q: [n, V]; stored: [n, V] in mode full."""
        figures = {"trainer_logprobs": log_q.gather(-1, ids[:, None])[:, 0]}
        if stored is not None:
            figures |= self.figures(stored, log_q)
        else:
            figures |= entropy(log_q)
        if self.mode == "top64":
            m = self.material
            known = (m.topk_ids[tokens], m.topk_logprobs[tokens], m.rollout_logprobs[tokens])
            top, logp, own = (torch.from_numpy(x).to(self.device) for x in known)
            figures["bucketed_kl"] = bucketed_kl(top, logp.double(), ids, own, log_q)
        self._put(tokens, figures)


class Padded(_Baseline):
    """(a) and (a'): a padded batch of 8, log_softmax over [batch, tokens, vocabulary] in float32, gather, figures."""

    def _run(self) -> None:
        for first in range(0, len(self.material.names), BATCH):
            self._batch(range(first, min(first + BATCH, len(self.material.names))))

    def _batch(self, rows: range) -> None:
        m = self.material
        before, after = max(len(m.prompts[r]) for r in rows), max(len(m.responses[r]) for r in rows)
        self._fits(len(rows) * after * m.vocab_size * 4)
        ids = torch.zeros(len(rows), before + after, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start, stop = before - len(m.prompts[row]), before + len(m.responses[row])
            ids[i, start:stop] = torch.from_numpy(np.concatenate([m.prompts[row], m.responses[row]]))
            mask[i, start:stop] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.hf(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=after + 1
        )
        log_q = out.logits[:, :-1, : m.vocab_size].float().log_softmax(-1)  # [batch, tokens, vocabulary]
        del out
        inside = mask[:, before:].bool()
        tokens = np.concatenate([np.arange(m.offsets[row], m.offsets[row + 1]) for row in rows])
        if self.mode == "top64":
            self._evidence(tokens, ids[:, before:][inside], log_q[inside], None)
            return
        figures = entropy(log_q) if self.logits is None else self.figures(self._stored(rows, after), log_q)
        figures["trainer_logprobs"] = log_q.gather(-1, ids[:, before:, None])[..., 0]
        self._put(tokens, {name: values[inside] for name, values in figures.items()})

    def _stored(self, rows: range, width: int) -> Tensor:
        """[batch, width, V] float16, zeros behind the end."""
        assert self.logits is not None
        stored = torch.zeros(len(rows), width, self.material.vocab_size, dtype=torch.float16)
        for i, row in enumerate(rows):
            mine = self.logits[self.material.names[row]]
            stored[i, : len(mine)] = mine
        return stored.to(self.device)

    def _fits(self, one: int) -> None:
        """Raises NotMeasured before the system ends the process. one: bytes of one [batch, tokens, V] in float32."""
        if self.device.type == "cuda":
            return  # where it is an exception
        needed, free = one * {"sampled": 3, "top64": 4, "full": 6}[self.mode], free_bytes()
        if needed > free:
            raise NotMeasured(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


class Packed(_Baseline):
    """(b): sequences end to end up to a budget of tokens, one forward, figures some rows at a time.

    Args:
        max_tokens: of one forward.
    """

    def __init__(self, hf: Any, material: Material, mode: str, max_tokens: int) -> None:
        super().__init__(hf, material, mode)
        self.max_tokens = max_tokens

    def _run(self) -> None:
        m = self.material
        with attention(self.hf, PACKED):
            rows: list[int] = []
            size = 0
            for row in range(len(m.names)):
                length = len(m.prompts[row]) + len(m.responses[row]) - 1
                if rows and size + length > self.max_tokens:
                    self._forward(rows)
                    rows, size = [], 0
                rows.append(row)
                size += length
            self._forward(rows)

    def _forward(self, rows: list[int]) -> None:
        m = self.material
        ids = [np.concatenate([m.prompts[row], m.responses[row]])[:-1] for row in rows]
        sizes = [len(one) for one in ids]
        ends = np.cumsum(sizes)
        keep = [np.arange(end - len(m.responses[row]), end) for row, end in zip(rows, ends, strict=True)]
        _pack.sizes = sizes
        out = self.hf(
            input_ids=torch.from_numpy(np.concatenate(ids))[None].to(self.device),
            position_ids=torch.cat([torch.arange(size) for size in sizes])[None].to(self.device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(np.concatenate(keep)).to(self.device),
        )
        logits = out.logits[0, :, : m.vocab_size]
        tokens = np.concatenate([np.arange(m.offsets[row], m.offsets[row + 1]) for row in rows])
        own = torch.from_numpy(np.concatenate([m.responses[row] for row in rows])).to(self.device)
        stored = None if self.logits is None else torch.cat([self.logits[m.names[row]] for row in rows])
        step = CPU_ROWS if self.device.type == "cpu" else GPU_ROWS
        for i in range(0, len(tokens), step):
            piece = None if stored is None else stored[i : i + step].to(self.device)
            log_q = logits[i : i + step].float().log_softmax(-1)
            self._evidence(tokens[i : i + step], own[i : i + step], log_q, piece)


PACKED = "bench_packed"


class _Pack:
    """Exact causal attention inside each of some sequences that lie end to end.

    Attributes:
        sizes: tokens of each sequence of the forward that comes next.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, None]:
        window = settings.get("sliding_window") or max(self.sizes)
        if window < max(self.sizes) or settings.get("softcap") or settings.get("s_aux") is not None:
            raise ValueError("the packed arm knows plain causal attention only")
        settings = {"scale": settings.get("scaling"), "enable_gqa": q.shape[1] != k.shape[1], "is_causal": True}
        parts = [
            scaled_dot_product_attention(*each, **settings)
            for each in zip(*(torch.split(x, self.sizes, dim=2) for x in (q, k, v)), strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


_pack = _Pack()
AttentionInterface.register(PACKED, _pack)


@contextmanager
def attention(hf: Any, name: str) -> Iterator[None]:
    """The model with another attention function inside the block."""
    before = hf.config._attn_implementation
    hf.set_attn_implementation(name)
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def free_bytes() -> int:
    """Memory that can still be taken."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
