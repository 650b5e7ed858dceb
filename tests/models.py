"""Tiny models with random weights, one per architecture, for tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

VOCAB = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 13,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "mistral": {"sliding_window": 13},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, **SLIDING},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **SLIDING},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 0.2},
    "cohere2": {"logit_scale": 4.0, **SLIDING},
    "olmo2": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2, **SLIDING},
    "deepseek_v2": {**LATENT, **ROUTED, "n_group": 1},
    "deepseek_v3": {**LATENT, **ROUTED},
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_expert_intermediate_size": 24,
        **EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
}
"""Settings beyond BASE. Soft caps and scales of the head are strong enough to be missed if they were left out."""


def tiny_model(architecture: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A float32 model whose weights are large enough for its distributions to differ from position to position."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **{**BASE, **ARCHITECTURES[architecture], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4.0)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Writes a checkpoint folder."""
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The model's own forward on one sequence: [n, V] float32."""
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def sequences(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """Random token ids, the padding id among them."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=rng) for length in lengths]
