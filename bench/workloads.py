"""What is scored: synthetic trajectories of the shapes that training runs have, from a fixed seed. Holds no tensor.

A trajectory is one sequence of token ids with spans that the policy wrote; each span is stored as one rollout whose
prompt is everything before it. With a single span that is a plain prompt and response; with ten it is an agent that
reads an observation and acts, one row per turn, whose prompts contain each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGMA = 0.7
"""Of the logarithm of response and turn lengths."""


@dataclass(frozen=True)
class Workload:
    """The shape of one group of rollouts, in tokens before `--scale`.

    Attributes:
        prompt: length of the prompt, the same in every group.
        response: mean length of what the policy writes, per turn.
        observation: mean length of what is read before each turn beyond the prompt.
        turns: rows of one trajectory.
        trajectories: of one group.
        shared: whether the trajectories of a group begin with the same prompt.
    """

    prompt: int
    response: int
    observation: int = 0
    turns: int = 1
    trajectories: int = 16
    shared: bool = True


WORKLOADS = {
    "W1": Workload(256, 1024),
    "W2": Workload(2048, 1024),
    "W3": Workload(8192, 512),
    "W4": Workload(2048, 300, observation=500, turns=10, trajectories=2),  # 20 rows, next to 16 elsewhere
    "W5": Workload(256, 8192),
    "W6": Workload(256, 1024, shared=False),
}


@dataclass(frozen=True)
class Trajectory:
    """One sequence and the spans of it that are rollouts.

    Attributes:
        group: number of its group.
        ids: [n] int64 token ids.
        spans: (start, stop) of each rollout's response; its prompt is ids[:start].
    """

    group: int
    ids: NDArray[np.int64]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Work:
    """How much there is to do, for the limit and for the record.

    Attributes:
        rows: rollouts.
        tokens: of all rows, prompts counted as often as they are stored.
        response_tokens: of all rows.
        unique_tokens: positions of the prefix tree, each shared prefix once.
        attended: (query, key) pairs of those positions under causal attention.
    """

    rows: int
    tokens: int
    response_tokens: int
    unique_tokens: int
    attended: int


def lengths(rng: np.random.Generator, mean: float, n: int) -> NDArray[np.int64]:
    """[n] lognormal lengths (sigma 0.7), stretched so that their mean is `mean` up to rounding; each at least 1."""
    drawn = rng.lognormal(0, SIGMA, n)
    stretched: NDArray[np.float64] = np.rint(drawn * (mean / drawn.mean()))
    return np.maximum(stretched, 1).astype(np.int64)


def trajectories(workload: Workload, scale: float, groups: int, vocab_size: int, seed: int = 0) -> list[Trajectory]:
    """Some groups of a workload; ids are uniform, because what is timed does not depend on them."""
    rng = np.random.default_rng(seed)
    prompt_length = max(round(workload.prompt * scale), 1)
    out = []
    for group in range(groups):
        turns = workload.trajectories * workload.turns
        written = lengths(rng, workload.response * scale, turns).reshape(-1, workload.turns)
        read = np.zeros_like(written)
        if workload.observation:
            read = lengths(rng, workload.observation * scale, turns).reshape(-1, workload.turns)
        prompt = rng.integers(0, vocab_size, prompt_length)
        for i in range(workload.trajectories):
            if i and not workload.shared:
                prompt = rng.integers(0, vocab_size, prompt_length)
            stop = prompt_length + np.cumsum(read[i] + written[i])
            rest = rng.integers(0, vocab_size, int(stop[-1]) - prompt_length)
            spans = [(int(end - own), int(end)) for end, own in zip(stop, written[i], strict=True)]
            out.append(Trajectory(group, np.concatenate([prompt, rest]), spans))
    return out


def work(items: list[Trajectory]) -> Work:
    """Counts, with the last token of each row left out: nothing is predicted from it.

    The prefix tree is counted by its sorted rows: each adds what it does not share with the row before it.
    """
    rows = [item.ids[: stop - 1] for item in items for _, stop in item.spans]
    unique = attended = 0
    before = np.zeros(0, dtype=np.int64)
    for row in sorted(rows, key=lambda ids: ids.tolist()):
        n = min(len(row), len(before))
        differ = np.flatnonzero(row[:n] != before[:n])
        common = int(differ[0]) if len(differ) else n
        unique += len(row) - common
        attended += (len(row) * (len(row) + 1) - common * (common + 1)) // 2
        before = row
    response_tokens = sum(stop - start for item in items for start, stop in item.spans)
    return Work(len(rows), sum(map(len, rows)), response_tokens, unique, attended)
