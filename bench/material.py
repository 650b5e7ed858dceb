"""The rollouts of a workload as files, and the figures that every arm is held against.

One pass over each trajectory alone, through the model's own forward: its logits are what the trainer thinks; the same
plus noise, as float16, are stored as what the sampler thought. So the divergences have the size that real mismatches
have, and the reference figures come out of the same pass, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.workloads import Trajectory
from trm_audit import LogitsTableWriter, write_rollout_table

K = 64
NOISE = 0.1
"""Standard deviation of what the sampler's logits are off: a KL of about 0.005 nats."""
CHECKED = 512
"""Response tokens whose divergences are computed in float64, at most, evenly spread."""
PIECE = 128
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Material:
    """One workload, written and ready.

    Attributes:
        folder: `sampled/`, `top64/` and `full/` hold `rollouts.parquet`; `full/` has `logits-00000.parquet` too.
        names: [rows] rollout ids.
        prompts, responses: [rows] token ids, int64.
        offsets: [rows + 1] where each row's response tokens start in flat arrays.
        vocab_size: V.
        rollout_logprobs: [tokens] of the sampled tokens under what was stored.
        topk_ids, topk_logprobs: [tokens, K].
        reference: name of a figure -> [tokens] float64; NaN where it was not computed.
    """

    folder: Path
    names: list[str]
    prompts: list[NDArray[np.int64]]
    responses: list[NDArray[np.int64]]
    offsets: NDArray[np.int64]
    vocab_size: int
    rollout_logprobs: Floats
    topk_ids: NDArray[np.int64]
    topk_logprobs: NDArray[np.float32]
    reference: dict[str, Floats]

    def logits_file(self) -> Path:
        return self.folder / "full" / "logits-00000.parquet"


FIGURES = ("trainer_logprobs", "trainer_entropy", "rollout_entropy", "kl", "tv", "bucketed_kl")


def make(items: Sequence[Trajectory], hf: Any, vocab_size: int, folder: Path, modes: Sequence[str]) -> Material:
    """Writes a workload's files for some modes. hf: the model; attention must be the library's own."""
    rows = [(item, span) for item in items for span in item.spans]
    offsets = np.concatenate([[0], np.cumsum([stop - start for _, (start, stop) in rows])])
    total = int(offsets[-1])
    material = Material(
        folder=folder,
        names=[f"r{i:05d}" for i in range(len(rows))],
        prompts=[item.ids[:start] for item, (start, _) in rows],
        responses=[item.ids[start:stop] for item, (start, stop) in rows],
        offsets=offsets,
        vocab_size=vocab_size,
        rollout_logprobs=np.zeros(total),
        topk_ids=np.zeros((total, K), dtype=np.int64),
        topk_logprobs=np.zeros((total, K), dtype=np.float32),
        reference={name: np.full(total, np.nan) for name in FIGURES},
    )
    for mode in modes:
        (folder / mode).mkdir(parents=True)
    if "full" in modes:
        with LogitsTableWriter(material.logits_file()) as writer:
            for name, stored in _stored(items, hf, material):
                writer.add(name, stored)
    else:
        for _ in _stored(items, hf, material):
            pass
    for mode in modes:
        _write_table(material, [item.group for item, _ in rows], mode)
    return material


