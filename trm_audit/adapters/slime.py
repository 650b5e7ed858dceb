"""slime and miles: `.pt` files of `--save-debug-rollout-data` and of `--save-debug-train-data`.

    {"rollout_id", "samples": [Sample.to_dict()]}               what was sampled
    {"format_version": 2, "rollout_id", "samples": [...], ...}  slime: what was trained on, with the trainer's values
    {"rollout_id", "rank", "rollout_data": {column: [...]}}     miles, older slime: likewise, one rank of it

`tokens` is prompt and response; everything else per token is of the response alone. The `.pt` is opened with
`weights_only`: numbers, strings, tensors and plain arrays come through, other classes would run code and are refused.
Both projects sample with SGLang, whose log-probabilities are after temperature and before top-p and top-k.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trm_audit.adapters.base import Given, Row, Source
from trm_audit.adapters.trainer_rows import both_sides, integers, need, one_value, policy_values, sampling
from trm_audit.errors import BadInput

FINISH = {"completed": "stop", "truncated": "length"}
IDS = "Give the .pt of --save-debug-rollout-data or --save-debug-train-data: it has the tokens."


def read(path: Path, given: Given) -> Iterator[Row]:
    """Rows of one `.pt`, in its order.

    Raises:
        BadInput: the file is none of the three kinds, or holds objects that are not opened.
    """
    payload = load(path)
    if not isinstance(payload, dict) or not {"samples", "rollout_data"} & set(payload):
        raise BadInput(
            "holds neither samples nor rollout_data",
            place=str(path),
            next_step="--save-debug-rollout-data and --save-debug-train-data of slime and miles write what is read.",
        )
    trained = "rollout_data" in payload or "format_version" in payload
    samples = payload["samples"] if "samples" in payload else _rows_of(payload["rollout_data"])
    stem = str(payload["rollout_id"]) if trained else path.stem
    raw = payload.get("raw_reward", payload.get("rollout_data", {}).get("raw_reward"))
    times: dict[object, int] = {}
    for at, sample in enumerate(samples):
        place = f"{path}, sample {at}"
        index = sample.get("sample_index" if trained else "index")
        name = name_of(stem, index, at, times)
        row = _trained(sample, raw, place, given) if trained else sampled(sample, stem, place, given)
        yield {"rollout_id": name, **row}


def load(path: Path) -> Any:
    """A `.pt` without running code from it.

    Raises:
        BadInput: it is damaged, or holds objects of other classes than numbers, strings, tensors and arrays.
    """
    import torch

    try:
        with torch.serialization.safe_globals(_arrays()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise BadInput(
            f"holds an object of {found[1] if found else 'a class'} that is not plain data; it is not opened, because "
            "a pickle can run code",
            place=str(path),
            next_step="Keep numbers, strings, lists and tensors in Sample.metadata, or write rollouts from inside the "
            "trainer (docs/export_snippets.md).",
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"cannot be read as a .pt file: {reason}", place=str(path)) from error


def _arrays() -> list[Any]:
    """What NumPy arrays and scalars of numbers are rebuilt with, under the names of NumPy 1 and 2."""
    array, scalar = np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]
    names = [
        (made, f"numpy.{core}.multiarray.{name}")
        for made, name in ((array, "_reconstruct"), (scalar, "scalar"))
        for core in ("core", "_core")
    ]
    return [*names, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


def name_of(stem: str, index: object, at: int, times: dict[object, int]) -> str:
    """`stem/index`, which a rollout that was split into several samples shares: those after the first get a number."""
    if index is None:
        return f"{stem}/row{at}"
    times[index] = times.get(index, 0) + 1
    return f"{stem}/{index}" if times[index] == 1 else f"{stem}/{index}.{times[index] - 1}"


def _rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns of one rank as rows; what is not per sample is left behind."""
    count = len(columns.get("tokens", ()))
    whole = [key for key, value in columns.items() if isinstance(value, list | tuple) and len(value) == count]
    names = {"sample_indices": "sample_index", "partition": "rollout_position"}
    return [{names.get(key, key): columns[key][at] for key in whole} for at in range(count)]


