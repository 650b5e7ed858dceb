"""The rows of one batch as `pack` writes them: columns for what is kept of their full logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trm_audit.engine.footing import comparison
from trm_audit.engine.packing import Arrays, Target, is_rounded, kept_of, stored_pieces
from trm_audit.errors import BadInput, RowError
from trm_audit.numerics.ragged import Bools, Floats, Ints, segment_sum
from trm_audit.pipeline.pack_lists import LISTS, cut_lists, list_lengths, rounded_type
from trm_audit.rollout import GRADES, RolloutBatch, Sampling
from trm_audit.shards.lists import Lists, list_arrays, made_lists
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.schema import ROLLOUT_COLUMNS
from trm_audit.shards.sketches import sketch_columns

if TYPE_CHECKING:
    import torch

SKETCH = (
    "rollout_sketch",
    "rollout_tail_mass",
    "rollout_entropy",
    "sketch_dim",
    "sketch_seed",
    "sketch_vocab_size",
)
EVIDENCE = ("rollout_logprobs", *LISTS, *SKETCH)
"""Columns whose bytes are counted."""
DROPPED = {"sampled": (*LISTS, *SKETCH), "topk": SKETCH, "sketch": (), "q16": ()}
STORED = "rollout_logprobs_stored"


def changes_stage(sampling: Sampling) -> bool:
    """Whether pi_roll has yet to be made of stored full logits, so that the tokens get other log-probabilities."""
    return comparison(sampling, "exact").rebuild is not None


@dataclass
class Side:
    """A file of full logits that is being written.

    Attributes:
        writer: of the file.
        rollouts: name -> (tokens, place) of those in it.
        bad: name -> why a rollout is not, or only in part.
    """

    writer: LogitsTableWriter
    rollouts: dict[str, tuple[int, str]] = field(default_factory=dict)
    bad: dict[str, RowError] = field(default_factory=dict)


@dataclass
class Packed:
    """What became of some rows.

    Attributes:
        columns: to write.
        packed: rows whose evidence is another now.
        left: rows with policy tokens whose evidence is as it was.
        num_tokens: policy tokens of packed rows.
        bytes_before, bytes_after: evidence of packed rows.
        tail_mass: [tokens] what the lists leave out that were made of full logits.
    """

    columns: pa.RecordBatch
    packed: int
    left: int
    num_tokens: int
    bytes_before: int
    bytes_after: int
    tail_mass: Floats


class Packer:
    """Packs batches of one shard.

    Args:
        target: what to.
        device: where it is computed.
        vocab_size: columns of stored logits that count, None for all.
        restages: rows may get other log-probabilities, so that there is a column for those that were stored.
        side: for q16, where logits go.
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        *,
        vocab_size: int | None = None,
        restages: bool = True,
        side: Side | None = None,
    ) -> None:
        self._target, self._device, self._vocab_size = target, device, vocab_size
        self._restages, self._side = restages, side

    def pack(self, batch: RolloutBatch, as_read: pa.Schema, logits: StoredLogits | None) -> Packed:
        """Packs checked rows.

        Args:
            batch: the rows.
            as_read: their columns' types before these became canonical: how far log-probabilities are rounded.
            logits: that belong to them.

        Raises:
            RowError: a row's logits are not what they have to be.
        """
        packed = np.array([self._changes(batch, row) for row in range(len(batch))], dtype=np.bool_)
        kept = [self._kept(batch, row, logits) if packed[row] else None for row in range(len(batch))]
        columns = self._columns(batch, packed, kept, as_read, logits)
        mine = np.flatnonzero(packed)
        before, after = self._logits_bytes(batch, mine, logits)
        num_tokens = segment_sum(batch.response_mask.astype(np.float64), batch.response.offsets)
        tails = [row["tail_mass"] for row in kept if row is not None and "tail_mass" in row]
        return Packed(
            columns=columns,
            packed=len(mine),
            left=int(((num_tokens > 0) & ~packed).sum()),
            num_tokens=int(num_tokens[mine].sum()),
            bytes_before=before + _evidence_bytes(batch.columns, mine),
            bytes_after=after + _evidence_bytes(columns, mine),
            tail_mass=np.concatenate([np.zeros(0), *tails]).astype(np.float64),
        )

    def _changes(self, batch: RolloutBatch, row: int) -> bool:
        """Whether a row has more than it is to keep."""
        grade = batch.grade[row]
        if grade is None or grade == "exact":
            return grade is not None
        if self._target.kind == "topk" and grade == "interval":
            return int(list_lengths(batch, row).max()) > self._target.recipe.k
        return GRADES.index(grade) < GRADES.index(self._target.grade)

    def _kept(self, batch: RolloutBatch, row: int, logits: StoredLogits | None) -> Arrays | None:
        """What is computed of a row's full logits; None where there is nothing to compute."""
        if batch.grade[row] != "exact":
            return None
        assert logits is not None
        if self._side is not None:
            self._rewrite(batch, row, logits, self._side)
            return None
        if self._target.kind == "sampled" and not self._restaged(batch, row):
            return None
        return kept_of(logits, batch, row, self._target, self._device, self._vocab_size)

    def _rewrite(self, batch: RolloutBatch, row: int, logits: StoredLogits, side: Side) -> None:
        name, length = batch.rollout_id[row], int(batch.response.lengths[row])
        if name in side.rollouts:  # in an attempt that another row ended
            return
        if name in side.bad:
            raise side.bad[name]
        try:
            for start, rows in stored_pieces(logits, name, length, self._vocab_size):
                side.writer.add(name, rows, start=start)
        except BadInput as error:
            place = error.place if isinstance(error, RowError) else batch.place(row)
            side.bad[name] = RowError(error.cause, place=place, next_step=error.next_step)
            raise side.bad[name] from error
        side.rollouts[name] = (length, batch.place(row))

    def _restaged(self, batch: RolloutBatch, row: int) -> bool:
        """Whether an exact row's tokens get log-probabilities that are not those stored."""
        start, stop = batch.response.offsets[row : row + 2]
        return changes_stage(batch.sampling[row]) or bool(np.isnan(batch.rollout_logprobs[start:stop]).all())

    def _logits_bytes(self, batch: RolloutBatch, rows: Ints, logits: StoredLogits | None) -> tuple[int, int]:
        """Stored full logits of some rows, before and after."""
        names = [batch.rollout_id[row] for row in rows.tolist()]
        before = sum(logits.num_bytes(name) for name in names) if logits is not None else 0
        if self._side is None or logits is None:
            return before, 0
        widths = [min(logits.vocab_size(name), self._vocab_size or logits.vocab_size(name)) for name in names]
        return before, sum(_q16_bytes(batch, row, width) for row, width in zip(rows.tolist(), widths, strict=True))

    def _columns(
        self,
        batch: RolloutBatch,
        packed: Bools,
        kept: Sequence[Arrays | None],
        as_read: pa.Schema,
        logits: StoredLogits | None,
    ) -> pa.RecordBatch:
        """The rollouts' columns with what is kept in place of what there was."""
        out = {name: batch.columns.column(name) for name in batch.columns.schema.names}
        for name in DROPPED[self._target.kind]:
            out.pop(name, None)
        out |= _sampling_columns(batch, [row is not None for row in kept])
        masks = [_of_row(batch, row, batch.response_mask) for row in range(len(batch))]
        if self._target.kind == "sketch":
            made = sketch_columns(kept, masks)
            out |= {name: _instead(made[name], out.get(name), packed) for name in (*LISTS, *SKETCH)}
        elif self._target.kind == "topk":
            out |= self._list_columns(batch, packed, kept, rounded_type(as_read))
        elif self._target.kind == "q16" and LISTS[1] in out:
            out[LISTS[1]] = pc.cast(out[LISTS[1]], rounded_type(as_read))
        if self._target.kind != "q16":
            values = [self._logprobs(batch, row, mine, logits) for row, mine in enumerate(kept)]
            self._put_logprobs(out, values, masks)
        return pa.RecordBatch.from_pydict(out)

    def _logprobs(
        self, batch: RolloutBatch, row: int, kept: Arrays | None, logits: StoredLogits | None
    ) -> NDArray[Any] | None:
        """Other log-probabilities of a row's policy tokens than those stored; None where these stay.

        They are those of pi_roll where the stored ones are of an earlier stage, or not there. They are also those of
        the packed distribution where a list is made of logits of less than float32 precision and the stored value
        agrees with these: the engine computed the value before they were rounded, so beside the list, which is of the
        rounded ones, it would be off by more than the list's own rounding, and be counted as a disagreement. This way
        list and value are of one distribution. A value that disagrees stays, and still does.
        """
        if kept is None or logits is None:
            return None
        if self._restaged(batch, row):
            return kept["logprobs"]
        if "topk_ids" not in kept or not is_rounded(logits, batch.rollout_id[row]):
            return None
        given = _of_row(batch, row, batch.rollout_logprobs)[_of_row(batch, row, batch.response_mask)]
        agrees = np.abs(given - kept["logprobs"]) <= kept["tolerance"]
        return np.where(agrees, kept["logprobs"], given) if agrees.any() else None

    def _put_logprobs(
        self, out: dict[str, pa.Array], values: Sequence[NDArray[Any] | None], masks: Sequence[Bools]
    ) -> None:
        """Other values of some rows in place of the stored ones, which are kept."""
        new = np.array([row is not None for row in values], dtype=np.bool_)
        spread = [None if row is None else _spread(row, mask) for row, mask in zip(values, masks, strict=True)]
        stored = out.get("rollout_logprobs")
        made = pa.array(spread, ROLLOUT_COLUMNS["rollout_logprobs"].type)
        out["rollout_logprobs"] = _instead(made, stored, new)
        if self._restages and stored is not None:
            out[_free(STORED, out)] = pc.if_else(pa.array(new), stored, None)

    def _list_columns(
        self, batch: RolloutBatch, packed: Bools, kept: Sequence[Arrays | None], kind: pa.DataType
    ) -> dict[str, pa.Array]:
        """Lists of K, made of full logits or cut from longer ones."""
        rows: list[Lists | None] = []
        for row, mine in enumerate(kept):
            if mine is not None:
                rows.append(made_lists(mine, _of_row(batch, row, batch.response_mask)))
            elif batch.topk is not None and list_lengths(batch, row).any():
                rows.append(cut_lists(batch, row, self._target.recipe.k if packed[row] else None))
            else:
                rows.append(None)
        return dict(zip(LISTS, list_arrays(rows, kind), strict=True))


