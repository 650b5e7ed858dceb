"""The training model: its decoder's hidden states for a batch of sequences, and its head on chosen positions.

The head of a causal language model is whatever its forward does after the decoder: a matrix, often a soft cap or a
scale. So that none of it is written again here, the decoder inside the loaded model is replaced by a stand-in that
returns given hidden states, and the model's own forward does the rest. A probe at start-up compares both ways.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trm_audit.engine.checkpoint import Checkpoint
from trm_audit.errors import BadInput, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
PROBE_TOKENS = 40
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Position scalings that look at the longest row of a batch."""


class _Decoder:
    """Takes the place of the decoder's forward: runs it, or returns the hidden states it was given."""

    def __init__(self, decoder: nn.Module) -> None:
        self._forward = decoder.forward
        self.hidden: Tensor | None = None
        decoder.forward = self  # the module itself stays: heads read its settings

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if self.hidden is None:
            return self._forward(*args, **kwargs)
        return _output_type()(last_hidden_state=self.hidden)


@cache
def _output_type() -> Any:
    """What a decoder returns, with None for all that may come with hidden states (caches, router logits, ...)."""
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Output


class TrainerModel:
    """A loaded checkpoint, ready to score.

    Args:
        checkpoint: what to load.
        device: `auto`, `cpu` or `cuda[:i]`; auto takes the first GPU if there is one.
        dtype: `auto`, `float32`, `bfloat16`, `float16`; auto is float32 on a CPU and bfloat16 on a GPU.
        head_dtype: `auto` (as `dtype`) or `float32`: what the head computes in.
        vocab_size: cut the head's output to the first n tokens; None keeps all.

    Raises:
        BadInput: weights are missing or of another shape, or transformers does not know the architecture.
        UsageError: a device or type that is not there.

    Attributes:
        vocab_size: columns of `logits`.
        alone: rows must not be padded together (see `plan.micro_batches`).
        in_pieces: a long sequence may be computed piece by piece.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        head_dtype: str = "auto",
        vocab_size: int | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.head_dtype = self.dtype if head_dtype == "auto" else pick_dtype(head_dtype, self.device)
        self._model = _load(checkpoint, self.dtype).to(self.device).eval()
        own = int(self._model.get_output_embeddings().weight.shape[0])
        if vocab_size is not None and not 0 < vocab_size <= own:
            raise UsageError(f"--vocab-size {vocab_size}: the model has {own} tokens")
        self.vocab_size = own if vocab_size is None else vocab_size
        self.alone = bool(_rope_types(self._model.config) & BATCH_DEPENDENT_ROPE)
        self._decoder = self._split()
        if self.head_dtype != self.dtype:
            self._widen_head()
        self.in_pieces = not self.alone and self._can_do_pieces()

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Tensor]) -> Tensor:
        """Last hidden states, [rows, longest, H]; what lies behind the end of a shorter row means nothing.

        Args:
            rows: token ids of each sequence, int64 on the CPU. Padded on the right, where a causal model never looks,
                so no mask is needed.
        """
        _forget_lengths(self._model)
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(self.device, non_blocking=True)
        out: Tensor = self._decoder(input_ids=padded, use_cache=False).last_hidden_state
        return out

    def pieces(self, row: Tensor, max_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """Last hidden states of one long sequence, at most `max_tokens` positions at a time.

        Each piece is computed with the cache of those before it, so that only that cache grows with the sequence. A
        model that a probe found unable to do so (`in_pieces`) computes the whole sequence at once.

        Args:
            row: [T] token ids, int64 on the CPU.

        Returns:
            Pairs of the first position and [1, n, H].
        """
        step = max_tokens if self.in_pieces else len(row)
        _forget_lengths(self._model)
        past = None
        for start in range(0, len(row), step):
            ids = row[None, start : start + step].to(self.device)
            with torch.inference_mode():
                out = self._decoder(input_ids=ids, past_key_values=past, use_cache=step < len(row))
            past = getattr(out, "past_key_values", None)
            yield start, out.last_hidden_state

    def _can_do_pieces(self) -> bool:
        """Whether hidden states with a cache lead to the same log-probabilities as without one."""
        probe = torch.arange(1, PROBE_TOKENS) % self.vocab_size
        self.in_pieces = True
        try:
            whole = self.logits(self.hidden([probe])[0])
            hidden = torch.cat([piece[0] for _, piece in self.pieces(probe, PROBE_TOKENS // 4)])
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return False
        off = float((whole.log_softmax(1) - self.logits(hidden).log_softmax(1)).abs().max())
        return off <= PROBE_TOLERANCE[self.dtype]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of n positions, [n, vocab_size] float32 (as the head's type gives them).

        Args:
            hidden: [n, H].
        """
        return self._head(hidden.to(self.head_dtype)[None])[0, :, : self.vocab_size].float()

    def _head(self, hidden: Tensor) -> Tensor:
        """The model's own forward behind the decoder. hidden: [1, n, H]."""
        self._decoder.hidden = hidden
        try:
            out: Tensor = self._model(input_ids=None, use_cache=False).logits
        finally:
            self._decoder.hidden = None
        return out

    @torch.inference_mode()
    def _split(self) -> _Decoder:
        """Puts a switch into the decoder, after a probe that the parts give the same logits as the whole."""
        module = self._model.get_decoder()
        name = type(self._model).__name__
        if not isinstance(module, nn.Module) or module is self._model:
            raise BadInput(f"{name} has no decoder to take out", next_step=_NOT_SPLIT)
        probe = torch.arange(1, 8, device=self.device)[None] % self.vocab_size
        whole = self._model(input_ids=probe, use_cache=False).logits[0].float()
        if bool(whole.isnan().any()):
            raise BadInput(
                f"{name}: its logits are not a number",
                next_step="The checkpoint is damaged, or overflows in this --dtype: try --dtype float32.",
            )
        self._decoder = _Decoder(module)
        try:
            parts = self._head(module(input_ids=probe, use_cache=False).last_hidden_state)[0].float()
        except (AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{name}: {error}", next_step=_NOT_SPLIT) from error
        off = float((whole.log_softmax(1) - parts.log_softmax(1)).abs().max())
        if not off <= PROBE_TOLERANCE[self.dtype]:
            raise BadInput(f"{name}: head apart from decoder is off by {off:.1e}", next_step=_NOT_SPLIT)
        return self._decoder

    def _widen_head(self) -> None:
        head = self._model.get_output_embeddings()
        wide = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        wide.weight = nn.Parameter(head.weight.detach().to(self.head_dtype), requires_grad=False)
        if head.bias is not None:
            wide.bias = nn.Parameter(head.bias.detach().to(self.head_dtype), requires_grad=False)
        self._model.set_output_embeddings(wide)


_NOT_SPLIT = (
    "This architecture cannot be scored; use --trainer-logprobs stored with the trainer's own log-probabilities."
)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:i` as a device. Raises UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: auto, cpu or cuda[:i] is needed") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: auto, cpu or cuda[:i] is needed")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there is no such GPU", next_step="Use --device cpu.")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A type by name; `auto` is float32 on a CPU and bfloat16 on a GPU. Raises UsageError for other names."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: auto, {', '.join(DTYPES)} are known")
    return DTYPES[name]


def _rope_types(config: Any) -> set[str]:
    """Position scalings of a model: one, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {one.get("rope_type", "default") for one in (rope, *rope.values()) if isinstance(one, dict)}


def _forget_lengths(model: Any) -> None:
    """Undoes what `dynamic` position scaling keeps of longer rows seen before: scores would depend on their order."""
    for module in model.modules():
        if hasattr(module, "original_max_seq_len") and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        auto: Any = transformers.AutoModelForCausalLM
        model, info = auto.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BadInput(f"transformers cannot load it ({_first_line(error)})", place=str(checkpoint.path)) from error
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
    wrong = sorted([*info.get("missing_keys", ()), *mismatched])
    if wrong:
        raise BadInput(
            f"{len(wrong)} weights are missing or of another shape, {wrong[0]} first",
            place=str(checkpoint.path),
            next_step="A model with random weights would score without complaint: fetch or convert it again.",
        )
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