def sampled(sample: Mapping[str, Any], stem: str, place: str, given: Given) -> Row:
    """A row of a rollout dump."""
    need(sample, ("tokens", "response_length"), place, "a dump of slime or miles", IDS)
    ids, count = integers(sample["tokens"]), int(sample["response_length"])
    mask = _mask(sample.get("loss_mask"), count, given)
    if sample.get("remove_sample"):
        given.assume("Samples with remove_sample are not trained on: none of their tokens is, and they count in N.")
        mask = [False] * count
    versions = [str(version) for version in sample.get("weight_versions") or ()]
    group, reward = sample.get("group_index"), sample.get("reward")
    if isinstance(reward, dict):
        given.assume("Rewards that are a dict have no single value; the column is null.")
    return {
        **_tokens(ids, count, place),
        "response_mask": mask,
        "rollout_logprobs": policy_values(_list(sample.get("rollout_log_probs")), mask, given),
        "routed_experts": _experts(sample.get("rollout_routed_experts"), place),
        "group_id": None if group is None else f"{stem}/{group}",
        "reward": None if reward is None or isinstance(reward, dict) else float(reward),
        "policy_version": _version(versions, given),
        "weight_versions": ",".join(versions),
        "finish_reason": FINISH.get(sample.get("status", ""), sample.get("status")),
        "engine": "sglang",
        **_settings(sample, given, place),
    }


def _trained(sample: Mapping[str, Any], raw: Any, place: str, given: Given) -> Row:
    """A row of a train dump: names are those of the trainer's columns."""
    need(sample, ("tokens", "response_lengths", "loss_masks"), place, "a dump of slime or miles", IDS)
    ids, count = integers(sample["tokens"]), int(sample["response_lengths"])
    mask = _mask(sample["loss_masks"], count, given)
    position = sample.get("rollout_position")
    reward = raw[int(position)] if raw is not None and position is not None else None
    advantage = {}
    if sample.get("advantages") is not None:
        advantage = {"advantage": one_value(_list(sample["advantages"]), mask, "Advantages", given)}
    return {
        **_tokens(ids, count, place),
        "response_mask": mask,
        **both_sides(_list(sample.get("rollout_log_probs")), _list(sample.get("log_probs")), mask, given),
        "routed_experts": _experts(sample.get("rollout_routed_experts"), place),
        "reward": float(reward) if isinstance(reward, int | float) else None,
        **advantage,
        "finish_reason": "length" if sample.get("truncated") else None,
        "engine": "sglang",
        **_settings(sample, given, place),
    }


def _tokens(ids: Any, count: int, place: str) -> Row:
    """Prompt and response of one list of ids."""
    if not 0 <= count <= len(ids):
        raise BadInput(f"has {len(ids)} tokens and a response of {count}", place=place)
    return {"prompt_ids": ids[: len(ids) - count].tolist(), "response_ids": ids[len(ids) - count :].tolist()}


def _mask(found: Any, count: int, given: Given) -> list[bool]:
    """`loss_mask` as a response mask: slime keeps no other record of who wrote a token."""
    if found is None:
        return [True] * count
    mask = np.asarray(found).astype(np.bool_).tolist()
    if not all(mask):
        given.assume("Tokens with loss_mask 0 (tools, or what the trainer leaves out) are taken for not sampled.")
    return list(mask)


def _list(values: Any) -> list[Any] | None:
    """A list, an array or a tensor as a list."""
    return None if values is None else values.tolist() if hasattr(values, "tolist") else list(values)


def _experts(found: Any, place: str) -> list[Any] | None:
    """Routed experts [positions, layers, k]."""
    if found is None:
        return None
    array = np.asarray(found)
    if array.ndim != 3:
        raise BadInput(
            f"rollout_routed_experts has {array.ndim} dimensions, [positions, layers, k] is needed", place=place
        )
    rows: list[Any] = array.tolist()
    return rows


def _version(versions: Sequence[str], given: Given) -> int | None:
    """The oldest of the weights that sampled a rollout: slime lists a version per call of the engine, not per token."""
    numbers = [int(version) for version in versions if version.isdecimal()]
    if not numbers or len(numbers) < len(versions):
        return None
    if len(set(numbers)) > 1:
        given.assume("Where several weight versions sampled one rollout, policy_version is the oldest of them.")
    return min(numbers)


def _settings(sample: Mapping[str, Any], given: Given, place: str) -> Row:
    """Sampling columns. A dump with nuclei to replay was truncated, and only the user knows how."""
    if sample.get("rollout_top_p_token_ids") is not None and None in (given.top_p, given.logprobs_mode):
        raise BadInput(
            "was sampled with top-p (rollout_top_p_token_ids), and does not say with which",
            place=place,
            next_step="State --top-p and --logprobs-mode: processed where the engine renormalises over the nucleus.",
        )
    return sampling(given, "tempered", "SGLang's log-probabilities are taken for those after temperature.")


SOURCE = Source(
    name="slime",
    about="the .pt of slime's and miles' --save-debug-rollout-data and --save-debug-train-data",
    suffixes=(".pt",),
    grade="sampled",
    switch_on="--save-debug-rollout-data PATH, or --save-debug-train-data PATH for the trainer's log-probabilities too",
    read=read,
)
