"""The training side of a scoring run: its settings, the model that they name, and what identifies its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trm_audit import __version__
from trm_audit.errors import UsageError
from trm_audit.pipeline.selection import digest
from trm_audit.rollout import RolloutBatch, Sampling, TokenScores
from trm_audit.shards.rows import RowRules

if TYPE_CHECKING:
    from trm_audit.engine.model import TrainerModel
    from trm_audit.shards.logits import StoredLogits


@dataclass(frozen=True)
class ScoreOptions:
    """Settings of a scoring run.

    Attributes:
        model: checkpoint folder, or None with `trainer_logprobs="stored"`.
        trainer_logprobs: `model`, or `stored` to take the trainer's own values from the rollouts.
        device, dtype, head_dtype: see `engine.model.TrainerModel`.
        vocab_size: cut both sides to the first n tokens; None keeps all and refuses other sizes.
        max_tokens: padded tokens of one forward; None is 4,096 on a CPU and 16,384 on a GPU.
        head_rows: positions whose logits exist at once.
        columns: ours -> theirs.
        defaults: sampling settings of rows that do not state them; mode_given says that its mode is meant.
        trainer_version: for staleness.
        logits: side files with full logits for input that has none beside it (a stream).
        limit, sample, part: which rows (see `pipeline.selection`) and which shards.
        skip_bad: go on without bad rows and shards.
        overwrite: replace another run's output.
    """

    model: Path | None = None
    trainer_logprobs: str = "model"
    device: str = "auto"
    dtype: str = "auto"
    head_dtype: str = "auto"
    vocab_size: int | None = None
    max_tokens: int | None = None
    head_rows: int = 128
    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Sampling = field(default_factory=Sampling)
    mode_given: bool = False
    trainer_version: int | None = None
    logits: tuple[Path, ...] = ()
    limit: int | None = None
    sample: float = 1.0
    part: tuple[int, int] = (1, 1)
    skip_bad: bool = False
    overwrite: bool = False


class Trainer:
    """The training side of a run: a loaded model, or the rollouts' own stored log-probabilities.

    Raises:
        UsageError: both or neither were asked for.
        BadInput: the checkpoint cannot be used.
    """

    def __init__(self, options: ScoreOptions) -> None:
        stored = options.trainer_logprobs == "stored"
        if stored == (options.model is not None):
            raise UsageError("give either --model DIR or --trainer-logprobs stored")
        self.options = options
        self.model: TrainerModel | None = None
        self.identity: dict[str, object] = {"trainer_logprobs": options.trainer_logprobs}
        if options.model is not None:
            self._load(options.model)

    def _load(self, folder: Path) -> None:
        from trm_audit.engine.checkpoint import find_checkpoint
        from trm_audit.engine.model import TrainerModel

        checkpoint = find_checkpoint(folder)
        options = self.options
        self.model = TrainerModel(
            checkpoint,
            device=options.device,
            dtype=options.dtype,
            head_dtype=options.head_dtype,
            vocab_size=options.vocab_size,
        )
        self.max_tokens = options.max_tokens or (4096 if self.model.device.type == "cpu" else 16384)
        self.identity |= {
            "model": "/".join(folder.resolve().parts[-2:]),
            "model_hash": checkpoint.digest(),
            "model_type": checkpoint.config["model_type"],
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "head_dtype": str(self.model.head_dtype).removeprefix("torch."),
            "vocab_size": self.model.vocab_size,
            "max_tokens": self.max_tokens,
            "head_rows": options.head_rows,
        }

    def run(self) -> dict[str, object]:
        """What made the scores: goes into run.json and footers, and identifies the run."""
        options = self.options
        settings = {
            "trm_audit": __version__,
            **self.identity,
            "columns": dict(options.columns),
            "defaults": asdict(options.defaults),
            "trainer_version": options.trainer_version,
            "limit": options.limit,
            "sample": options.sample,
        }
        told_apart = {name: value for name, value in settings.items() if name != "model"}  # its hash does that
        return {"kind": "scores", "fingerprint": digest(told_apart), **settings}

    def rules(self, logits: StoredLogits | None, duplicates: Mapping[str, tuple[str, int]]) -> RowRules:
        return RowRules(
            vocab_size=None if self.model is None else self.model.vocab_size,
            logits=logits,
            wider_logits=self.options.vocab_size is not None,
            defaults=self.options.defaults,
            mode_given=self.options.mode_given,
            stored_trainer=self.model is None,
            duplicates=duplicates,
        )

    def score(self, batch: RolloutBatch, logits: StoredLogits | None) -> TokenScores:
        from trm_audit.engine.scorer import Scorer, score_stored

        if self.model is None:
            return score_stored(batch)
        options = self.options
        return Scorer(self.model, logits, max_tokens=self.max_tokens, head_rows=options.head_rows).score(batch)
