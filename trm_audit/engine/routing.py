"""Which experts the trainer sends tokens to, compared with those that the engine stored.

In transformers the experts of a layer are one module, which is given the hidden states of n tokens and, for each of
them, the numbers of its k experts. A call of that shape is looked for in a forward of a few made-up tokens, so that
nothing depends on an architecture's name. A model that shows none is dense, or hides its routing: then nothing is
known, and nothing is claimed. The experts are listened to only while rollouts that carry routing are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from trm_audit.errors import RowError
from trm_audit.numerics.ragged import Ints
from trm_audit.rollout import RolloutBatch, TokenScores

if TYPE_CHECKING:
    from trm_audit.engine.model import TrainerModel

PROBE = 11
"""Made-up tokens of the forward in which experts are looked for."""


@dataclass(frozen=True)
class ExpertLayer:
    """Experts of one layer: their module, the number of the decoder layer they are in, and k."""

    module: nn.Module
    layer: int
    k: int


class Experts:
    """The layers of a model that have experts, and what these were given in its last forward.

    Args:
        layers: first layer first; () where there are none, or not all of them can be listened to.
        depth: layers of the decoder, with and without experts.
        compiled: layers are compiled. What was traced without listeners runs without them, so they are added once,
            stay, and everything is traced again.
    """

    def __init__(self, layers: Sequence[ExpertLayer], depth: int, *, compiled: bool = False) -> None:
        self.layers, self.depth, self._compiled = tuple(layers), depth, compiled
        self._given: list[list[Tensor]] = [[] for _ in layers]
        self._hooks: list[Any] = []
        self._chosen: Tensor | None = None
        self._is_listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which forwards can be asked for."""
        if not self._hooks:
            hear: Any = torch.compiler.disable(self._hear) if self._compiled else self._hear  # type: ignore[no-untyped-call]
            pairs = zip(self.layers, self._given, strict=True)
            self._hooks = [_before(one.module, partial(hear, given)) for one, given in pairs]
            if self._compiled and self._hooks:
                torch.compiler.reset()
        self._is_listening = True
        try:
            yield
        finally:
            self._is_listening = False
            self.forget()
            if not self._compiled:
                for hook in self._hooks:
                    hook.remove()
                self._hooks = []

    def _hear(self, into: list[Tensor], *call: Any) -> None:
        if self._is_listening:
            _note(into, *call)

    def forget(self) -> None:
        """Before a forward: nothing is known of the one before."""
        self._chosen = None
        for given in self._given:
            given.clear()

    def chosen(self, num_positions: int) -> Tensor | None:
        """[num_positions, layers, k] int16 experts of all positions of the forward since `forget`, padding included;
        None where a layer was not called once, with all of them."""
        if self._chosen is None and self.layers and all(len(given) == 1 for given in self._given):
            device = self._given[0][0].device
            self._chosen = torch.stack([given[0].to(device) for given in self._given], 1)
        return self._chosen if self._chosen is not None and len(self._chosen) == num_positions else None


def find_experts(model: TrainerModel) -> Experts:
    """The experts of a model, seen in a forward of one made-up sequence."""
    decoder: nn.Module = model.module.get_decoder()
    modules = dict(decoder.named_modules())
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [_before(module, partial(_note, seen[name])) for name, module in modules.items()]
    rows = [np.arange(1, PROBE + 1) % model.vocab_size]
    try:
        with torch.compiler.set_stance("force_eager") if model.compiled else nullcontext():
            for _ in model.hidden(model.steps(rows, rung="alone"), rows, rung="alone"):
                pass
    finally:
        for hook in hooks:
            hook.remove()
    calls = {name: given for name, given in seen.items() if any(len(one) == PROBE for one in given)}
    numbers = [next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in calls]
    clear = all(len(given) == 1 for given in calls.values()) and len(set(numbers)) == len(numbers)
    clear = clear and len({given[0].shape[1] for given in calls.values()}) == 1
    layers = [
        ExpertLayer(modules[name], number, given[0].shape[1])
        for number, (name, given) in zip(numbers, calls.items(), strict=True)
    ]
    depth = int(getattr(model.module.config.get_text_config(), "num_hidden_layers", 0))
    return Experts(layers if clear else (), depth, compiled=model.compiled)


