"""(d) trm-audit's own scorer, whole and with one of its parts switched off at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq

from bench.baselines import NotMeasured, Scores
from bench.material import Material
from trm_audit.engine.model import TrainerModel
from trm_audit.engine.scorer import Scorer
from trm_audit.numerics.rows import torch_only
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.rows import RowRules, read_rows


@dataclass(frozen=True)
class Settings:
    """One variant.

    Attributes:
        sharing: rung of the ladder; None for the one that the start-up check chose.
        compiled: compiled divergence kernels; otherwise torch, a few rows at a time.
        read_ahead: stored logits are read while the model computes.
    """

    sharing: str | None = None
    compiled: bool = True
    read_ahead: bool = True


VARIANTS = {
    "ours": Settings(),
    "ours-packed": Settings(sharing="packed"),
    "ours-padded": Settings(sharing="padded"),
    "ours-torch": Settings(compiled=False),
    "ours-no-read-ahead": Settings(read_ahead=False),
}


class Ours:
    """The scorer on one workload, from opening the shard to the last figure.

    Args:
        trainer: the loaded model, with its budget of tokens.
        material: what is scored.
        mode: `sampled`, `top64` or `full`.
        settings: which variant.
        head_rows: positions that go through the head at once.
    """

    def __init__(
        self, trainer: TrainerModel, material: Material, mode: str, settings: Settings, *, head_rows: int
    ) -> None:
        self.trainer, self.material, self.mode, self.settings = trainer, material, mode, settings
        self.head_rows = head_rows

    def __call__(self) -> Scores:
        shard = self.material.folder / self.mode / "rollouts.parquet"
        logits = StoredLogits([self.material.logits_file()]) if self.mode == "full" else None
        (rows,) = pq.read_table(shard).combine_chunks().to_batches()
        rules = RowRules(vocab_size=self.trainer.vocab_size, logits=logits)
        batch, faults = read_rows(rows, shard.name, np.arange(rows.num_rows), rules)
        for fault in faults:
            raise fault
        with taking(self.trainer, self.settings.sharing), nullcontext() if self.settings.compiled else torch_only():
            scorer = Scorer(self.trainer, logits, head_rows=self.head_rows, read_ahead=self.settings.read_ahead)
            scores = scorer.score(batch).tokens
        names = {"trainer_logprobs": "trainer_logprobs", "trainer_entropy": "trainer_entropy"}
        if self.mode == "full":
            names |= {name: name for name in ("kl", "tv", "rollout_entropy")}
        if self.mode == "top64":
            names["bucketed_kl"] = "kl_lower"
        return {name: scores[ours] for name, ours in names.items()}


@contextmanager
def taking(trainer: TrainerModel, rung: str | None) -> Iterator[None]:
    """The trainer on another rung inside the block; None leaves it where it is."""
    before = trainer.sharing
    if rung in before.refused:
        raise NotMeasured(f"{rung} is wrong for this model")
    trainer.sharing = replace(before, rung=rung or before.rung)
    try:
        yield
    finally:
        trainer.sharing = before