def _sampling_columns(batch: RolloutBatch, made: Sequence[bool]) -> dict[str, pa.Array]:
    """What each row was sampled with, defaults written out; what was made of full logits is of pi_roll itself."""

    def column(name: str, value: Callable[[Sampling], object]) -> pa.Array:
        return pa.array([value(sampling) for sampling in batch.sampling], ROLLOUT_COLUMNS[name].type)

    stages = [
        "processed" if new else sampling.logprobs_mode for new, sampling in zip(made, batch.sampling, strict=True)
    ]
    return {
        "temperature": column("temperature", lambda one: one.temperature),
        "top_p": column("top_p", lambda one: one.top_p),
        "top_k": column("top_k", lambda one: one.top_k),
        "logprobs_mode": pa.array(stages, pa.string()),
    }


def _instead(new: pa.Array, old: pa.Array | None, where: Bools) -> pa.Array:
    """`new` in some rows, `old` in the others."""
    return new if old is None else pc.if_else(pa.array(where), new, pc.cast(old, new.type, safe=False))


def _spread(values: NDArray[Any], mask: Bools) -> NDArray[np.float32]:
    """Values of policy tokens over all response tokens, 0 elsewhere."""
    out = np.zeros(len(mask), dtype=np.float32)
    out[mask] = np.minimum(values, 0)
    return out


def _of_row(batch: RolloutBatch, row: int, values: NDArray[Any]) -> NDArray[Any]:
    return values[batch.response.offsets[row] : batch.response.offsets[row + 1]]


def _free(name: str, taken: dict[str, pa.Array]) -> str:
    while name in taken:
        name += "_stored"
    return name


def _evidence_bytes(columns: pa.RecordBatch, rows: Ints) -> int:
    names = [name for name in EVIDENCE if name in columns.schema.names]
    return sum(columns.column(name).take(pa.array(rows, pa.int64())).nbytes for name in names)


def _q16_bytes(batch: RolloutBatch, row: int, width: int) -> int:
    from trm_audit.shards.q16 import row_bytes

    return int(batch.response.lengths[row]) * row_bytes(width)