def _before(module: nn.Module, note: Callable[..., None]) -> Any:
    return module.register_forward_pre_hook(note, with_kwargs=True)


def _note(into: list[Tensor], _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Copies the numbers of experts that a module is given, if it is given any."""
    into += [given.to(torch.int16, copy=True) for given in (*args, *kwargs.values()) if _are_numbers(given)]


def _are_numbers(given: object) -> TypeGuard[Tensor]:
    """Whether an argument is [tokens, k] integers."""
    return isinstance(given, Tensor) and given.dtype in (torch.int64, torch.int32, torch.int16) and given.ndim == 2


class RoutingComparison:
    """What a batch stores of the engine's routing, to be compared forward by forward with that of the trainer.

    Args:
        experts: of the trainer.
        batch: rollouts; without `routed_experts`, or with a trainer that has no experts, nothing is compared.
        out: where `routing_agreement` goes.

    Raises:
        RowError: a row's routing has other layers or another k than the trainer's.
    """

    def __init__(self, experts: Experts, batch: RolloutBatch, out: TokenScores) -> None:
        self.experts, self._batch, self._out = experts, batch, out
        self._at = _layers_of_rows(experts, batch) if experts.layers else None

    def score(self, tokens: Ints, positions: Ints, num_positions: int) -> None:
        """Agreement of some response tokens, which the last forward predicted.

        Args:
            tokens: [n] indices into the batch's response tokens.
            positions: [n] where the forward's hidden states predict them.
            num_positions: of the forward, padding counted.
        """
        stored, chosen = self._batch.routed_experts, self.experts.chosen(num_positions)
        if self._at is None or stored is None or chosen is None:
            return
        rows = np.searchsorted(self._batch.response.offsets, tokens, side="right") - 1
        there = stored.layers[rows] > 0
        rows, tokens, positions = rows[there], tokens[there], positions[there]
        before = self._batch.prompt.lengths[rows] + tokens - self._batch.response.offsets[rows] - 1
        start = stored.ids.offsets[rows] + before * stored.layers[rows] * stored.k[rows]
        k = chosen.shape[2]
        theirs = stored.ids.values[(start[:, None] + self._at[rows] * k)[:, :, None] + np.arange(k)]
        ours = chosen[torch.from_numpy(positions).to(chosen.device)]
        found = agreement(torch.from_numpy(theirs).to(chosen.device), ours)
        self._out.tokens["routing_agreement"][tokens] = found.cpu().numpy()


def _layers_of_rows(experts: Experts, batch: RolloutBatch) -> Ints | None:
    """[rows, layers] which layers of a row's entries the trainer's layers with experts are: all of them, or those of
    their number where an engine stores every layer of the decoder."""
    stored = batch.routed_experts
    if stored is None:
        return None
    own, k = len(experts.layers), experts.layers[0].k
    fits = (stored.k == k) & ((stored.layers == own) | (stored.layers == experts.depth))
    for row in np.flatnonzero(~fits & (stored.layers > 0))[:1]:
        others = f" of its {experts.depth} layers" if own != experts.depth else " layers"
        raise RowError(
            f"routed_experts names {stored.k[row]} experts in each of {stored.layers[row]} layers, "
            f"the model has {k} in {own}{others}",
            place=batch.place(row),
            next_step="Score with a checkpoint of the architecture that was sampled from, or leave the column out "
            "(schemas/rollout.md, rule 12).",
        )
    numbers = np.array([one.layer for one in experts.layers])
    return np.where((stored.layers == own)[:, None], np.arange(own), numbers)


def agreement(stored: Tensor, chosen: Tensor) -> Tensor:
    """Share of the stored experts that the trainer chose too, over all layers, in any order.

    Args:
        stored: [n, layers, k] integers; below 0 is unknown, and a choice that names an expert twice is filler.
        chosen: [n, layers, k] integers.

    Returns:
        [n] float64 in [0, 1], NaN where any stored expert is unknown.
    """
    ordered = stored.sort(-1).values
    unknown = (ordered[..., 0] < 0) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    hits = (stored[..., :, None] == chosen[..., None, :]).any(-1)
    return hits.double().mean((1, 2)).masked_fill(unknown.any(1), torch.nan)
