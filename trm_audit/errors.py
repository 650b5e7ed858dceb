"""What can go wrong, with the exit code that it ends a command with.

An error says where it stands, what is wrong there and what to do next. The message is all that a user sees: the
command line prints it without a traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_GATE = 1
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_PARTIAL = 4
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130


class AuditError(Exception):
    """Base of all errors of this package.

    Args:
        cause: what is wrong, one sentence without a final full stop where `place` precedes it.
        place: file, row, flag: where it stands; may be empty.
        next_step: what the user can do about it; may be empty.
    """

    exit_code = EXIT_INTERNAL

    def __init__(self, cause: str, *, place: str = "", next_step: str = "") -> None:
        self.cause = cause
        self.place = place
        self.next_step = next_step
        head = f"{place}: {cause}" if place else cause
        super().__init__(f"{head}\n{next_step}" if next_step else head)


class UsageError(AuditError):
    """The call cannot mean anything: flags that contradict each other, a criterion beyond the data's grade."""

    exit_code = EXIT_USAGE


class BadInput(AuditError):
    """A file, row or model is not what the schemas say."""

    exit_code = EXIT_BAD_INPUT


class RowError(BadInput):
    """One row is bad; the others may be used (`--skip-bad`)."""


class OutputError(AuditError):
    """The output cannot be written: a full disk, a folder without permission."""

    exit_code = EXIT_BAD_INPUT


class GateFailed(AuditError):
    """A condition given with `--fail-on` holds."""

    exit_code = EXIT_GATE
