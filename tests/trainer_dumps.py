"""Real rollouts in the formats of trainers' dumps: each writer follows the lines of the project that it names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLE = Path(__file__).resolve().parent.parent / "sample_data" / "smollm2" / "top20"
Rollout = dict[str, Any]


def real_rollouts() -> list[Rollout]:
    """16 rollouts of llama.cpp in groups of 4, and what a float32 forward of the checkpoint says of their tokens."""
    rollouts = pq.read_table(SAMPLE / "rollouts.parquet").to_pylist()
    trainer = pq.read_table(SAMPLE / "reference.parquet", columns=["rollout_id", "trainer_logprobs"]).to_pylist()
    values = {row["rollout_id"]: row["trainer_logprobs"] for row in trainer}
    return [{**row, "trainer_logprobs": values[row["rollout_id"]]} for row in rollouts]


def with_a_tool(row: Rollout) -> Rollout:
    """The rollout with three tokens of a tool after its fourth: nothing was sampled there, values are 0.0."""
    at = 4
    out = {**row, "mask": [1] * at + [0] * 3 + [1] * (len(row["response_ids"]) - at)}
    out["response_ids"] = [*row["response_ids"][:at], 9, 10, 11, *row["response_ids"][at:]]
    for name in ("rollout_logprobs", "trainer_logprobs"):
        out[name] = row[name][:at] + [0.0] * 3 + row[name][at:]
    return out


def mask_of(row: Rollout) -> list[int]:
    return list(row.get("mask", [1] * len(row["response_ids"])))


def slime_sample(row: Rollout, at: int, **more: Any) -> dict[str, Any]:
    """`Sample.to_dict` of THUDM/slime, slime/utils/types.py: the dataclass' fields, `status` as its value."""
    return {
        "group_index": at // 4,
        "index": at,
        "prompt": "",
        "tokens": row["prompt_ids"] + row["response_ids"],
        "response": row.get("response_text") or "",
        "response_length": len(row["response_ids"]),
        "label": None,
        "reward": row["reward"],
        "loss_mask": row.get("mask"),
        "weight_versions": ["3"],
        "rollout_log_probs": row["rollout_logprobs"],
        "rollout_routed_experts": None,
        "remove_sample": False,
        "status": "completed",
        "metadata": {},
        "spec_info": {"spec_accept_token_num": 0},
        **more,
    }


def slime_dump(path: Path, samples: list[dict[str, Any]]) -> Path:
    """`save_debug_rollout_data` of slime/observability/rollout_data_utils.py (before: slime/ray/rollout.py)."""
    import torch

    torch.save({"rollout_id": 3, "samples": samples}, path)
    return path


def slime_columns(rows: list[Rollout]) -> dict[str, Any]:
    """What slime trains on, by column: `_convert_samples_to_train_data` and the tensors added by the forward."""
    import torch

    return {
        "tokens": [torch.tensor(row["prompt_ids"] + row["response_ids"]) for row in rows],
        "response_lengths": [len(row["response_ids"]) for row in rows],
        "total_lengths": [len(row["prompt_ids"] + row["response_ids"]) for row in rows],
        "loss_masks": [torch.tensor(mask_of(row), dtype=torch.int) for row in rows],
        "rewards": [row["reward"] - 0.5 for row in rows],
        "truncated": [0] * len(rows),
        "rollout_log_probs": [torch.tensor(row["rollout_logprobs"]) for row in rows],
        "log_probs": [torch.tensor(row["trainer_logprobs"]) for row in rows],
        "advantages": [torch.full((len(row["response_ids"]),), row["reward"] - 0.5) for row in rows],
        "sample_indices": list(range(len(rows))),
        "partition": list(range(len(rows))),
        "raw_reward": [row["reward"] for row in rows],
        "global_batch_sizes": [len(rows)] * 2,
    }


def slime_train_dump(path: Path, rows: list[Rollout]) -> Path:
    """`_build_dump_payload` of slime/observability/train_data_utils.py: a row per sample, names of the columns."""
    import torch

    columns = slime_columns(rows)
    whole, layout = {"raw_reward"}, {"global_batch_sizes"}
    names = {"sample_indices": "sample_index", "partition": "rollout_position"}
    samples = [
        {"data_parallel_rank": 0, **{names.get(k, k): v[i] for k, v in columns.items() if k not in whole | layout}}
        for i in range(len(rows))
    ]
    payload = {"format_version": 2, "rollout_id": 3, "rank": 0, "samples": samples, "dp_shards": []}
    torch.save({**payload, "raw_reward": columns["raw_reward"]}, path)
    return path


