"""What a stage tells whoever is watching. The command line shows it; a library call may pass nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Watches a stage."""

    def start(self, total: int) -> None:
        """The work ahead, in tokens."""

    def advance(self, tokens: int) -> None:
        """Work done."""

    def note(self, text: str) -> None:
        """Something a user should read: a file passed over, a default that decided."""


class Silent:
    """Nobody is watching."""

    def start(self, total: int) -> None: ...

    def advance(self, tokens: int) -> None: ...

    def note(self, text: str) -> None: ...
