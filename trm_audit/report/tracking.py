"""The report's figures in an experiment tracker, by the names that they have in the JSON report.

    log_to("wandb", "my-project", summary, name="scores")    # metrics/mean_k3/value, acceptance, d_max/seq_max_kl, ...

One run is made, one step is logged and the run is ended. Both trackers have the same three calls.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from trm_audit.errors import OutputError, UsageError
from trm_audit.report.compare import Comparison
from trm_audit.report.shown import visible
from trm_audit.report.summary import AuditSummary, numbers

TRACKERS: dict[str, dict[str, Any]] = {"wandb": {"reinit": "create_new"}, "trackio": {}}
"""Package -> what its `init` is given besides: wandb would otherwise take over, and end, a run that is open already."""
SETTINGS = ("kind", "name_a", "name_b", "run", "criteria", "thresholds")
"""What goes into the run's configuration rather than into its figures."""
_NO_FIGURES = {*SETTINGS, "schema_version"}


def log_to(kind: str, project: str, found: AuditSummary | Comparison, *, name: str | None = None) -> None:
    """Log every number of a report, but for those in lists, as one step of a new run.

    Whatever the tracker prints goes to stderr: stdout carries the report.

    Args:
        kind: `wandb` or `trackio`; each is configured as usual (login, WANDB_MODE, TRACKIO_DIR, ...).
        project: the tracker's project.
        found: what to log; of a comparison both reports too, under `a/` and `b/`.
        name: of the run; the tracker makes one up if None.

    Raises:
        UsageError: there is no such tracker, or it is not installed.
        OutputError: it did not take the figures.
    """
    tracker = _tracker(kind)
    report = found.to_dict()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            run = tracker.init(project=project, name=name, config=settings(report), **TRACKERS[kind])
            try:
                run.log(figures(report))
            finally:
                # trackio's run alone would be ended once more, and say so on stdout, when the process ends
                (tracker if kind == "trackio" else run).finish()
        except Exception as error:  # whatever a tracker raises: no login, no network, no room
            raise OutputError(
                f"{kind} did not take the figures: {type(error).__name__}: {error}",
                place=f"--{kind}",
                next_step=f"The report itself is whole. See to {kind}'s login and settings, or leave out --{kind}.",
            ) from error


def figures(report: Mapping[str, Any]) -> dict[str, float | int]:
    """The numbers of a JSON report by their path, parts joined by `/`; infinities as floats, what is null left out.

    Worked instance: {"acceptance": 0.5, "d_max": {"seq_max_kl": "inf"}, "worst": [...]} gives
    {"acceptance": 0.5, "d_max/seq_max_kl": inf}.
    """
    found = ((path, value) for path, value in numbers(report) if value is not None and not _NO_FIGURES & {*path})
    return {"/".join(visible(part).replace("/", "_") for part in path): value for path, value in found}


def settings(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was scored and how it was judged."""
    chosen = {name: report[name] for name in SETTINGS if name in report}
    return chosen | {side: settings(report[side]) for side in ("a", "b") if side in report}


def _tracker(kind: str) -> Any:
    if kind not in TRACKERS:
        raise UsageError(f"there is no tracker {kind!r}", next_step=f"Take one of {', '.join(TRACKERS)}.")
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise UsageError(
            f"the package {kind} is not installed ({error})", place=f"--{kind}", next_step=f"pip install {kind}"
        ) from error
