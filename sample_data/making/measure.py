"""What the sample data show, measured in float64 by the plainest loop there is.

One rollout at a time, no batch, no padding. It shares no code with the package's own scoring, so that the one can be
held against the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

NUMPY_TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def stored_logits(folder: Path) -> dict[str, NDArray[np.float64]]:
    """rollout_id -> [T, V] float64, from every long table of a rollouts folder."""
    blocks: dict[str, list[tuple[int, NDArray[np.float64]]]] = {}
    for path in sorted(folder.glob("logits-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            raw = np.frombuffer(row["data"], NUMPY_TYPES[row["encoding"]])
            if row["encoding"] == "bfloat16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            block = raw.reshape(row["count"], row["vocab_size"]).astype(np.float64)
            blocks.setdefault(row["rollout_id"], []).append((row["start"], block))
    return {name: np.concatenate([b for _, b in sorted(parts, key=lambda p: p[0])]) for name, parts in blocks.items()}


def rollout_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of every rollout shard of a folder, in order."""
    return [row for path in sorted(folder.glob("rollouts-*.parquet")) for row in pq.read_table(path).to_pylist()]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, V] log-probabilities (nats) of logits, float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def kl_per_token(folder: Path, version: int | None = None) -> list[tuple[dict[str, Any], NDArray[np.float64]]]:
    """Each rollout of `folder` (of one policy version) with its KL(pi_roll || pi_theta) at each response position.

    In nats, NaN at a tool's tokens. The trainer's logits come from a float32 forward of `folder/model`; all after
    that is float64.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    logits, out = stored_logits(folder / "rollouts"), []
    for row in rollout_rows(folder / "rollouts"):
        if version not in (None, row["policy_version"]):
            continue
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            trainer = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].double().numpy()
        log_p, log_q = log_softmax(logits[row["rollout_id"]]), log_softmax(trainer)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        out.append((row, np.where(row["response_mask"], kl, np.nan)))
    return out


def impulses(kl: NDArray[np.float64], *, reach: int = 3, floor: float = 0.01) -> int:
    """Tokens with a KL above `floor` and ten times the median of their neighbours, up to `reach` on each side."""
    own = kl[~np.isnan(kl)]
    count = 0
    for t, value in enumerate(own):
        neighbours = np.concatenate([own[max(0, t - reach) : t], own[t + 1 : t + 1 + reach]])
        count += bool(len(neighbours) and value > floor and value > 10 * np.median(neighbours))
    return count


def drift_table(folder: Path) -> list[dict[str, float]]:
    """Per policy version, oldest first: counts, KL per token and sequence (nats), kept share, reward, impulses."""
    scored = kl_per_token(folder)
    newest = max(row["policy_version"] for row, _ in scored)
    table = []
    for version in sorted({row["policy_version"] for row, _ in scored}):
        rows = [(row, kl) for row, kl in scored if row["policy_version"] == version]
        tokens = np.concatenate([kl[~np.isnan(kl)] for _, kl in rows])
        peaks = np.array([np.nanmax(kl) for _, kl in rows])
        table.append(
            {
                "version": version,
                "staleness": newest - version,
                "rollouts": len(rows),
                "tokens": len(tokens),
                "mean_kl": float(tokens.mean()),
                "max_kl": float(tokens.max()),
                "median_seq_max_kl": float(np.median(peaks)),
                "kept_at_0.05": float((peaks <= 0.05).mean()),
                "reward": float(np.mean([row["reward"] for row, _ in rows])),
                "impulses": sum(impulses(kl) for _, kl in rows),
            }
        )
    return table


def routing_flips(folder: Path) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.float64]]:
    """Where routing flips, over the sampled tokens of the newest version of a mixture of experts.

    A flip: in some layer the sampler, in bfloat16, picked other experts (`routed_experts`) than the float32 forward of
    the same weights.

    Returns:
        [tokens] flipped here; flipped here or earlier in the response, which attention carries on; KL (nats).
    """
    newest = max(row["policy_version"] for row in rollout_rows(folder / "rollouts"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    here, so_far, divergences = [], [], []
    for row, kl in kl_per_token(folder, newest):
        before = len(row["prompt_ids"]) - 1  # the position that predicts response token 0
        stored = np.array(row["routed_experts"])[before : before + len(kl)]
        flips = (np.sort(stored) != experts_per_token(model, row)).any(axis=(1, 2))
        own = np.array(row["response_mask"])
        here.append(flips[own])
        so_far.append(np.maximum.accumulate(flips)[own])
        divergences.append(kl[own])
    return np.concatenate(here), np.concatenate(so_far), np.concatenate(divergences)


def experts_per_token(model: PreTrainedModel, row: dict[str, Any]) -> NDArray[np.int64]:
    """[T, layers, K] sorted expert numbers at the positions that predict the response."""
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    with torch.no_grad():
        router = torch.stack(model(input_ids=ids, output_router_logits=True).router_logits, 1)
    picked = router.topk(model.config.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
    result: NDArray[np.int64] = picked[len(row["prompt_ids"]) - 1 : -1].numpy()
    return result


def print_drift(folder: Path) -> None:
    """The table of `drift_table` as Markdown."""
    table = drift_table(folder)
    print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    for row in table:
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(values) + " |")


def print_flips(folder: Path) -> None:
    """What `routing_flips` found, in one sentence."""
    here, so_far, kl = routing_flips(folder)
    print(
        f"\nRouting flips at {here.sum()} of {len(kl)} tokens of the newest version. "
        f"Mean KL {kl[here].mean():.2g} there, {kl[~here].mean():.2g} elsewhere; "
        f"largest {kl[so_far].max():.2g} once routing has flipped in a response, {kl[~so_far].max():.2g} before."
    )
