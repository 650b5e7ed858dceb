"""Shared by the tests: a small random checkpoint, a scored folder, and the command line in this process."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from some_rollouts import VOCAB, rollout, write_shard, write_shards

from trm_audit import cli
from trm_audit.pipeline.score import ScoreOptions, score

# No test depends on how fast the machine is, and each worker of pytest has a core to itself (torch is not loaded yet).
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests press Ctrl-C on processes of their own, which would ignore it if a shell started this one in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, bytes on stdout, text on stderr."""

    code: int
    out: bytes
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `trm-audit ARGS...` through its entry point; `stdin` are the bytes piped into it."""

    def call(*args: object, stdin: bytes = b"") -> Outcome:
        out, err = io.BytesIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trm-audit", *map(str, args)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
            patch.setattr(sys, "stderr", err)
            try:
                cli.main()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            return Outcome(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a vocabulary of 32, as save_pretrained writes it."""
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny-llama", VOCAB)


def make_checkpoint(folder: Path, vocab_size: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exact_scores(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score folder of 3 shards of 8 exact rows, in groups of 4; row 5 has no policy token, row 9 is masked in part."""
    folder = tmp_path_factory.mktemp("exact")
    for k in range(3):
        rows = [rollout(i, "exact") for i in range(8 * k, 8 * k + 8)]
        for i, row in zip(range(8 * k, 8 * k + 8), rows, strict=True):
            length = len(row["response_ids"])
            row["response_mask"] = [i != 5 and not (i == 9 and t % 2) for t in range(length)]
            row["note"] = f"note {i}"
        write_shard(folder / "rollouts" / f"part-{k}.parquet", rows)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(model=checkpoint))
    return folder / "scores"


@pytest.fixture(scope="session")
def sampled_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score folder of 3 shards of 8 sampled rows whose trainer values came with the rollouts."""
    folder = tmp_path_factory.mktemp("sampled")
    for k in range(3):
        rows = [rollout(i) for i in range(8 * k, 8 * k + 8)]
        for i, row in enumerate(rows):
            row["trainer_logprobs"] = [value - 0.05 * (i % 4) for value in row["rollout_logprobs"]]
        write_shard(folder / "rollouts" / f"part-{k}.parquet", rows)
    score([str(folder / "rollouts")], str(folder / "scores"), ScoreOptions(trainer_logprobs="stored"))
    return folder / "scores"


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    """A fresh folder of 3 shards of 4 sampled rows with stored trainer values."""
    folder = write_shards(tmp_path / "rollouts", 0, 0)
    folder.mkdir(exist_ok=True)
    for k in range(3):
        rows = [rollout(i) for i in range(4 * k, 4 * k + 4)]
        write_shard(
            folder / f"part-{k}.parquet",
            [{**row, "trainer_logprobs": [v - 0.02 for v in row["rollout_logprobs"]]} for row in rows],
        )
    return folder
