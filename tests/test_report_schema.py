"""The JSON Schema describes what the code writes: no more, no less."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from jsonschema import Draft202012Validator
from report_rows import random_rows, run_with_floor, score_batch, worth_of

from trm_audit.numerics.bounds import Bound
from trm_audit.numerics.confidence import MeanInterval
from trm_audit.report import blocks, noise, worth
from trm_audit.report import summary as tree
from trm_audit.report.builder import SummaryBuilder

SCHEMA = json.loads((Path(__file__).parents[1] / "schemas" / "report.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def report(grades: tuple[str, ...], without: tuple[str, ...] = (), decide: bool = True, **given: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = [row for grade in grades for row in random_rows(rng, 20, grade)]
    if "kl" in (rows[0] if rows else {}):
        full = next(row for row in rows if any(row["response_mask"]))
        full["kl"][full["response_mask"].index(True)] = float("inf")
    thresholds = tree.Thresholds(delta_max=0.1, max_of="k2") if decide else None
    builder = SummaryBuilder(thresholds)
    batch = score_batch(rows, without) if rows else pa.RecordBatch.from_pydict({})
    builder.add(batch.append_column("keep", pa.array(np.arange(len(rows)) % 2 == 0)) if rows and decide else batch)
    loaded: dict[str, Any] = json.loads(builder.finish(**given).to_json())
    return loaded


CASES = {
    "every grade": report(("exact", "sketch", "interval", "sampled")),
    "exact with an infinite divergence": report(("exact",)),
    "sampled, nothing decided": report(("sampled",), decide=False),
    "no groups, no rewards": report(("exact",), ("group_id", "reward", "engine", "policy_version")),
    "no per-token lists": report(("interval",), ("log_ratio", "kl_upper", "tv_upper", "kl_lower", "tv_lower")),
    "nothing": report(()),
    "below the noise floor": report(("sampled",), runs=[run_with_floor()], limits=[("seq_max_k2", 0.0)]),
    "an infinite noise floor": report(("sampled",), runs=[run_with_floor(kl_max=math.inf)], limits=[("seq_max_kl", 1)]),
    "noise in one comparison": report(("exact",), runs=[run_with_floor(composition=None)]),
    "sketches at a stated confidence": report(("sketch",), runs=[{"dtype": "float32", "confidence": 0.99}]),
    "what other evidence would decide": report(("exact",), runs=[{"evidence_worth": worth_of()}]),
    "noise not measured": report(("exact",), runs=[{"dtype": "bfloat16", "noise_floor": None}]),
}


def test_the_schema_is_valid_draft_2020_12() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("case", CASES)
def test_every_report_fits_the_schema(case: str) -> None:
    assert [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(CASES[case])] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("counts", "surprise"), 1),
        (("schema_version",), 2),
        (("bound_widths", "sampled"), {}),
        (("bound_widths", "sketch", "tokens", "kl"), {}),
        (("acceptance",), 1.5),
        (("sequences", "seq_max_surprise"), {}),
        (("bounds", "all", "sampled", "bounds", "mixed_bound"), {"published": 1.0, "sharp": 0.5}),
        (("bounds", "all", "exact", "vacuous"), "yes"),
        (("metrics", "mean_ratio", "value"), "nan"),
        (("noise_floor",), {"float32": None}),
        (("evidence_worth",), {"kinds": {}}),
    ],
)
def test_what_no_report_contains_is_refused(path: tuple[str, ...], value: object) -> None:
    changed = copy.deepcopy(CASES["every grade"])
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert not VALIDATOR.is_valid(changed)


@pytest.mark.parametrize(("path", "value"), [(("below", 0, "against"), "a guess"), (("float32", "kl", "max"), None)])
def test_what_no_noise_floor_contains_is_refused(path: tuple[Any, ...], value: object) -> None:
    changed = copy.deepcopy(CASES["below the noise floor"])
    *parts, last = path
    inner = changed["noise_floor"]
    for key in parts:
        inner = inner[key]
    inner[last] = value
    assert not VALIDATOR.is_valid(changed)


def test_a_missing_key_is_refused() -> None:
    for key in CASES["every grade"]:
        assert not VALIDATOR.is_valid({k: v for k, v in CASES["every grade"].items() if k != key})


DEFINITIONS = {
    "thresholds": tree.Thresholds,
    "noise_floor": noise.NoiseFloor,
    "noise": noise.Noise,
    "noise_spread": noise.NoiseSpread,
    "below_floor": noise.BelowFloor,
    "counts": tree.Counts,
    "quantiles": tree.Quantiles,
    "bound_widths": tree.BoundWidths,
    "evidence_worth": worth.EvidenceWorth,
    "evidence_kind": worth.EvidenceKind,
    "certain": worth.Certain,
    "curve": tree.Curve,
    "combined": tree.CombinedAcceptance,
    "interval": MeanInterval,
    "sequence_total": tree.SequenceTotal,
    "violating": tree.Share,
    "violations": tree.Violations,
    "bound": Bound,
    "bounds_exact": tree.BoundsBlock,
    "bounds_interval": tree.BoundsBlock,
    "bounds_sampled": tree.BoundsBlock,
    "rewards": tree.Rewards,
    "ppo": tree.PpoTerms,
    "token_masking": tree.TokenMasking,
    "category_divergence": tree.CategoryDivergence,
    "category": tree.Category,
    "finding": blocks.Finding,
    "distribution": blocks.Distribution,
    "probability_density": blocks.ProbabilityDensity,
    "metric": blocks.Metric,
    "delta_row": blocks.DeltaRow,
    "delta_table": blocks.DeltaTable,
    "target": blocks.Target,
    "length_curve": blocks.LengthCurve,
    "acceptance_by_length": blocks.AcceptanceByLength,
    "bound_curves": blocks.BoundCurves,
    "bin_divergence": blocks.BinDivergence,
    "token_bin": blocks.TokenBin,
    "token_row": blocks.TokenRow,
    "impulse_share": blocks.ImpulseShare,
    "impulses": blocks.Impulses,
    "routing": blocks.Routing,
    "shown_token": blocks.ShownToken,
    "worst_sequence": blocks.WorstSequence,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_definition_has_the_fields_of_its_dataclass_in_their_order(name: str) -> None:
    fields = [field.name for field in dataclasses.fields(DEFINITIONS[name])]
    definition = SCHEMA["$defs"][name]
    assert list(definition["properties"]) == definition["required"] == fields
    assert definition["additionalProperties"] is False


def test_every_definition_with_fixed_keys_belongs_to_a_dataclass() -> None:
    fixed = {name for name, definition in SCHEMA["$defs"].items() if "required" in definition}
    assert fixed == set(DEFINITIONS)
