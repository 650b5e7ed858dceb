"""The head of a causal language model apart from its decoder.

The head is whatever the model's forward does after the decoder: a matrix, often a soft cap or a scale. So that none of
it is written again here, the decoder inside the loaded model gets a switch, by which it returns given hidden states,
and the model's own forward does the rest. A probe at start-up compares both ways.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trm_audit.errors import BadInput

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
WIDENED_TOKENS = 4096
"""Tokens of the vocabulary whose weights exist in float32 at once, where the device cannot widen within the product."""
NOT_SPLIT = (
    "This architecture cannot be scored; use --trainer-logprobs stored with the trainer's own log-probabilities."
)


class SwitchedDecoder:
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


class WideHead(nn.Module):
    """A linear head that computes in float32 from narrower weights, without a float32 copy of them.

    Args:
        head: the model's own; its weights stay where they are.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.in_features, self.out_features = head.in_features, head.out_features

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] in the weights' type -> [..., V] float32."""
        if self.weight.dtype == torch.float32:
            return linear(hidden.float(), self.weight, self.bias)
        flat = hidden.to(self.weight.dtype).flatten(0, -2)
        if flat.device.type == "cuda":  # the product accumulates in float32 anyway: its result is just not rounded
            wide = torch.mm(flat, self.weight.T, out_dtype=torch.float32)
        else:
            slices = torch.split(self.weight, WIDENED_TOKENS)
            wide = torch.cat([linear(flat.float(), part.float()) for part in slices], 1)
        if self.bias is not None:
            wide += self.bias
        return wide.reshape(*hidden.shape[:-1], -1)


class Head:
    """The model's own forward behind the decoder.

    Args:
        model: a loaded causal language model; its decoder gets a switch.
        vocab_size: tokens of its vocabulary, for the probe.

    Raises:
        BadInput: decoder and head cannot be told apart, or the logits are not a number.

    Attributes:
        decoder: the decoder module.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        module = model.get_decoder()
        name = type(model).__name__
        if not isinstance(module, nn.Module) or module is model:
            raise BadInput(f"{name} has no decoder to take out", next_step=NOT_SPLIT)
        self.decoder: Any = module
        self._probe(name, vocab_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] in the type that the head computes in."""
        self._switch.hidden = hidden[None]
        try:
            out: Tensor = self._model(input_ids=None, use_cache=False).logits
        finally:
            self._switch.hidden = None
        return out[0]

    def widen(self) -> None:
        """From now on the last matrix product gives float32."""
        self._model.set_output_embeddings(WideHead(self._model.get_output_embeddings()))

    @torch.inference_mode()
    def _probe(self, name: str, vocab_size: int) -> None:
        probe = torch.arange(1, 8, device=self._model.get_input_embeddings().weight.device)[None] % vocab_size
        whole = self._model(input_ids=probe, use_cache=False).logits[0].float()
        if bool(whole.isnan().any()):
            raise BadInput(
                f"{name}: its logits are not a number",
                next_step="The checkpoint is damaged, or overflows in this --dtype: try --dtype float32.",
            )
        dtype = self._model.get_output_embeddings().weight.dtype
        self._switch = SwitchedDecoder(self.decoder)
        try:
            parts = self(self.decoder(input_ids=probe, use_cache=False).last_hidden_state[0]).float()
        except (AttributeError, TypeError, ValueError) as error:
            raise BadInput(f"{name}: {error}", next_step=NOT_SPLIT) from error
        off = float((whole.log_softmax(1) - parts.log_softmax(1)).abs().max())
        if not off <= TOLERANCE[dtype]:
            raise BadInput(f"{name}: head apart from decoder is off by {off:.1e}", next_step=NOT_SPLIT)
