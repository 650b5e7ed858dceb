"""Training of the tiny models in plain torch loops: a supervised warm start, then REINFORCE with a group baseline.

The sampler is the one that also records the rollouts: left-padded prompts, a key-value cache, one token a step, in
whatever precision the model is in. A tool's tokens are forced into the row and marked as not the policy's own. Of a
mixture of experts it keeps which experts each token went to.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from making import digit_sums as task
from torch import Tensor, nn

MAX_RESPONSE = 48


@dataclass
class Sampled:
    """One rollout as it came out of the sampler.

    Attributes:
        prompt: its text.
        response_ids: token ids, the calculator's included.
        own: per response token, True where the policy sampled it.
        logits: per response token, [V] in the sampler's precision.
        experts: [positions, layers, k] experts of every token of prompt and response but the last, which is never
            computed; None of a dense model.
    """

    prompt: str
    response_ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    experts: Tensor | None = None
    queue: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        stopped = bool(self.response_ids) and self.response_ids[-1] == task.EOS
        return stopped or len(self.response_ids) >= MAX_RESPONSE

    def step(self, sampled: int, logits: Tensor) -> int:
        """Take the next token, the tool's if one is due, otherwise the sampled one; return the token taken."""
        if self.done:
            return task.PAD
        self.own.append(not self.queue)
        token = self.queue.pop(0) if self.queue else sampled
        self.response_ids.append(token)
        self.logits.append(logits)
        if self.own[-1]:
            self.queue = task.observation(self.response_ids)
        return token


@torch.no_grad()
def sample(model: nn.Module, prompts: list[str], generator: torch.Generator) -> list[Sampled]:
    """One response to each prompt at temperature 1, from the model's own precision; softmax in float32."""
    rows = [Sampled(prompt) for prompt in prompts]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[task.PAD] * (width - len(p)) + task.encode(p) for p in prompts])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache, routed = None, []
    while not all(row.done for row in rows):
        with routing(model) as chosen:
            out = model(
                input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
            )
        if chosen:
            routed.append(torch.stack(chosen, 1).unflatten(0, ids.shape))
        cache, logits = out.past_key_values, out.logits[:, -1]
        draws = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0].tolist()
        tokens = [row.step(draw, row_logits) for row, draw, row_logits in zip(rows, draws, logits, strict=True)]
        ids = torch.tensor(tokens)[:, None]
        positions = positions[:, -1:] + 1
        attention = torch.cat([attention, torch.ones(len(rows), 1, dtype=attention.dtype)], dim=1)
    if routed:
        for row, experts in zip(rows, torch.cat(routed, 1), strict=True):
            row.experts = experts[width - len(row.prompt) :][: len(row.prompt) + len(row.response_ids) - 1]
    return rows


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that a forward fills with the experts, [rows x tokens, k], that each router chooses, layer by layer."""
    chosen: list[Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(lambda *call: chosen.append(call[-1][-1])) for router in routers]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def own_logprobs(model: nn.Module, rows: list[tuple[str, list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats) of the response tokens of (prompt, response_ids, own) rows.

    Returns:
        log-probability of the token after each position, and 1 where that token is the policy's own; float32
        [rows, width - 1] both.
    """
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    ids = torch.full((len(rows), width), task.PAD)
    own = torch.zeros(len(rows), width)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (prompt, response, flags) in enumerate(rows):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.tensor(task.encode(prompt) + response)
        own[i, len(prompt) : length] = torch.tensor(flags, dtype=torch.float32)
        attention[i, :length] = 1
    logprobs = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0], own[:, 1:]


def warm_start(model: nn.Module, rng: random.Random, *, steps: int, batch: int = 32, lr: float = 3e-3) -> None:
    """Supervised training on demonstrations, so that the policy gradient finds rewards to start from."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        prompts = [task.make_prompt(rng, rng.randint(2, 5), calculator=rng.random() < 0.25) for _ in range(batch)]
        logprobs, own = own_logprobs(model, [(p, *task.demonstrate(rng, p)) for p in prompts])
        loss = -(logprobs * own).sum() / own.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def policy_gradient(
    model: nn.Module,
    rng: random.Random,
    generator: torch.Generator,
    *,
    updates: int,
    lr: float,
    keep: Iterable[int],
    groups: int = 24,
) -> dict[int, dict[str, Tensor]]:
    """REINFORCE on fresh samples, `groups` prompts of 8 rollouts an update; the baseline is the group's mean reward.

    Returns:
        update number -> the weights after that many updates, for each number in `keep`.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    kept, wanted, recent = {}, set(keep), 0.0
    for update in range(updates + 1):
        if update in wanted:
            kept[update] = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        distinct = [task.make_prompt(rng, 2 + i % 4, calculator=i % 3 == 2) for i in range(groups)]
        prompts = [prompt for prompt in distinct for _ in range(8)]
        rows = sample(model, prompts, generator)
        rewards = torch.tensor([task.reward(row.prompt, row.response_ids) for row in rows])
        grouped = rewards.reshape(groups, 8)
        advantage = (grouped - grouped.mean(1, keepdim=True)).reshape(-1)
        logprobs, own = own_logprobs(model, [(row.prompt, row.response_ids, row.own) for row in rows])
        loss = -(advantage[:, None] * logprobs * own).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = rewards.mean().item() if update == 0 else 0.9 * recent + 0.1 * rewards.mean().item()
        if update % 20 == 0:
            print(f"update {update}: mean reward {recent:.3f}", flush=True)
    return kept
