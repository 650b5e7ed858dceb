"""Recording what vLLM samples, in the engine's own process, as a custom logits processor.

    from trm_audit.record.vllm import VllmRecorder

    llm = LLM(model, logits_processors=[VllmRecorder.to("rollouts/")], async_scheduling=False)
    llm.generate(prompts, [SamplingParams(temperature=0.8, extra_args={"rollout_id": name}) for name in names])

For a server: `TRM_AUDIT_RECORD=rollouts/ vllm serve ... --logits-processors trm_audit.record.vllm:VllmRecorder
--no-async-scheduling`; only the first of the model runners below needs that. Of a request's `extra_args`, `rollout_id`,
`group_id` and `policy_version` go into the columns of these names; `{"record": False}` leaves the request out. Of
several logits processors, put this one last.

vLLM has two model runners with an interface each, and the class serves both. The first (V1) shows logits behind all
that shapes them but top-k and top-p, and a live list of each request's tokens. The second (Model Runner V2, the default
on GPUs since 2026) shows them before the temperature and min-p, which are applied here, and keeps the tokens on the
device. Neither says why a request left: `record.running` finds that out.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trm_audit.errors import UsageError
from trm_audit.record.evidence import Recipe
from trm_audit.record.rows import list_too_short
from trm_audit.record.running import Request, Running
from trm_audit.record.vllm_requests import check, request_of, unrecorded, wanted
from trm_audit.record.writer import RolloutWriter

FOLDER, RECIPE = "TRM_AUDIT_RECORD", "TRM_AUDIT_RECIPE"
"""Environment variables, which the engine's processes inherit: the folder, and "K,m,seed"."""
log = logging.getLogger(__name__)

if TYPE_CHECKING:

    class FirstInterface: ...

    class SecondInterface: ...

else:

    def _interface(module, name):
        """vLLM's base class, or an empty one where this vLLM does not have it (or there is none)."""
        try:
            return importlib.import_module(module).LogitsProcessor
        except ImportError:
            return type(name, (), {})

    FirstInterface = _interface("vllm.v1.sample.logits_processor", "FirstInterface")
    SecondInterface = _interface("vllm.v1.worker.gpu.sample.logits_processor", "SecondInterface")


