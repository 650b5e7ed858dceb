"""What a sampler did to its logits before it drew: temperature, top-k, top-p (torch)."""

from __future__ import annotations

import torch
from torch import Tensor


def sampling_logits(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Logits of the policy that really sampled, from raw ones: tempered, then truncated with -inf.

    Args:
        logits: [n, V] raw.
        temperature: above 0.
        top_p: in (0, 1]; the smallest set of most probable tokens whose probabilities reach it is kept, always at
            least one.
        top_k: keep the k largest and what ties with the k-th; -1 and 0 are off.

    The order is top-k first, then top-p on what it left, as in vLLM, SGLang and transformers.
    """
    out = logits.float() / temperature if temperature != 1.0 else logits.float()
    if 0 < top_k < out.shape[1]:
        out = out.masked_fill(out < out.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = out.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # mass of strictly more probable tokens
        drop = torch.zeros_like(out, dtype=torch.bool).scatter_(1, order, before >= top_p)
        out = out.masked_fill(drop, -torch.inf)
    return out


def with_drawn(rollout: Tensor, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Truncated logits with the token that was drawn from each row back in place: what was drawn was not truncated.

    Args:
        rollout: [n, V] as `sampling_logits` made them, whose rounding may differ from the sampler's.
        logits: [n, V] raw.
        ids: [n] int64 the drawn tokens.
        temperature: that the rollout's logits have behind them.
    """
    return rollout.scatter(1, ids[:, None], logits.gather(1, ids[:, None]).float() / temperature)
