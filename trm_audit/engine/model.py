"""The training model: hidden states of whole plans, and the head on chosen positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trm_audit.engine import tree
from trm_audit.engine.batches import run_batches
from trm_audit.engine.checkpoint import Checkpoint
from trm_audit.engine.head import Head
from trm_audit.engine.loading import load, pick_device, pick_dtype
from trm_audit.engine.plan import Step, fork_steps, padded_steps, prefix_forest, tree_steps
from trm_audit.engine.routing import Experts, find_experts
from trm_audit.engine.sharing import choose, continues, rope_types
from trm_audit.errors import UsageError
from trm_audit.numerics.ragged import Ints

COMPILER = "inductor"
MAX_TOKENS = {"cpu": 4096, "cuda": 16384}


class TrainerModel:
    """A loaded checkpoint, ready to score.

    Args:
        checkpoint: what to load.
        device: `auto`, `cpu` or `cuda[:i]`; auto takes the first GPU if there is one.
        device_map: `auto` spreads the model over all GPUs, for models larger than one.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; auto is float32 on a CPU and bfloat16 on a GPU.
        head_dtype: `auto` (as `dtype`) or `float32`: what the head computes in.
        vocab_size: cut the head's output to the first n tokens; None keeps all.
        sharing: `auto`, or one of `sharing.RUNGS`.
        batch_invariant: padded batches of constant shapes, so that a sequence's scores do not depend, to the bit, on
            the others of its batch. On a CPU padded batches below float32 are so in any case.
        compile: `torch.compile` the decoder's layers.
        max_tokens: tokens of one forward, padding counted; None is `MAX_TOKENS` of the device.

    Raises:
        BadInput: weights are missing or of another shape, or transformers does not know the architecture.
        UsageError: a device or type that is not there, or a way of sharing that is wrong for this model.

    Attributes:
        module: the transformers model.
        vocab_size: columns of `logits`.
        sharing: the rung taken and how it was checked.
        compiled: whether the decoder's layers are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        device_map: str | None = None,
        dtype: str = "auto",
        head_dtype: str = "auto",
        vocab_size: int | None = None,
        sharing: str = "auto",
        batch_invariant: bool = False,
        compile: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        self.device = pick_device(device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # kernels of our own run on the current one
        self.dtype = pick_dtype(dtype, self.device)
        self.head_dtype = self.dtype if head_dtype == "auto" else pick_dtype(head_dtype, self.device)
        if self.head_dtype not in (self.dtype, torch.float32):
            raise UsageError(f"--head-dtype {head_dtype}: float32 or that of --dtype is needed")
        if batch_invariant and sharing not in ("auto", "padded"):
            raise UsageError(f"--batch-invariant and --sharing {sharing} contradict each other: shapes would vary")
        self.module: Any = load(checkpoint, self.dtype, self.device, device_map)
        self.max_tokens = max_tokens or MAX_TOKENS[self.device.type]
        own = int(self.module.get_output_embeddings().weight.shape[0])
        if vocab_size is not None and not 0 < vocab_size <= own:
            raise UsageError(f"--vocab-size {vocab_size}: the model has {own} tokens")
        self.vocab_size = own if vocab_size is None else vocab_size
        self.constant = batch_invariant or (self.device.type == "cpu" and self.dtype != torch.float32)
        self._attention = self.module.config._attn_implementation
        self._head = Head(self.module, self.vocab_size)
        if self.head_dtype != self.dtype:
            self._head.widen()
        tree.register()
        if "dynamic" in rope_types(self.module.config):
            self._head.decoder.register_forward_pre_hook(_forget_lengths)
        self.sharing = choose(self, "padded" if batch_invariant else sharing)
        self.compiled = compile
        if compile:
            self._compile()

    @cached_property
    def experts(self) -> Experts:
        """Its layers with experts; none if it is dense or hides its routing."""
        return find_experts(self)

    @cached_property
    def in_pieces(self) -> bool:
        """Whether a long sequence may be computed piece by piece, each with the cache of those before."""
        return continues(self)

    def steps(
        self,
        rows: Sequence[Ints],
        *,
        rung: str | None = None,
        max_tokens: int | None = None,
        pieces: bool | None = None,
    ) -> list[Step]:
        """Plan of the forwards that compute some sequences.

        Args:
            rows: token ids of each; empty ones are left out.
            rung: another way than the model's own.
            max_tokens: another budget.
            pieces: of padded batches, whether sequences beyond the budget are cut; None: if that was found exact.
        """
        rung, budget = rung or self.sharing.rung, max_tokens or self.max_tokens
        lengths = [len(row) for row in rows]
        if rung == "alone":
            return padded_steps(lengths, 1, pieces=False)
        if rung == "padded":
            cut = max(lengths, default=0) > budget and (self.in_pieces if pieces is None else pieces)
            return padded_steps(lengths, budget, constant=self.constant, pieces=cut)
        if rung == "fork":
            return fork_steps(prefix_forest(rows), lengths, budget)
        return tree_steps(prefix_forest(rows, shared=rung == "tree"), lengths, budget)

    def hidden(self, steps: Sequence[Step], rows: Sequence[Ints], *, rung: str | None = None) -> Iterator[Tensor]:
        """Last hidden states of each step, [positions, H], to be read by the step's spans.

        Args:
            steps: from `steps`, of the same rung.
            rows: what they were planned for.
        """
        rung = rung or self.sharing.rung
        flat = rung in ("tree", "packed")
        wanted = tree.NAME if flat else self._attention
        if self.module.config._attn_implementation != wanted:
            self.module.set_attn_implementation(wanted)
        device: torch.device = self.module.get_input_embeddings().weight.device
        return (tree.run_tree if flat else run_batches)(self._head.decoder, steps, rows, device)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of n positions, [n, vocab_size] in the type that the head computes in.

        Args:
            hidden: [n, H].
        """
        logits = self._head(hidden)
        return logits if logits.shape[1] == self.vocab_size else logits[:, : self.vocab_size].contiguous()

    def _compile(self) -> None:
        """Layers with shapes that vary, so that few of them are ever compiled; attention, whose shapes always differ,
        stays as it is."""
        tree.register(uncompiled=True)
        for one in (module for module in self._head.decoder.children() if isinstance(module, nn.ModuleList)):
            for layer in one:
                layer.compile(dynamic=True, backend=COMPILER)


def _forget_lengths(decoder: Any, _: object) -> None:
    """Undoes what `dynamic` position scaling keeps of longer rows seen before: scores would depend on their order."""
    for module in decoder.modules():
        if hasattr(module, "original_max_seq_len") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
