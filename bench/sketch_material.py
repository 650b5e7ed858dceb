"""Responses under two policies, every logit of both at hand: stored ones, and ones that are sampled here.

The sampler of our own is a checkpoint whose matrices have noise on them, as if it were some updates away; the
checkpoint itself is the trainer. It samples at temperature 1 from the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from trm_audit.engine.checkpoint import find_checkpoint
from trm_audit.engine.model import TrainerModel
from trm_audit.numerics.divergences import divergences
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.read import find_shards

Floats = NDArray[np.float64]
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What is 17 * 23? Show your work.",
    "Explain to a child why the sky is blue.",
    "Write a Python function that reverses a list, then describe it.",
)


@dataclass(frozen=True)
class Response:
    """A response under both policies.

    Attributes:
        name: for messages.
        ids: [T] int64 tokens.
        rollout, trainer: [T, V] floating point logits.
        kl, tv: [T] exact, from float64 logits: KL(rollout || trainer) in nats, and TV.
        hellinger2: [T] sum (sqrt(p) - sqrt(q))^2.
    """

    name: str
    ids: NDArray[np.int64]
    rollout: Tensor
    trainer: Tensor
    kl: Floats
    tv: Floats
    hellinger2: Floats

    def at(self, positions: Sequence[int]) -> Response:
        """The same at some positions."""
        rows = np.asarray(positions)
        return Response(self.name, *(getattr(self, part)[rows] for part in list(vars(self))[1:]))


def stored(folder: Path, checkpoint: Path) -> Iterator[Response]:
    """Rollouts of a folder that have full logits beside them; those are compared as they are stored."""
    model = trainer(checkpoint)
    for shard in find_shards([str(folder)], "rollouts").shards:
        logits = StoredLogits(shard.logits)
        for row in pq.read_table(shard.path, columns=["rollout_id", "prompt_ids", "response_ids"]).to_pylist():
            length = len(row["response_ids"])
            if row["rollout_id"] in logits and length:
                rollout = logits.rows(row["rollout_id"], 0, length).clone()
                yield response(row["rollout_id"], model, row["prompt_ids"], row["response_ids"], rollout)


def sampled(checkpoint: Path, noise: float, samples: int, length: int) -> Iterator[Response]:
    """Rollouts of the checkpoint under noise, `samples` for each prompt, at most `length` tokens each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    auto: Any = AutoModelForCausalLM
    sampler = auto.from_pretrained(checkpoint, dtype=torch.float32).eval()
    disturb(sampler, noise)
    model, end = trainer(checkpoint), tokenizer.eos_token_id
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    made = sampler.generate(
        **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples,
        max_new_tokens=length, pad_token_id=end, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for row, whole in enumerate(made.sequences):
        padded = prompts["input_ids"][row // samples]
        before = padded[prompts["attention_mask"][row // samples] == 1].tolist()
        ids = whole[len(padded) :].tolist()
        ids = ids[: ids.index(end) + 1] if end in ids else ids
        rollout = torch.stack([step[row] for step in made.logits[: len(ids)]]).float()
        yield response(f"prompt-{row // samples}/s{row % samples}", model, before, ids, rollout)


@torch.no_grad()
def disturb(model: torch.nn.Module, noise: float) -> None:
    """Adds normal noise to each layer's matrices, in relation to their spread; embeddings and norms stay."""
    rng = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            module.weight.add_(torch.randn(module.weight.shape, generator=rng) * (noise * module.weight.std()))


def trainer(checkpoint: Path) -> TrainerModel:
    """The checkpoint in float32, each sequence by itself."""
    return TrainerModel(find_checkpoint(checkpoint), dtype="float32", sharing="alone")


def response(name: str, model: TrainerModel, prompt: list[int], ids: list[int], rollout: Tensor) -> Response:
    """One response through the trainer, with its exact figures."""
    context = np.array(prompt + ids[:-1])
    (states,) = model.hidden(model.steps([context]), [context])
    logits = model.logits(states[len(prompt) - 1 :]).cpu()
    rollout = rollout[:, : logits.shape[1]]
    exact = divergences(rollout.double(), logits.double())
    p, q = (x.double().softmax(1).sqrt() for x in (rollout, logits))
    apart = (p - q).square().sum(1)
    return Response(name, np.array(ids), rollout, logits, exact.kl.numpy(), exact.tv.numpy(), apart.numpy())


def true_distances(one: Response, ids: Tensor) -> Floats:
    """||sqrt(p^) - sqrt(q^)||^2 of the tails outside some tokens, [T], in float64; NaN where there is no tail."""
    p, q = (x.double().scatter(1, ids, -torch.inf).softmax(1).sqrt() for x in (one.rollout, one.trainer))
    distances: Floats = (p - q).square().sum(1).numpy()
    return distances