def miles_columns(path: Path, samples: list[dict[str, Any]]) -> Path:
    """`save_dashboard_columns` of radixark/miles, miles/ray/rollout/debug_data.py, which writes it with polars."""
    schema = pa.schema(
        [
            ("sample_index", pa.int32()),
            ("response_length", pa.int32()),
            ("total_length", pa.int32()),
            ("tokens", pa.large_list(pa.int32())),
            ("loss_mask", pa.large_list(pa.int8())),
            ("rollout_log_probs", pa.large_list(pa.float32())),
        ]
    )
    rows = [{**sample, "sample_index": sample["index"], "total_length": len(sample["tokens"])} for sample in samples]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=8)
    return path


def nemo_batch(rows: list[Rollout], pad: int = 2) -> dict[str, list[Any]]:
    """`log_data` of NVIDIA-NeMo/RL, nemo_rl/algorithms/grpo.py: [B, S] tensors padded on the right, as lists."""
    width = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows) + 3

    def padded(row: Rollout, prompt: list[Any], response: list[Any], filler: float) -> list[Any]:
        return prompt + response + [filler] * (width - len(prompt) - len(response))

    zeros = [[0.0] * len(row["prompt_ids"]) for row in rows]
    return {
        "content": [row.get("response_text") for row in rows],
        "rewards": [row["reward"] for row in rows],
        "input_lengths": [len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows],
        "token_ids": [padded(row, row["prompt_ids"], row["response_ids"], pad) for row in rows],
        "token_loss_mask": [
            padded(row, zero, [float(m) for m in mask_of(row)], 0.0) for row, zero in zip(rows, zeros, strict=True)
        ],
        "sample_loss_mask": [1.0] * len(rows),
        "advantages": [[row["reward"] - 0.5] * width for row in rows],
        "generation_logprobs": [
            padded(row, zero, row["rollout_logprobs"], 0.0) for row, zero in zip(rows, zeros, strict=True)
        ],
        "prev_logprobs": [
            padded(row, [0.0, *[-1.5] * (len(zero) - 1)], row["trainer_logprobs"], -3.0)
            for row, zero in zip(rows, zeros, strict=True)
        ],
    }


def nemo_dump(path: Path, batch: dict[str, list[Any]]) -> Path:
    """`log_batched_dict_as_jsonl` of nemo_rl/utils/logger.py: slices of one, as many as the first field has entries."""
    lines = [
        json.dumps({**{name: values[i : i + 1] for name, values in batch.items()}, "idx": i})
        for i in range(len(next(iter(batch.values()))))
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def prime_record(row: Rollout, index: int, **more: Any) -> dict[str, Any]:
    """`TokenExporter.export` of PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/token_export.py."""
    start = len(row["prompt_ids"])
    count = start + len(row["response_ids"])
    sampler = [0.0] * start + row["rollout_logprobs"]
    trainer = [-math.log(49152), *[-2.0] * (start - 1), *row["trainer_logprobs"]]
    log_ratio = np.array(trainer) - np.array(sampler)
    return {
        "schema_version": 1,
        "step": 7,
        "rank": 0,
        "micro_step": index,
        "micro_sequence_idx": 0,
        "export_sequence_idx": index,
        "env_name": "arithmetic",
        "token_ids": row["prompt_ids"] + row["response_ids"],
        "position_ids": list(range(count)),
        "loss_mask": [False] * start + [bool(value) for value in mask_of(row)],
        "advantages": [row["reward"] - 0.5] * count,
        "rewards": [row["reward"]] * count,
        "inference_logprobs": sampler,
        "trainer_logprobs": trainer,
        "entropy": [1.0] * count,
        "mismatch_kl": (np.exp(log_ratio) - log_ratio - 1).tolist(),
        "log_importance_ratio": log_ratio.tolist(),
        "importance_ratio": np.exp(log_ratio).tolist(),
        **more,
    }


def prime_dump(path: Path, records: list[dict[str, Any]], stable: bool = True) -> Path:
    """Its lines, compact and without NaN, and the marker that it sets once all ranks have written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    if stable:
        (path.parent / "STABLE").touch()
    return path
