"""The two tiny models and their sampled rollouts, as the folders `tiny/` and `tiny-moe/`.

Each is trained in float32. The newest weights are the training model; the rollouts come from older weights (and the
newest ones), run in bfloat16, with every logit kept.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from making import digit_sums as task
from making.policy_gradient import Sampled, policy_gradient, sample, warm_start
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trm_audit.shards.rollout_writer import Encoding, LogitsTableWriter, write_rollout_table

SHARED: dict[str, Any] = {
    "vocab_size": task.VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": task.PAD,
    "eos_token_id": task.EOS,
    "bos_token_id": None,
}


SUMS, CALCULATOR_SUMS = 16, 4
"""Prompts of each kind per policy version, four rollouts each."""


@dataclass(frozen=True)
class Recipe:
    """What makes one folder.

    Attributes:
        model_class, config: architecture.
        warm_steps, updates, lr: length of the two trainings and the second one's learning rate.
        staleness: how many updates older than the training model each sampling policy is.
        encoding: how logits are stored; both copy the sampler's bfloat16 values.
        seed: of weights, prompts and samples.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    warm_steps: int
    updates: int
    lr: float
    staleness: tuple[int, ...]
    encoding: Encoding
    seed: int

    @property
    def versions(self) -> list[int]:
        return [self.updates - age for age in self.staleness]


RECIPES = {
    "tiny": Recipe(
        LlamaForCausalLM,
        LlamaConfig(**SHARED, intermediate_size=160),
        warm_steps=1200,
        updates=200,
        lr=2e-4,
        staleness=(120, 60, 30, 10, 0),
        encoding="bfloat16",
        seed=1,
    ),
    "tiny-moe": Recipe(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SHARED,
            head_dim=16,
            intermediate_size=160,
            moe_intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
        ),
        warm_steps=1200,
        updates=200,
        lr=2e-4,
        staleness=(120, 60, 30, 10, 0),
        encoding="float16",
        seed=2,
    ),
}


def make(name: str, folder: Path) -> None:
    """Train the model called `name` and write its folder anew: `model/` and `rollouts/`."""
    recipe = RECIPES[name]
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    rng, generator = random.Random(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    model = recipe.model_class(recipe.config).eval()
    warm_start(model, rng, steps=recipe.warm_steps)
    weights = policy_gradient(model, rng, generator, updates=recipe.updates, lr=recipe.lr, keep=recipe.versions)
    shutil.rmtree(folder, ignore_errors=True)
    model.load_state_dict(weights[recipe.updates])
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    record(recipe, weights, folder / "rollouts")


def record(recipe: Recipe, weights: dict[int, dict[str, Tensor]], folder: Path) -> None:
    """Sample from each policy version in bfloat16; write two shards of sums, one with a calculator, and all logits."""
    generator = torch.Generator().manual_seed(recipe.seed + 100)
    sampler = recipe.model_class(recipe.config).to(torch.bfloat16).eval()
    shards: list[list[dict[str, object]]] = [[], [], []]
    folder.mkdir(parents=True)
    with LogitsTableWriter(folder / "logits-00000.parquet", recipe.encoding) as logits:
        for version in recipe.versions:
            sampler.load_state_dict(weights[version])
            rng = random.Random(recipe.seed + 100)  # the same prompts for every version, so that these can be compared
            for number in range(SUMS + CALCULATOR_SUMS):
                calculator = number >= SUMS
                prompt = task.make_prompt(rng, 2 + number % 4, calculator=calculator)
                group = f"v{version}/{'calc' if calculator else 'sum'}-{number:02d}"
                for index, row in enumerate(sample(sampler, [prompt] * 4, generator)):
                    shards[2 if calculator else number % 2].append(describe(row, f"{group}/s{index}", group, version))
                    logits.add(f"{group}/s{index}", as_stored(torch.stack(row.logits), recipe.encoding))
    for index, shard in enumerate(shards):
        table = pa.Table.from_pylist(shard, schema=MOE_SCHEMA if "routed_experts" in shard[0] else ROLLOUT_SCHEMA)
        write_rollout_table(folder / f"rollouts-{index:05d}.parquet", table, logits=["logits-00000.parquet"])


ROLLOUT_SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("group_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("response_mask", pa.list_(pa.bool_())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("temperature", pa.float64()),
        ("logprobs_mode", pa.string()),
        ("policy_version", pa.int64()),
        ("engine", pa.string()),
        ("finish_reason", pa.string()),
        ("response_text", pa.string()),
    ]
)
MOE_SCHEMA = ROLLOUT_SCHEMA.append(pa.field("routed_experts", pa.list_(pa.list_(pa.list_(pa.int16())))))


def describe(row: Sampled, rollout_id: str, group_id: str, version: int) -> dict[str, object]:
    """One row of the rollout table. NaN stands where the calculator's tokens have no log-probability."""
    logprobs = torch.stack(row.logits).float().log_softmax(-1)[range(len(row.logits)), row.response_ids].tolist()
    routing = {} if row.experts is None else {"routed_experts": row.experts.tolist()}
    return {
        **routing,
        "rollout_id": rollout_id,
        "group_id": group_id,
        "prompt_ids": task.encode(row.prompt),
        "response_ids": row.response_ids,
        "response_mask": row.own,
        "rollout_logprobs": [value if own else float("nan") for value, own in zip(logprobs, row.own, strict=True)],
        "reward": task.reward(row.prompt, row.response_ids),
        "temperature": 1.0,
        "logprobs_mode": "raw",
        "policy_version": version,
        "engine": "transformers-bf16",
        "finish_reason": "stop" if row.response_ids[-1] == task.EOS else "length",
        "response_text": task.decode(row.response_ids),
    }


def as_stored(logits: Tensor, encoding: Encoding) -> NDArray[np.generic]:
    """bfloat16 [T, V] as the writer takes it: bit patterns for bfloat16, values otherwise."""
    if encoding == "bfloat16":
        return logits.view(torch.uint16).numpy()
    return logits.float().numpy()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so that prompts and responses can be read."""
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(task.VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
