"""A model run in float32 whatever its weights are stored in, one layer widened at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within, the model computes in float32.

    A layer's weights are widened when it is called and put back as they were when it returns, so that no more than one
    layer exists twice; what is outside of the layers (embeddings, head) is wide all along, because models look at the
    type of a head before they call it. Exact: bfloat16 and float16 are float32 with fewer digits.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    below = {id(module) for one in lists for layer in one for module in layer.modules()}
    with ExitStack() as stack:
        for layer in (layer for one in lists if id(one) not in below for layer in one):
            weights = _Widened(list(layer.modules()))
            stack.callback(layer.register_forward_pre_hook(weights.widen).remove)
            stack.callback(layer.register_forward_hook(weights.restore, always_call=True).remove)
        others = _Widened([module for module in model.modules() if id(module) not in below])
        others.widen()
        stack.callback(others.restore)
        yield


class _Widened:
    """The weights of some modules, in float32 from `widen` to `restore`."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._narrow: list[tuple[dict[str, Any], str, Any]] = []

    def widen(self, *_: object) -> None:
        for module in self._modules:
            for name, weight in module._parameters.items():
                if _is_narrow(weight):
                    self._narrow.append((module._parameters, name, weight))
                    module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)
            for name, values in module._buffers.items():
                if _is_narrow(values):
                    self._narrow.append((module._buffers, name, values))
                    module._buffers[name] = values.float()

    def restore(self, *_: object) -> None:
        for place, name, value in self._narrow:
            place[name] = value
        self._narrow.clear()


def _is_narrow(values: Tensor | None) -> TypeGuard[Tensor]:
    return values is not None and values.is_floating_point() and values.dtype != torch.float32
