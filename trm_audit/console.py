"""What a user sees on stderr while a stage runs: a bar on a terminal, otherwise a plain line about every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

QUIET_SECONDS = 30.0


class Lines:
    """Progress for logs and pipes: a line now and then."""

    def __init__(self, verb: str) -> None:
        self._verb, self._total, self._done = verb, 0, 0
        self._began = self._said = time.monotonic()

    def start(self, total: int) -> None:
        self._total = total
        self._began = self._said = time.monotonic()

    def advance(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._said >= QUIET_SECONDS:
            self._said = now
            speed = self._done / max(now - self._began, 1e-9)
            left = f", {duration((self._total - self._done) / speed)} left" if self._total and speed else ""
            of = f" of {self._total:,}" if self._total else ""
            say(f"{self._verb}: {self._done:,}{of} tokens, {speed:,.0f} tokens/s{left}")

    def note(self, text: str) -> None:
        say(text)


class BarLines(Lines):
    """Progress for terminals: a bar with tokens per second and the time left."""

    def __init__(self, verb: str, bar: Bar) -> None:
        super().__init__(verb)
        self._bar = bar
        self._task = bar.add_task(verb, total=None)

    def start(self, total: int) -> None:
        self._bar.update(self._task, total=total or None)

    def advance(self, tokens: int) -> None:
        self._bar.advance(self._task, tokens)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


@contextmanager
def watching(verb: str) -> Iterator[Lines]:
    """Progress of one stage on stderr."""
    if not sys.stderr.isatty():
        yield Lines(verb)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text("" if speed is None else f"{speed:,.0f} tokens/s")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        yield BarLines(verb, bar)


def say(text: str) -> None:
    """A line on stderr, with nothing in it that a terminal would act on."""
    print(printable(text), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with control characters (ESC among them) replaced; line breaks stay."""
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
