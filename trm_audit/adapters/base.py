"""What an adapter is: a name, what its source can tell, and a function from a raw file to rows of schemas/rollout.md.

    rows = load_source("vllm").read(Path("responses.jsonl"), Given())

A row is a dict of columns of schemas/rollout.md, and of any others; what is not there is null. Who reads rows checks
them (`pipeline.convert`), so an adapter only has to know its source: where tokens stand, what stage the values are of,
which of them are fillers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trm_audit.errors import RowError
from trm_audit.rollout import Grade

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]


@dataclass
class Given:
    """What a user says about a raw file, and what an adapter had to assume.

    Attributes:
        temperature, top_p, top_k, logprobs_mode: how responses were sampled and at which stage values were taken, for
            rows whose source does not say; None where the user does not either.
        assumed: sentences, each once, in the order in which they came up. They are printed, and kept in the footer.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    logprobs_mode: str | None = None
    assumed: list[str] = field(default_factory=list)

    def assume(self, sentence: str) -> None:
        """Notes what the source does not say and the adapter took for granted."""
        if sentence not in self.assumed:
            self.assumed.append(sentence)

    def sampling(self) -> Row:
        """The settings that the user stated, as columns."""
        names = ("temperature", "top_p", "top_k", "logprobs_mode")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Source:
    """A foreign format.

    Attributes:
        name: what `convert --from` calls it.
        about: what it reads, in a few words.
        suffixes: of its files, for folders: (".jsonl", ".json").
        grade: the best grade that its rows can reach.
        switch_on: what has to be switched on where the data come from, one sentence.
        read: a file -> rows, in the order of the file, and an error for each that cannot be one. Raises BadInput with
            place, cause and next step; a dump of text without token ids is refused.
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    grade: Grade
    switch_on: str
    read: Callable[[Path, Given], Iterator[Row | RowError]]


@dataclass(frozen=True)
class ExportInfo:
    """What is exported.

    Attributes:
        n_total, n_kept: sequences judged (N of the objective) and kept, over all shards.
        num_rows: rows that are there: n_total, or n_kept where rejected ones were dropped.
        criteria: what was decided by, one line each.
    """

    n_total: int
    n_kept: int
    num_rows: int
    criteria: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """What a mean over kept sequences has to be multiplied by to be one over all N."""
        return self.n_kept / self.n_total if self.n_total else 1.0


@dataclass(frozen=True)
class Target:
    """A format that a trainer takes in.

    Attributes:
        name: what `export --to` calls it.
        about: what is written, in a few words.
        write: batches of training shards (schemas/training.md), the folder, what is exported -> sentences that a user
            should read: how the trainer divides, what has to be set there. The folder is there and empty; whatever is
            written into it is published whole by the caller.
    """

    name: str
    about: str
    write: Callable[[Iterator[pa.RecordBatch], Path, ExportInfo], list[str]]
