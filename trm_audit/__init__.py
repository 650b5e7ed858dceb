"""How far is the policy that sampled your rollouts from the one you train?

    import trm_audit

    trm_audit.score(["rollouts/"], "scores/", trm_audit.ScoreOptions(model=Path("ckpt")))
    trm_audit.filter_scores(["scores/"], "train/", trm_audit.FilterOptions(trm_audit.Criteria(delta_max=0.05)))
    summary = trm_audit.summarize(["scores/"], trm_audit.ReportOptions())

Names resolve on first use, so that importing the package loads neither torch nor pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trm_audit.criteria.thresholds import Criteria as Criteria
    from trm_audit.criteria.verdicts import decide as decide
    from trm_audit.errors import AuditError as AuditError
    from trm_audit.errors import BadInput as BadInput
    from trm_audit.errors import UsageError as UsageError
    from trm_audit.numerics.bounds import error_bounds as error_bounds
    from trm_audit.numerics.divergences import divergences as divergences
    from trm_audit.numerics.estimators import sampled_divergences as sampled_divergences
    from trm_audit.numerics.intervals import intervals as intervals
    from trm_audit.pipeline.filter import FilterOptions as FilterOptions
    from trm_audit.pipeline.filter import filter_scores as filter_scores
    from trm_audit.pipeline.pack import pack as pack
    from trm_audit.pipeline.pack_loss import plan as plan
    from trm_audit.pipeline.pack_options import PackOptions as PackOptions
    from trm_audit.pipeline.pack_options import Target as Target
    from trm_audit.pipeline.report import ReportOptions as ReportOptions
    from trm_audit.pipeline.report import summarize as summarize
    from trm_audit.pipeline.score import score as score
    from trm_audit.pipeline.trainer import ScoreOptions as ScoreOptions
    from trm_audit.pipeline.validate import ValidateOptions as ValidateOptions
    from trm_audit.pipeline.validate import validate as validate
    from trm_audit.report.summary import AuditSummary as AuditSummary
    from trm_audit.shards.rollout_writer import LogitsTableWriter as LogitsTableWriter
    from trm_audit.shards.rollout_writer import write_rollout_table as write_rollout_table

_HOMES = {
    "AuditError": "errors",
    "AuditSummary": "report.summary",
    "BadInput": "errors",
    "Criteria": "criteria.thresholds",
    "FilterOptions": "pipeline.filter",
    "LogitsTableWriter": "shards.rollout_writer",
    "PackOptions": "pipeline.pack_options",
    "ReportOptions": "pipeline.report",
    "ScoreOptions": "pipeline.trainer",
    "Target": "pipeline.pack_options",
    "UsageError": "errors",
    "ValidateOptions": "pipeline.validate",
    "decide": "criteria.verdicts",
    "divergences": "numerics.divergences",
    "error_bounds": "numerics.bounds",
    "filter_scores": "pipeline.filter",
    "intervals": "numerics.intervals",
    "pack": "pipeline.pack",
    "plan": "pipeline.pack_loss",
    "sampled_divergences": "numerics.estimators",
    "score": "pipeline.score",
    "summarize": "pipeline.report",
    "validate": "pipeline.validate",
    "write_rollout_table": "shards.rollout_writer",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'trm_audit' has no attribute {name!r}")
    return getattr(import_module(f"trm_audit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
