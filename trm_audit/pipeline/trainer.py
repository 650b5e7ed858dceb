"""The training side of a scoring run: its settings, the model that they name, and what identifies its scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from trm_audit import __version__
from trm_audit.errors import UsageError
from trm_audit.pipeline.selection import digest
from trm_audit.rollout import RolloutBatch, Sampling, TokenScores
from trm_audit.shards.publish import told_apart
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
        devices: score shards side by side, a process for each of these; () scores on `device` in this process.
        device_map: `auto` spreads the model over all GPUs; None keeps it on `device`.
        sharing: how prefixes common to several rollouts are scored once: `auto`, `tree`, `fork`, `packed`, `padded`.
        batch_invariant: constant shapes, so that scores do not depend, to the bit, on who shared a batch with whom.
        compile: torch.compile of the decoder layers.
        noise_floor: share of the rollouts that the noise of the precision is measured on, None is a few; 0 measures
            nothing, neither noise nor what other evidence would decide.
        vocab_size: cut both sides to the first n tokens; None keeps all and refuses other sizes.
        max_tokens: tokens of one forward, padding counted; None is 4,096 on a CPU and 16,384 on a GPU.
        head_rows: positions whose logits exist at once.
        confidence: that the bounds from sketches hold at all positions of a sequence, in (0, 1).
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
    devices: tuple[str, ...] = ()
    device_map: str | None = None
    dtype: str = "auto"
    head_dtype: str = "auto"
    sharing: str = "auto"
    batch_invariant: bool = False
    compile: bool = False
    noise_floor: float | None = None
    vocab_size: int | None = None
    max_tokens: int | None = None
    head_rows: int = 128
    confidence: float = 0.95
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

    def on_one_device(self, device: str | None = None) -> ScoreOptions:
        """The same for a single process, on this device or the first that is named."""
        return replace(self, devices=(), device=device or (*self.devices, self.device)[0])

    def check(self) -> None:
        """Raises UsageError where settings contradict each other."""
        if (self.trainer_logprobs == "stored") == (self.model is not None):
            raise UsageError("give either --model DIR or --trainer-logprobs stored")
        if not 0 < self.confidence < 1:
            raise UsageError(f"--confidence {self.confidence:g} is not between 0 and 1, as 0.95")
        if self.batch_invariant and self.sharing not in ("auto", "padded"):
            raise UsageError(
                f"--batch-invariant pads every sequence to the same shape, --sharing {self.sharing} does not",
                next_step="Leave one of them out.",
            )
        if self.devices and (self.device != "auto" or self.device_map):
            other = "--device-map" if self.device_map else "--device"
            raise UsageError(f"--devices and {other} exclude each other", next_step="Leave one of them out.")
        if len({device.partition(":")[0] for device in self.devices}) > 1:
            raise UsageError(
                f"--devices {','.join(self.devices)}: scores of unlike devices are not those of one run",
                next_step="Name GPUs only, or cpu only.",
            )
        if self.device_map and find_spec("accelerate") is None:
            raise UsageError(
                "--device-map needs accelerate, which is not installed", next_step="pip install accelerate"
            )


class Trainer:
    """The training side of a run: a loaded model, or the rollouts' own stored log-probabilities.

    Raises:
        UsageError: settings that contradict each other (`ScoreOptions.check`).
        BadInput: the checkpoint cannot be used.

    Attributes:
        model: None where stored values stand in for it.
        remarks: sentences that a user should read before the first shard.
        noise: what `measure_noise` found, None before and where there is nothing to measure.
        worth: what `measure_worth` found, likewise.
    """

    def __init__(self, options: ScoreOptions) -> None:
        options.check()
        self.options = options
        self.model: TrainerModel | None = None
        self.remarks: list[str] = []
        self.noise: Mapping[str, object] | None = None
        self.worth: Mapping[str, object] | None = None
        self.identity: dict[str, object] = {"trainer_logprobs": options.trainer_logprobs, "sharing": None}
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
            device_map=options.device_map,
            dtype=options.dtype,
            head_dtype=options.head_dtype,
            vocab_size=options.vocab_size,
            sharing=options.sharing,
            batch_invariant=options.batch_invariant,
            compile=options.compile,
            max_tokens=options.max_tokens,
        )
        sharing = self.model.sharing
        self.remarks.append(sharing.sentence())
        self.identity |= {
            "model": "/".join(folder.resolve().parts[-2:]),
            "model_hash": checkpoint.digest(),
            "model_type": checkpoint.config["model_type"],
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "head_dtype": str(self.model.head_dtype).removeprefix("torch."),
            "vocab_size": self.model.vocab_size,
            "max_tokens": self.model.max_tokens,
            "head_rows": options.head_rows,
            "batch_invariant": options.batch_invariant,
            "compile": options.compile,
            "device_map": options.device_map,
            "sharing": {"rung": sharing.rung, "check": sharing.check, "refused": dict(sharing.refused)},
        }

    @property
    def is_noisy(self) -> bool:
        """Whether there is a noise of the precision, and it is to be measured."""
        return self.model is not None and self.options.noise_floor != 0 and self.identity["dtype"] != "float32"

    @property
    def weighs_evidence(self) -> bool:
        """Whether it can be measured what other evidence would decide, and it is to be."""
        return self.model is not None and self.options.noise_floor != 0

    @property
    def shares(self) -> bool:
        """Whether a prefix that rows of a batch have in common is computed once."""
        return self.model is not None and self.model.sharing.rung in ("tree", "fork")

    def measure_noise(self, batches: Iterable[RolloutBatch]) -> None:
        """Measures how far the precision of this run moves its scores; what is found goes into `run`.

        Args:
            batches: rollouts to measure on (see `pipeline.noise`).
        """
        from trm_audit.engine.noise import noise_floor

        assert self.model is not None
        found = noise_floor(self.model, batches, head_rows=self.options.head_rows)
        if found is not None:
            self.noise = found.to_json()
            kl = found.float32.kl
            self.remarks.append(
                f"noise floor of {self.identity['dtype']} on {found.num_rollouts:,} rollouts ({found.num_tokens:,} "
                f"tokens): kl mean {kl.mean:.1e}, p99 {kl.p99:.1e}, max {kl.max:.1e} against float32"
            )

    def measure_worth(self, rollouts: Iterable[tuple[RolloutBatch, StoredLogits | None]]) -> None:
        """Measures what evidence of other kinds would decide; what is found goes into `run`.

        Args:
            rollouts: to measure on, with the stored logits of their shard (see `pipeline.worth`).
        """
        from trm_audit.engine.worth import evidence_worth

        assert self.model is not None
        options = self.options
        found = evidence_worth(self.model, rollouts, head_rows=options.head_rows, confidence=options.confidence)
        self.worth = None if found is None else found.to_json()

    def run(self) -> dict[str, object]:
        """What made the scores: goes into run.json and footers, and identifies the run."""
        options = self.options
        settings = {
            "trm_audit": __version__,
            **self.identity,
            "columns": dict(options.columns),
            "defaults": asdict(options.defaults),
            "trainer_version": options.trainer_version,
            "confidence": options.confidence,
            "limit": options.limit,
            "sample": options.sample,
            "noise_floor": self.noise,
            **({} if self.worth is None else {"evidence_worth": self.worth}),
        }
        return {"kind": "scores", "fingerprint": digest(told_apart(settings)), **settings}

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
        if self.model is None:
            from trm_audit.engine.stored import score_stored

            return score_stored(batch)
        from trm_audit.engine.scorer import Scorer

        options = self.options
        return Scorer(self.model, logits, head_rows=options.head_rows, confidence=options.confidence).score(batch)
