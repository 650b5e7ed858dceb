"""Score shards for the report's tests: rows made of per-token lists, their statistics by plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trm_audit.numerics.ragged import Floats
from trm_audit.rollout import DIVERGENCES, TOKEN_SCORES

Row = dict[str, Any]


def token_values(row: Row, name: str) -> list[float] | None:
    """One quantity at the policy tokens of a row, from its definition; None where the row does not give it."""
    mask = row.get("response_mask") or [True] * len(row["log_ratio"])
    if name in row:
        return None if row[name] is None else [v for v, m in zip(row[name], mask, strict=True) if m]
    formulas = {
        "ratio": math.exp,
        "k1": lambda lr: -lr,
        "k2": lambda lr: lr * lr / 2,
        "k3": lambda lr: math.expm1(lr) - lr,
        "abs_log_ratio": abs,
    }
    if name not in formulas:
        return None
    return [formulas[name](v) for v, m in zip(row["log_ratio"], mask, strict=True) if m]


def score_batch(rows: Sequence[Row], without: Sequence[str] = ()) -> pa.RecordBatch:
    """Rows as a batch of a score shard: lists with null outside the mask, `seq_*`, what else the rows have."""
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in {k: 0 for r in rows for k in r}}
    for name in TOKEN_SCORES:
        if name in columns:
            columns[name] = [_masked(row, name) for row in rows]
    for name in DIVERGENCES:
        lists = [token_values(row, name) for row in rows]
        for kind, statistic in (("max", max), ("mean", lambda v: math.fsum(v) / len(v)), ("sum", math.fsum)):
            columns[f"seq_{kind}_{name}"] = [statistic(v) if v else None for v in lists]
    columns["num_tokens"] = [len(token_values(row, "log_ratio") or []) for row in rows]
    columns.setdefault("rollout_id", [f"r{i}" for i in range(len(rows))])
    kept = {name: values for name, values in columns.items() if name not in without}
    return pa.RecordBatch.from_pydict({name: _array(name, values) for name, values in kept.items()})


def run_with_floor(**given: Any) -> dict[str, Any]:
    """What the footer of a bfloat16 run says; `kl_max` and the like change figures against float32, others the run."""
    floor = {
        "num_rollouts": 8,
        "num_tokens": 1290,
        "composition": noise_of(abs_mean=0.004, abs_p99=0.02, abs_max=0.06, kl_mean=1e-4, kl_p99=8e-4, kl_max=2e-3),
        "float32": noise_of(**{name: value for name, value in given.items() if name in NOISE}),
    }
    floor |= {name: value for name, value in given.items() if name in floor}
    run = {"model": "a/b", "model_hash": "5c1e", "dtype": "bfloat16", "head_dtype": "bfloat16", "device": "cuda"}
    run |= {"sharing": {"rung": "tree", "check": 1.1e-6, "refused": {}}, "noise_floor": floor}
    return run | {name: value for name, value in given.items() if name not in NOISE and name not in floor}


NOISE = {"abs_mean": 0.01, "abs_p99": 0.07, "abs_max": 0.2, "kl_mean": 1.2e-3, "kl_p99": 9e-3, "kl_max": 0.03}


def noise_of(**given: float) -> dict[str, dict[str, float]]:
    """One comparison of a noise floor; figures that are not given are those of `NOISE`."""
    figures = NOISE | given
    return {
        name: {figure: figures[f"{short}_{figure}"] for figure in ("mean", "p99", "max")}
        for name, short in (("abs_delta_logprob", "abs"), ("kl", "kl"))
    }


def worth_of(**given: Any) -> dict[str, Any]:
    """What a run says of the worth of other evidence (schemas/score.md): the more bytes, the more is certain."""
    worth = {"num_rollouts": 8, "num_tokens": 200, "num_cut": 0, "num_exact": 8, "confidence": 0.95} | given
    deltas = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    sizes = {"topk:1024": 6144, "topk:64": 384, "topk:8": 48, "sketch:20,64": 260}
    kinds: dict[str, Any] = {}
    for name, size in sizes.items():
        kinds[name] = {"bytes_per_token": size}
        for factor, divergence in ((1, "kl"), (2, "tv")):
            share = [min(1.0, factor * size / 10_000 + 0.05 * i) for i in range(len(deltas))]
            kinds[name][divergence] = {
                of: [int(worth[f"num_{total}"] * each) for each in share]
                for of, total in (("positions", "tokens"), ("sequences", "rollouts"))
            }
    return worth | {"full_bytes": 98304, "deltas": deltas, "kinds": kinds}


def random_rows(rng: np.random.Generator, count: int, grade: str = "exact", groups: int = 5) -> list[Row]:
    """Rows of one grade with plausible divergences, masks with holes, rewards, versions; some without policy tokens."""
    return [_random_row(rng, i, grade, groups) for i in range(count)]


def _random_row(rng: np.random.Generator, index: int, grade: str, groups: int) -> Row:
    length = int(rng.integers(0, 12))
    row: Row = {
        "rollout_id": f"{grade}-{index}",
        "group_id": f"p{index % groups}",
        "grade": grade,
        "audited_policy": "sampling",
        "response_mask": [bool(b) for b in rng.random(length) < 0.8],
        "log_ratio": rng.normal(0, 0.3, length).tolist(),
        "reward": float(rng.integers(0, 2)),
        "engine": str(rng.choice(["vllm", "sglang"])),
        "policy_version": int(rng.integers(0, 3)),
        "num_infinite": 0,
        "num_disagreements": int(rng.integers(0, 2)),
    }
    kl = np.exp(rng.normal(-5, 2, length))
    tv = np.minimum(np.sqrt(kl / 2) * rng.random(length), 1.0)
    if grade == "exact":
        row |= {"kl": kl.tolist(), "kl_reverse": (kl * 1.1).tolist(), "tv": tv.tolist()}
    if grade == "interval":
        row |= {"kl_lower": (kl * 0.5).tolist(), "kl_upper": (kl * 2).tolist()}
        row |= {"tv_lower": (tv * 0.5).tolist(), "tv_upper": np.minimum(tv * 2, 1).tolist()}
    if grade == "sketch":
        row |= _sketched(rng, kl, tv)
    return row


def _sketched(rng: np.random.Generator, kl: Floats, tv: Floats) -> Row:
    """What a sketch of m = 64 says of these divergences: an estimate between bounds that hold."""
    estimate = kl * np.exp(rng.normal(0, 0.1, len(kl)))
    lower, upper = 0.7 * np.minimum(kl, estimate), 1.5 * np.maximum(kl, estimate)
    return {
        "kl_estimate": estimate.tolist(),
        "hellinger2": (estimate / 2).tolist(),
        "kl_lower": lower.tolist(),
        "kl_upper": upper.tolist(),
        "tv_lower": (tv * 0.8).tolist(),
        "tv_upper": np.minimum(tv * 1.1, 1).tolist(),
        "rollout_entropy": rng.exponential(1, len(kl)).tolist(),
        "sketch_dim": 64,
        "sketch_seed": 1,
    }


def _masked(row: Row, name: str) -> list[float | None] | None:
    if row.get(name) is None:
        return None
    mask = row.get("response_mask") or [True] * len(row[name])
    return [value if inside else None for value, inside in zip(row[name], mask, strict=True)]


def _array(name: str, values: list[Any]) -> pa.Array:
    if name in TOKEN_SCORES:
        return pa.array(values, pa.list_(pa.float32() if name.endswith("entropy") else pa.float64()))
    if name == "response_mask":
        return pa.array(values, pa.list_(pa.bool_()))
    return pa.array(values, pa.float64()) if name.startswith("seq_") else pa.array(values)