@torch.inference_mode()
def _stored(items: Sequence[Trajectory], hf: Any, out: Material) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Name and stored logits [T, V] of each row, one after another; fills the figures of `out` on the way."""
    device = next(hf.parameters()).device
    rng = torch.Generator(device).manual_seed(0)
    noise = NOISE * torch.randn(PIECE + 61, out.vocab_size, generator=rng, device=device)
    every = -(-int(out.offsets[-1]) // CHECKED)
    row = 0
    for item in items:
        at = np.concatenate([np.arange(start - 1, stop - 1) for start, stop in item.spans])
        wanted = torch.from_numpy(at).to(device)
        ids = torch.from_numpy(item.ids[None, : int(at[-1]) + 1]).to(device)
        logits = hf(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0, :, : out.vocab_size]
        done = 0
        for start, stop in item.spans:
            first, n = int(out.offsets[row]), stop - start
            stored = np.empty((n, out.vocab_size), np.float16)
            for i in range(0, n, PIECE):
                trainer = logits[done + i : done + min(i + PIECE, n)].float()
                shift = (first + i) % 61
                rollout = trainer + noise[shift : shift + len(trainer)]
                rollout = (rollout - rollout.amax(1, keepdim=True)).half()
                stored[i : i + PIECE] = rollout.cpu().numpy()
                _figures(out, first + i, torch.from_numpy(out.responses[row][i : i + PIECE]), rollout, trainer, every)
            done += n
            yield out.names[row], stored
            row += 1


def _figures(out: Material, first: int, ids: Tensor, rollout: Tensor, trainer: Tensor, every: int) -> None:
    """Fills in tokens first..first + n: what is stored of them, and the reference. rollout, trainer: [n, V]."""
    here, ids = slice(first, first + len(ids)), ids[:, None].to(trainer.device)
    logp = rollout.float().log_softmax(1)
    top = logp.topk(K, dim=1)
    out.rollout_logprobs[here] = logp.gather(1, ids)[:, 0].double().cpu().numpy()
    out.topk_ids[here], out.topk_logprobs[here] = top.indices.cpu().numpy(), top.values.cpu().numpy()
    token = trainer.gather(1, ids)[:, 0].double() - trainer.double().logsumexp(1)
    out.reference["trainer_logprobs"][here] = token.cpu().numpy()
    some = [i for i in range(len(ids)) if (first + i) % every == 0]
    if not some:
        return
    log_p, log_q = rollout[some].double().log_softmax(1), trainer[some].double().log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    figures = {
        "kl": (p * (log_p - log_q)).sum(1),
        "tv": (p - q).abs().sum(1) / 2,
        "rollout_entropy": -(p * log_p).sum(1),
        "trainer_entropy": -(q * log_q).sum(1),
        "bucketed_kl": _bucketed_kl(log_p, log_q, top.indices[some], ids[some]),
    }
    for name, values in figures.items():
        out.reference[name][first + np.array(some)] = values.cpu().numpy()


def _bucketed_kl(log_p: Tensor, log_q: Tensor, top: Tensor, ids: Tensor) -> Tensor:
    """[n] KL with everything outside the list and the sampled token as one bucket, by a mask over the vocabulary."""
    known = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, torch.cat([top, ids], 1), True)
    r, s = (x.masked_fill(known, -torch.inf).logsumexp(1) for x in (log_p, log_q))
    inside = (log_p.exp() * (log_p - log_q)).masked_fill(~known, 0).sum(1)
    return inside + r.exp() * (r - s)


def _write_table(material: Material, groups: list[int], mode: str) -> None:
    columns = {
        "rollout_id": pa.array(material.names),
        "group_id": pa.array([f"g{group}" for group in groups]),
        "prompt_ids": pa.array([ids.astype(np.int32) for ids in material.prompts]),
        "response_ids": pa.array([ids.astype(np.int32) for ids in material.responses]),
        "rollout_logprobs": _lists(material.offsets, pa.array(material.rollout_logprobs.astype(np.float32))),
    }
    if mode == "top64":
        inner = np.arange(0, material.topk_ids.size + 1, K)
        for name, values in (("ids", material.topk_ids.astype(np.int32)), ("logprobs", material.topk_logprobs)):
            columns[f"rollout_topk_{name}"] = _lists(material.offsets, _lists(inner, pa.array(values.reshape(-1))))
    logits = [material.logits_file().name] if mode == "full" else []
    write_rollout_table(material.folder / mode / "rollouts.parquet", pa.table(columns), logits=logits)


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