class VllmRecorder(FirstInterface, SecondInterface):
    """To be given to vLLM among its `logits_processors`; changes no logits, writes one rollout for each request.

    vLLM constructs it, in each worker: `(vllm_config, device, is_pin_memory)` by the first interface, `(vllm_config,
    req_states)` by the second.

    Raises:
        UsageError: no folder is named, or the engine does something that hides what was sampled: speculative decoding,
            watermarking, or, with the first interface, asynchronous scheduling.
    """

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool = False) -> None:
        self._states = where if hasattr(where, "all_token_ids") else None
        _check_engine(vllm_config, first=self._states is None)
        self._longest = int(vllm_config.model_config.max_model_len)
        self._at: dict[int, Request] = {}
        self._output: dict[Request, list[int]] = {}
        self._said: set[str] = set()
        self._recipe = _recipe()
        self._running: Running | None = None
        if _writes(vllm_config, first=self._states is None):
            self._running = Running(RolloutWriter(_folder(), engine="vllm"), self._recipe)

    @classmethod
    def to(cls, folder: str | os.PathLike[str], *, k: int = 20, dim: int = 64, seed: int = 1) -> type[VllmRecorder]:
        """The class, with the folder and the recipe put into this process's environment for the engine to find.

        Raises:
            UsageError: the recipe is out of range.
        """
        Recipe(k, dim, seed)
        os.environ[FOLDER], os.environ[RECIPE] = str(Path(folder).resolve()), f"{k},{dim},{seed}"
        return cls

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses a request that cannot be recorded as it is, with a ValueError, as vLLM wants it."""
        check(sampling_params)

    def close(self) -> None:
        """Writes what there is, also of requests that have not ended. Happens by itself when the process ends."""
        if self._running is not None:
            self._running.close()

    def is_argmax_invariant(self) -> bool:
        """The first interface then asks behind the temperature and min-p."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """First interface, before each step: requests that were removed, added and moved since the last one."""
        if self._running is None:
            return
        with self._running.lock:
            self._running.settle()
            if batch_update is not None:
                self._update(self._running, batch_update)

    def _update(self, running: Running, update: Any) -> None:
        before = {*self._at.values()}
        for index in update.removed:
            self._at.pop(index, None)
        for index, params, prompt, output in update.added:
            self._at.pop(index, None)
            request = self._request(params, len(prompt or ()), "tempered")
            if request is not None and not prompt:
                self._say_once("Prompts given as embeddings are not recorded: their token ids are not known.")
            elif request is not None:
                request.prefix = [*prompt, *output]
                self._at[index], self._output[request] = request, output
                running.enter(request)
        for one, other, direction in update.moved:
            first, second = self._at.pop(one, None), self._at.pop(other, None)
            if first is not None:
                self._at[other] = first
            if second is not None and direction.name == "SWAP":
                self._at[one] = second
        for request in before - {*self._at.values()}:
            running.leave(request)
            del self._output[request]
        if update.batch_size == 0:
            running.flush()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Second interface: a request enters a slot; whoever was there has left, and its tokens are still there."""
        if self._running is None or self._states is None:
            return False
        with self._running.lock:
            self._running.settle()
            if (old := self._at.pop(req_idx, None)) is not None:
                self._running.leave(old)
            request = self._request(sampling_params, int(self._states.prompt_len.np[req_idx]), "raw")
            if request is not None:
                self._at[req_idx] = request
                self._running.enter(request)
        return request is not None

    def apply_staged_writes(self) -> None:
        """Second interface, before each step."""
        if self._running is not None:
            with self._running.lock:
                self._running.settle()

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Holds the logits [n, V] of a step until its tokens are known; returns them as they are."""
        if self._running is not None:
            with self._running.lock:
                self._running.settle()
                if ctx is None:
                    self._hold_first(self._running, logits)
                else:
                    self._hold_second(self._running, logits, ctx)
        return logits

    def _hold_first(self, running: Running, logits: Tensor) -> None:
        counts = {row: len(self._output[request]) for row, request in self._at.items() if row < len(logits)}
        rows = self._in_step(running, counts)
        requests = [self._at[row] for row in rows]
        outputs = [self._output[request] for request in requests]

        def drawn(between_steps: bool) -> tuple[Tensor, list[int]] | None:
            """A list that has not grown belongs to a prompt that is still being read."""
            there = [i for i, row in enumerate(rows) if len(outputs[i]) > counts[row]]
            if not between_steps and len(there) < len(rows):
                return None
            return torch.tensor([outputs[i][counts[rows[i]]] for i in there], dtype=torch.int64), there

        if rows:
            running.hold(logits, rows, requests, drawn)

    def _hold_second(self, running: Running, logits: Tensor, ctx: Any) -> None:
        states, slots = self._states, ctx.idx_mapping_np.tolist()
        assert states is not None
        lengths = dict(zip(slots, ctx.seq_lens_upper_bound_np.tolist(), strict=False))
        for slot, request in self._at.items():
            if slot not in lengths:
                running.leave(request)
                continue
            request.left = None
            if request.prefix is None:
                request.prefix = states.all_token_ids.gpu[slot, : int(states.prefill_len.np[slot])].clone()
        read = [slot for slot in slots if slot in self._at and lengths[slot] >= states.prefill_len.np[slot]]
        kept = self._in_step(running, {slot: lengths[slot] - self._at[slot].prompt_len for slot in read})
        drawing = [slot for slot in slots if slot in kept]
        if not drawing:
            return
        pairs = torch.tensor([[slot, lengths[slot]] for slot in drawing], device=logits.device)

        def drawn(between_steps: bool) -> tuple[Tensor, list[int]] | None:
            slot, length = pairs.unbind(1)
            if not between_steps and bool((states.total_len.gpu[slot] <= length).any()):
                return None
            return states.all_token_ids.gpu[slot, length], [*range(len(drawing))]

        rows = {slot: row for row, slot in enumerate(slots)}
        running.hold(logits, [rows[slot] for slot in drawing], [self._at[slot] for slot in drawing], drawn)

    def _in_step(self, running: Running, counts: dict[int, int]) -> list[int]:
        """Rows or slots that are recorded in this step, ascending; `counts` says how long the responses are."""
        for place, count in counts.items():
            if self._at[place] in running and self._at[place].count != count:
                running.drop(self._at[place], "the engine took back tokens that it had sampled.")
        return sorted(place for place in counts if self._at[place] in running)

    def _request(self, params: Any, prompt_len: int, stage: str) -> Request | None:
        """A request that is to be recorded, or None."""
        if not wanted(params):
            return None
        if reason := unrecorded(params):
            self._say_once(reason)
            return None
        request = request_of(params, prompt_len, stage, self._longest)
        if few := list_too_short(request.sampling, self._recipe.k, f"k={{}} in VllmRecorder.to or {RECIPE}"):
            self._say_once(few, kind="top_k")
        return request

    def _say_once(self, text: str, kind: str = "") -> None:
        if (kind or text) not in self._said:
            self._said.add(kind or text)
            log.warning("%s", text)


def _check_engine(config: Any, *, first: bool) -> None:
    if getattr(config, "speculative_config", None) is not None:
        raise UsageError(
            "speculative decoding draws tokens from drafts, which a logits processor does not see",
            next_step="Record without speculative_config.",
        )
    if getattr(config, "watermark_config", None) is not None:
        raise UsageError("watermarking changes what is sampled after it was shown", next_step="Record without it.")
    if first and getattr(config.scheduler_config, "async_scheduling", False):
        raise UsageError(
            "asynchronous scheduling hides the last token of a response from logits processors of this model runner",
            next_step="Give LLM(..., async_scheduling=False), or vllm serve --no-async-scheduling.",
        )


def _writes(config: Any, *, first: bool) -> bool:
    """Whether this process records: one of those that share the work of a layer, or each its own rows."""
    if not first and getattr(config.parallel_config, "enable_batch_sharded_sampling", False):
        return True
    if config.parallel_config.tensor_parallel_size == 1:
        return True
    rank: int = importlib.import_module("vllm.distributed").get_tensor_model_parallel_rank()
    return rank == 0


def _folder() -> str:
    folder = os.environ.get(FOLDER, "")
    if not folder:
        raise UsageError(
            "no folder to record into",
            place=FOLDER,
            next_step=f'Pass VllmRecorder.to("rollouts/") to LLM, or set {FOLDER}=rollouts/ for vllm serve.',
        )
    return folder


def _recipe() -> Recipe:
    text = os.environ.get(RECIPE, "")
    try:
        return Recipe(*(int(one) for one in text.split(","))) if text else Recipe()
    except (ValueError, TypeError):
        raise UsageError(f"{text!r} is no recipe", place=RECIPE, next_step='Give "K,m,seed", as in 20,64,1.') from None
