"""What other stored evidence would have decided, as the scoring measured it at its start (schemas/score.md).

Counted on some rollouts at a grid of thresholds. A report names the thresholds of the grid that are nearest to the
criterion's: delta_max for KL and, because no KL of delta permits more, sqrt(delta / 2) for TV (Pinsker's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trm_audit.errors import BadInput
from trm_audit.report.noise import distinct
from trm_audit.report.shown import number

DEFAULT_DELTA = 0.05
"""Of KL, where no criterion on KL or TV tells one."""
NAMED_LIST = "topk:64"
"""The list that the sentence names, otherwise the longest."""


@dataclass(frozen=True)
class Certain:
    """Share of verdicts on D <= delta that are certain: at the delta that is shown, and at each of the grid.

    Attributes:
        positions, sequences: of single positions, and of the sequences' largest D.
        positions_by_delta, sequences_by_delta: the same at `EvidenceWorth.deltas`.
    """

    positions: float
    sequences: float
    positions_by_delta: list[float]
    sequences_by_delta: list[float]


@dataclass(frozen=True)
class EvidenceKind:
    """One kind of evidence: what storing it takes, and what it decides."""

    bytes_per_token: int
    kl: Certain
    tv: Certain


@dataclass(frozen=True)
class EvidenceWorth:
    """What each kind of evidence would have decided, of several runs together.

    Attributes:
        num_rollouts, num_tokens: measured on.
        num_cut: rollouts of which only the first tokens were looked at.
        num_exact: rollouts whose own pi_roll was known; for the others the trainer's distribution stood in.
        confidence: of bounds from a sketch, of several runs the smallest.
        full_bytes: a token's full logits in two bytes each, with which every verdict is certain.
        deltas: thresholds of the grid, of KL in nats and of TV.
        delta_kl, delta_tv: those that are shown.
        kinds: by name, as `pack --to` spells it; the smallest first.
        sentence: the same in words, and
        basis: what it was measured on.
    """

    num_rollouts: int
    num_tokens: int
    num_cut: int
    num_exact: int
    confidence: float
    full_bytes: int
    deltas: list[float]
    delta_kl: float
    delta_tv: float
    kinds: dict[str, EvidenceKind]
    sentence: str
    basis: str


def evidence_worth(
    runs: Iterable[Mapping[str, Any]], delta_max: float | None = None, max_of: str | None = None
) -> EvidenceWorth | None:
    """What the runs that scored some shards measured, None where none of them did.

    Args:
        runs: `trm_audit.run` of each shard; equal ones count once. Those with another grid than the first are left out.
        delta_max, max_of: the criterion's threshold, and the divergence that it is on.

    Raises:
        BadInput: a run's figures are not what schemas/score.md says.
    """
    measured = [found for run in distinct(runs) if (found := run.get("evidence_worth")) is not None]
    try:
        return _merged(measured, *_wanted(delta_max, max_of)) if measured else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(
            f"what other evidence would decide (evidence_worth in trm_audit.run) cannot be read: "
            f"{type(error).__name__} {error}",
            next_step="Score the rollouts again (schemas/score.md).",
        ) from error


def _wanted(delta_max: float | None, max_of: str | None) -> tuple[float, float]:
    """Thresholds on KL and on TV that belong together."""
    of_tv = (max_of or "").startswith("tv")
    of_kl = max_of in (None, "k2", "k3") or str(max_of).startswith("kl")
    if delta_max is None or not delta_max > 0 or not (of_tv or of_kl):
        delta_max, of_tv = DEFAULT_DELTA, False
    return (2 * delta_max**2, delta_max) if of_tv else (delta_max, math.sqrt(delta_max / 2))


def _merged(measured: Sequence[Mapping[str, Any]], wanted_kl: float, wanted_tv: float) -> EvidenceWorth:
    deltas = [float(delta) for delta in measured[0]["deltas"]]
    measured = [found for found in measured if found["deltas"] == deltas]
    at_kl, at_tv = (_nearest(deltas, wanted) for wanted in (wanted_kl, wanted_tv))
    names = [name for name in measured[0]["kinds"] if all(name in found["kinds"] for found in measured)]
    totals = {name: sum(int(found[name]) for found in measured) for name in ("num_rollouts", "num_tokens", "num_exact")}
    over = totals["num_tokens"], totals["num_rollouts"]

    def certain(name: str, divergence: str, at: int) -> Certain:
        found = [one["kinds"][name][divergence] for one in measured]
        positions, sequences = (_shares([each[kind] for each in found], n) for kind, n in zip(_OF, over, strict=True))
        return Certain(positions[at], sequences[at], positions, sequences)

    kinds = {}
    for name in names:
        size = int(measured[0]["kinds"][name]["bytes_per_token"])
        kinds[name] = EvidenceKind(size, certain(name, "kl", at_kl), certain(name, "tv", at_tv))
    num_cut, full = sum(int(one["num_cut"]) for one in measured), max(int(one["full_bytes"]) for one in measured)
    kinds = dict(sorted(kinds.items(), key=lambda entry: entry[1].bytes_per_token))
    return EvidenceWorth(
        **totals,
        num_cut=num_cut,
        confidence=min(float(one["confidence"]) for one in measured),
        full_bytes=full,
        deltas=deltas,
        delta_kl=deltas[at_kl],
        delta_tv=deltas[at_tv],
        kinds=kinds,
        sentence=_sentence(kinds, deltas[at_kl], deltas[at_tv], totals["num_rollouts"], full),
        basis=_basis(num_cut=num_cut, **totals),
    )


_OF = ("positions", "sequences")


def _nearest(deltas: Sequence[float], wanted: float) -> int:
    """Index of the delta at the smallest ratio."""
    return min(range(len(deltas)), key=lambda i: abs(math.log(deltas[i] / wanted)))


def _shares(counts: Sequence[Sequence[int]], n: int) -> list[float]:
    return [sum(column) / n for column in zip(*counts, strict=True)]


def _sentence(kinds: Mapping[str, EvidenceKind], delta_kl: float, delta_tv: float, n: int, full: int) -> str:
    """What a list, a sketch and full logits decide of the sequences."""
    lists = [name for name in kinds if name.startswith("topk:")]
    shown = [NAMED_LIST if NAMED_LIST in lists else lists[-1]] if lists else []
    shown += [name for name in kinds if name.startswith("sketch:")]
    by_kl = [f"{_share(kinds[name].kl, n)} with {_words(name)} ({_size(kinds[name])})" for name in shown]
    by_tv = [f"{_share(kinds[name].tv, n)} with {_words(name)}" for name in shown]
    return (
        f"Sequences whose verdict is certain at KL {number(delta_kl)}: {', '.join([*by_kl, ''])}"
        f"all with full logits ({full:,} bytes)." + (f" At TV {number(delta_tv)}: {', '.join(by_tv)}." if by_tv else "")
    )


def _share(found: Certain, n: int) -> str:
    return f"{round(n * found.sequences):,} of {n:,}"


def _size(kind: EvidenceKind) -> str:
    return f"{kind.bytes_per_token:,} bytes a token"


def _words(name: str) -> str:
    kind, _, numbers = name.partition(":")
    k, _, dim = numbers.partition(",")
    return f"the top {k}" if kind == "topk" else f"a sketch of {dim} numbers beside the top {k}"


def _basis(num_rollouts: int, num_tokens: int, num_cut: int, num_exact: int) -> str:
    cut = f"; the first tokens of {num_cut} longer ones" if num_cut else ""
    stood_in = "the trainer's distribution in the place of the sampler's, which has tails like it where they are near"
    if num_exact == num_rollouts:
        policy = "the sampler's own distribution"
    elif not num_exact:
        policy = stood_in
    else:
        policy = f"the sampler's own distribution in {num_exact}, elsewhere {stood_in}"
    return f"Measured as the scoring began, on {num_rollouts:,} rollouts of {num_tokens:,} tokens{cut}, with {policy}."
