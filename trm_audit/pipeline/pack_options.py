"""Settings of packing, and what a run of it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trm_audit import __version__
from trm_audit.engine.packing import Target as Target
from trm_audit.numerics.histogram import LogHistogram
from trm_audit.pipeline.pack_rows import Packed
from trm_audit.pipeline.selection import digest
from trm_audit.pipeline.trainer import ScoreOptions
from trm_audit.rollout import Sampling

if TYPE_CHECKING:
    from trm_audit.report.pack_tables import Loss

COUNTED = ("rows", "packed", "left", "num_tokens", "bytes_before", "bytes_after", "num_skipped", "num_copied", "kl_sum")

QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


@dataclass(frozen=True)
class PackOptions:
    """Settings of packing and of planning it.

    Attributes:
        to: what full logits become; planning tries many.
        model: checkpoint folder to measure with what is lost; None measures no verdicts.
        deltas: thresholds of the largest KL of a sequence at which verdicts are compared.
        measure: share of the groups that this is measured on, None for a few rollouts.
        device: where sketches are made and the model runs: auto, cpu or cuda[:i].
        dtype: precision of the model.
        vocab_size: columns of stored logits that count (padded vocabularies); None for all.
        max_tokens: tokens of one forward.
        confidence: that bounds from sketches hold at all positions of a sequence.
        columns: ours -> theirs.
        defaults: sampling settings of rows that do not state them; mode_given says that its mode is meant. They are
            written out, so that who reads the output need not give them again.
        skip_bad: go on without bad rows and shards.
        overwrite: replace another run's output.
    """

    to: Target = field(default_factory=lambda: Target("sketch"))
    model: Path | None = None
    deltas: tuple[float, ...] = (0.02, 0.05, 0.1)
    measure: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    vocab_size: int | None = None
    max_tokens: int | None = None
    confidence: float = 0.95
    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Sampling = field(default_factory=Sampling)
    mode_given: bool = False
    skip_bad: bool = False
    overwrite: bool = False

    def scoring(self) -> ScoreOptions:
        """The same for scoring what is compared."""
        return ScoreOptions(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            max_tokens=self.max_tokens,
            confidence=self.confidence,
            noise_floor=0.0,
            columns=self.columns,
            defaults=self.defaults,
            mode_given=self.mode_given,
        )

    def run(self) -> dict[str, object]:
        """What made the output: goes into run.json and footers, and identifies the run."""
        recipe = asdict(self.to.recipe) if self.to.kind == "sketch" else None
        settings = {
            "trm_audit": __version__,
            "to": str(self.to),
            "recipe": recipe,
            "vocab_size": self.vocab_size,
            "columns": dict(self.columns),
            "defaults": asdict(self.defaults),
        }
        return {"kind": "rollouts", "fingerprint": digest(settings), **settings}


@dataclass
class PackCounts:
    """What was packed.

    Attributes:
        rows: written.
        packed: rows whose evidence is another now; num_tokens their policy tokens, bytes_before and bytes_after what
            their evidence takes.
        left: rows with policy tokens that had nothing to pack.
        num_skipped: rows left out by `skip_bad`.
        num_copied, kl_sum, kl_max: positions written as q16, and KL(stored || copy) over them, in nats.
        tail_mass: of packed positions, what their lists leave out; not that of shards that were there before.
    """

    rows: int = 0
    packed: int = 0
    left: int = 0
    num_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    num_skipped: int = 0
    num_copied: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    tail_mass: LogHistogram = field(default_factory=LogHistogram)

    def add(self, counts: Mapping[str, object]) -> None:
        """Adds what a shard's footer counts."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + counts[name])
        self.kl_max = max(self.kl_max, float(str(counts["kl_max"])))

    def count(self, found: Packed) -> None:
        """Adds a batch."""
        self.rows += found.columns.num_rows
        for name in ("packed", "left", "num_tokens", "bytes_before", "bytes_after"):
            setattr(self, name, getattr(self, name) + getattr(found, name))
        self.tail_mass.add(found.tail_mass)

    def to_json(self) -> dict[str, object]:
        """For a footer."""
        return {name: getattr(self, name) for name in (*COUNTED, "kl_max")}


@dataclass
class PackResult(PackCounts):
    """What a packing run did. Figures are of all its shards, those that were there before included.

    Attributes:
        shards: published by this call; done: there before.
        bad_shards: left out by `skip_bad`.
        seconds: of packing.
        complete: every shard of the run is there.
        loss: against the exact figures, where a model was given and rows with full logits were there.
    """

    shards: int = 0
    done: int = 0
    bad_shards: int = 0
    seconds: float = 0.0
    complete: bool = False
    loss: Loss | None = None

    def sentences(self, options: PackOptions) -> list[str]:
        """What a user should read at the end."""
        out = []
        if self.done:
            out.append(f"{self.done:,} shards were there already")
        if self.num_tokens:
            before, after = self.bytes_before / self.num_tokens, self.bytes_after / self.num_tokens
            out.append(f"evidence of a token: {before:,.0f} bytes before, {after:,.0f} after")
        if self.num_copied:
            mean = self.kl_sum / self.num_copied
            out.append(
                f"KL(stored || q16) over {self.num_copied:,} positions: mean {mean:.1e}, at most {self.kl_max:.1e}"
            )
        if self.tail_mass.count:
            shown = ", ".join(f"{name} {self.tail_mass.quantile(q):.2g}" for name, q in QUANTILES.items())
            out.append(f"probability outside the lists: {shown}")
        if self.left:
            nothing = "no full logits" if options.to.kind in ("sketch", "q16") else "no more than that"
            out.append(f"{self.left:,} rollouts have {nothing} and are left as they are")
        if self.num_skipped or self.bad_shards:
            out.append(f"left out {self.num_skipped:,} rows and {self.bad_shards:,} shards")
        if self.packed and options.model is None and options.to.kind != "q16":
            out.append("what verdicts and bounds lose by that is measured with --model CKPT")
        return out
