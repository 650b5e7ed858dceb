"""What a report says of sketched rows: estimates under their own name, bounds with their confidence, none mixed up."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_rows import Row, random_rows, run_with_floor, score_batch, token_values
from rich.console import Console

from trm_audit.numerics.histogram import RELATIVE_ERROR
from trm_audit.numerics.sketch_bounds import chi_square_factors
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import compare
from trm_audit.report.noise import noise_floor
from trm_audit.report.page.html import render_html
from trm_audit.report.summary import AuditSummary, Thresholds
from trm_audit.report.terminal import render
from trm_audit.rollout import DIVERGENCES, TOKEN_SCORES

RUN = {"model": "a/b", "dtype": "float32", "confidence": 0.95}
EXACT = ("kl", "kl_reverse", "tv")


def rows_of(*grades: str, seed: int = 0, count: int = 40) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = [row for grade in grades for row in random_rows(rng, count, grade)]
    return [rows[i] for i in rng.permutation(len(rows))]


def as_scored(rows: Sequence[Row]) -> pa.RecordBatch:
    """A batch as `score` writes it: every score column, null where a row has none, and no grade without tokens."""
    empty = [not any(row["response_mask"]) for row in rows]
    batch = score_batch(
        [row | {"grade": None if none else row["grade"]} for row, none in zip(rows, empty, strict=True)]
    )
    names = [*TOKEN_SCORES, *(f"seq_{kind}_{d}" for d in DIVERGENCES for kind in ("max", "mean", "sum"))]
    for name in (name for name in names if name not in batch.schema.names):
        kind = pa.list_(pa.float32()) if name in TOKEN_SCORES else pa.float64()
        batch = batch.append_column(name, pa.nulls(len(rows), kind))
    return batch


def summarize(*batches: pa.RecordBatch, thresholds: Thresholds | None = None, **given: Any) -> AuditSummary:
    builder = SummaryBuilder(thresholds)
    for batch in batches:
        builder.add(batch)
    return builder.finish(**({"runs": [RUN]} | given))


def printed(summary: AuditSummary, *, full: bool) -> str:
    out = io.StringIO()
    render(summary, Console(file=out, width=200, legacy_windows=False), full=full)
    return out.getvalue()


def names_in(tree: Any) -> set[str]:
    """Every key of a JSON tree."""
    if isinstance(tree, dict):
        return set(tree).union(*map(names_in, tree.values()))
    return set().union(*map(names_in, tree)) if isinstance(tree, list) else set()


def widths_by_loop(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Of each policy token, and of each sequence's maximum."""
    pairs = [(token_values(row, f"{name}_lower"), token_values(row, f"{name}_upper")) for row in rows]
    tokens = [b - a for low, high in pairs for a, b in zip(low or [], high or [], strict=True)]
    return tokens, [max(high) - max(low) for low, high in pairs if low and high]


def test_widths_are_those_of_a_loop_and_each_grade_has_its_own() -> None:
    rows = rows_of("exact", "sketch", "interval", "sampled")
    found = summarize(as_scored(rows)).bound_widths
    assert list(found) == ["sketch", "interval"]
    for grade, widths in found.items():
        own = [row for row in rows if row["grade"] == grade]
        for name in ("kl", "tv"):
            tokens, sequences = widths_by_loop(own, name)
            for spread, values in (
                (widths.tokens[f"{name}_width"], tokens),
                (widths.sequences[f"seq_max_{name}_width"], sequences),
            ):
                assert (spread.n, spread.max) == (len(values), pytest.approx(max(values), rel=1e-12))
                assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9)
                off = RELATIVE_ERROR * np.quantile(values, 0.5, method="higher")
                assert spread.p50 == pytest.approx(np.median(values), abs=off)
    assert (found["sketch"].confidence, found["interval"].confidence) == (0.95, None)
    sketched = sum(row["grade"] == "sketch" and any(row["response_mask"]) for row in rows)
    empty = sum(not any(row["response_mask"]) and "sketch_dim" in row for row in rows)
    assert found["sketch"].dims == {"64": sketched + empty}
    assert (found["interval"].dims, found["interval"].seeds) == ({}, {})


def test_neither_batches_nor_order_nor_halves_change_the_widths() -> None:
    rows = rows_of("sketch", "interval")
    whole, totals = SummaryBuilder(), [SummaryBuilder(), SummaryBuilder()]
    whole.add(as_scored(rows))
    for at in range(0, len(rows), 7):
        totals[at % 2].add(as_scored(rows[at : at + 7]))
    expected, found = (builder.finish(runs=[RUN]).bound_widths for builder in (whole, totals[1] + totals[0]))
    for grade, widths in expected.items():
        assert found[grade].dims == widths.dims
        for name, spread in (widths.tokens | widths.sequences).items():
            other = (found[grade].tokens | found[grade].sequences)[name]
            assert (other.n, other.p50, other.max) == (spread.n, spread.p50, spread.max)


def test_bounds_that_are_both_infinite_leave_no_width_and_an_upper_one_alone_an_infinite_one() -> None:
    # GIVEN a token that the trainer certainly excludes, and one of which nothing is known from above
    bounds: Row = {"kl_lower": [math.inf, 0.1, 0.2], "kl_upper": [math.inf, math.inf, 0.3]}
    row = {"grade": "interval", "log_ratio": [0.1] * 3, **bounds}
    found = summarize(score_batch([row])).bound_widths["interval"]
    assert (found.tokens["kl_width"].min, found.tokens["kl_width"].max) == (0.0, math.inf)
    assert found.tokens["kl_width"].p50 == pytest.approx(0.1, rel=RELATIVE_ERROR)
    assert found.sequences["seq_max_kl_width"].max == 0.0
    assert "tv_width" not in found.tokens


def test_an_estimate_never_stands_under_the_name_of_the_exact_divergence() -> None:
    rows = rows_of("sketch")
    summary = summarize(as_scored(rows), thresholds=Thresholds(delta_max=0.05))
    exact = {f"seq_{kind}_{d}" for kind in ("max", "mean", "sum") for d in EXACT} | {f"mean_{d}" for d in EXACT}
    assert not names_in(json.loads(summary.to_json())) & (exact | set(EXACT))
    # AND its figures are those of a loop over the rows
    lists = [values for row in rows if (values := token_values(row, "kl_estimate"))]
    tokens = [value for values in lists for value in values]
    assert summary.metrics["mean_kl_estimate"].value == pytest.approx(math.fsum(tokens) / len(tokens), rel=1e-12)
    assert summary.tokens["kl_estimate"].n == summary.tokens["hellinger2"].n == len(tokens)
    assert summary.d_max["seq_max_kl_estimate"] == max(tokens)
    assert summary.d_seq["seq_sum_kl_estimate"].interval.mean == pytest.approx(math.fsum(tokens) / len(rows), rel=1e-12)


def test_the_estimate_leads_wherever_there_is_no_exact_divergence() -> None:
    rows = [row | {"response_ids": [3] * len(row["response_mask"])} for row in rows_of("sketch")]
    summary = summarize(as_scored(rows), thresholds=Thresholds(delta_max=0.05))
    assert summary.impulses is not None
    assert summary.impulses.divergence == "kl_estimate"
    assert {sequence.divergence for sequence in summary.worst} == {"kl_estimate"}
    assert summary.acceptance_by_length is not None
    statistics = [curve.statistic for curve in summary.acceptance_by_length.curves]
    assert statistics == [f"seq_{kind}_kl_estimate" for kind in ("max", "mean", "sum")]
    assert ("kl_estimate", "kl_estimate") in {(pair.max_of, pair.avg_of) for pair in summary.acceptance_combined}
    for bins in (summary.by_position, summary.by_entropy, summary.by_token, summary.by_engine, summary.by_group):
        assert "kl_estimate" in bins[0].divergences
    assert summary.delta_tables["seq_max_kl_estimate"].marked == [0.05]
    assert summary.delta_tables["seq_mean_kl_estimate"].marked == [0.001]


@pytest.mark.parametrize("max_of", [None, "kl", "kl_estimate"])
def test_violations_and_token_masking_go_by_the_estimate(max_of: str | None) -> None:
    rows = rows_of("sketch")
    summary = summarize(as_scored(rows), thresholds=Thresholds(delta_max=0.02, max_of=max_of))
    lists = [values for row in rows if (values := token_values(row, "kl_estimate"))]
    assert summary.violations is not None
    assert summary.violations.divergence == "seq_max_kl_estimate"
    violations = sum(max(values) > 0.02 for values in lists)
    assert (summary.violations.sequences.violations, summary.violations.sequences.n) == (violations, len(lists))
    assert violations not in (0, len(lists))
    assert summary.token_masking is not None
    assert summary.token_masking.num_dropped == sum(value > 0.02 for values in lists for value in values)


def test_a_threshold_on_kl_counts_exact_and_sketched_rows_each_by_what_they_have() -> None:
    rows = rows_of("exact", "sketch", "sampled")
    found = summarize(as_scored(rows), thresholds=Thresholds(delta_max=0.02, max_of="kl")).violations
    assert found is not None
    assert found.divergence == "seq_max_kl where exact, seq_max_kl_estimate where sketched"
    values = [token_values(row, "kl") or token_values(row, "kl_estimate") or [] for row in rows]
    assert found.sequences.n == sum(map(bool, values))
    assert found.sequences.violations == sum(max(each, default=0.0) > 0.02 for each in values)


def test_bounds_of_sketches_and_of_intervals_are_what_each_grade_gives_alone() -> None:
    rows = rows_of("sketch", "interval")
    together = summarize(as_scored(rows), horizon=20).bounds["all"]
    for grade in ("sketch", "interval"):
        # GIVEN that rows without policy tokens belong to either
        own = [row for row in rows if row["grade"] == grade or not any(row["response_mask"])]
        alone = summarize(as_scored(own), horizon=20).bounds["all"][grade]
        assert together[grade].rows == alone.rows < len(rows)
        assert together[grade].inputs == pytest.approx(alone.inputs, rel=1e-12)
    assert together["sketch"].inputs != together["interval"].inputs


def test_rows_without_a_grade_are_sketches_where_they_have_an_estimate() -> None:
    rows = [row for row in rows_of("sketch", "interval") if any(row["response_mask"])]
    found = summarize(score_batch(rows, without=["grade"]))
    sizes = {grade: sum(row["grade"] == grade for row in rows) for grade in ("sketch", "interval")}
    assert {grade: found.bounds["all"][grade].rows for grade in sizes} == sizes
    assert {grade: found.bound_widths[grade].sequences["seq_max_tv_width"].n for grade in sizes} == sizes


@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled"])
def test_sequences_without_tokens_bring_no_figure_of_a_grade_that_the_data_lack(grade: str) -> None:
    # GIVEN a score shard: all columns are there, and rows without policy tokens have no grade
    rows = rows_of(grade)
    assert not all(any(row["response_mask"]) for row in rows)
    summary = summarize(as_scored(rows))
    totals = {"exact": ["kl"], "sketch": ["kl_estimate", "kl_lower", "kl_upper"], "interval": ["kl_lower", "kl_upper"]}
    assert list(summary.d_seq) == [f"seq_sum_{name}" for name in [*totals.get(grade, []), "k3"]]
    assert list(summary.bounds["all"]) == list(dict.fromkeys((grade, "sampled")))
    assert list(summary.bound_widths) == [each for each in ("sketch", "interval") if each == grade]
    for name in summary.d_seq:
        values = [token_values(row, name.removeprefix("seq_sum_")) or [] for row in rows]
        expected = math.fsum(map(math.fsum, values)) / len(rows)
        assert summary.d_seq[name].interval.mean == pytest.approx(expected, rel=1e-12)


def test_everything_that_rests_on_a_confidence_names_it() -> None:
    batch = as_scored(rows_of("sketch"))
    keep = np.arange(batch.num_rows) % 2 == 0
    summary = summarize(batch.append_column("keep", pa.array(keep)), runs=[RUN, RUN | {"confidence": 0.99}])
    # GIVEN runs of 95 % and 99 %, THEN the smaller is said: of all rows nothing surer is known
    named = [summary.verdict, summary.evidence, summary.bounds["all"]["sketch"].label, *summary.notes]
    assert sum("at 95 % confidence" in text for text in named) == 5
    assert "99 %" not in " ".join(named)
    largest = summary.d_max["seq_max_tv_upper"]
    assert summary.verdict.endswith(f"Largest TV at most {largest:.4g} at 95 % confidence.")
    assert "Largest KL, estimated from sketches, " in summary.verdict
    assert any("off at a token by about 18 %" in note and "m = 64" in note for note in summary.notes)
    assert any("misses come together" in note for note in summary.notes)
    assert "where sketches chose them" in summary.bounds["kept"]["sketch"].label
    assert "where sketches chose them" not in summary.bounds["kept"]["sampled"].label


def test_a_confidence_that_nobody_stated_is_not_made_up() -> None:
    summary = summarize(as_scored(rows_of("sketch")), runs=[{"model": "a/b"}])
    assert summary.bound_widths["sketch"].confidence is None
    assert "at the confidence they were scored with" in summary.evidence
    assert "%" not in summary.evidence


def test_other_grades_have_no_confidence() -> None:
    for grade in ("exact", "interval", "sampled"):
        summary = summarize(as_scored(rows_of(grade)))
        assert "confidence" not in " ".join([summary.verdict, summary.evidence, *summary.notes])


def test_mixed_grades_say_what_covers_both() -> None:
    summary = summarize(as_scored(rows_of("sketch", "interval")))
    count = summary.counts.grades
    assert any(
        f"rigorous in the {count['interval']} interval sequences and hold at 95 % confidence in the {count['sketch']} "
        "sketched ones" in note
        for note in summary.notes
    )
    assert "Largest TV at most" not in summary.verdict


def test_several_seeds_are_counted_and_said() -> None:
    rows = [row | {"sketch_seed": at % 3} for at, row in enumerate(rows_of("sketch"))]
    summary = summarize(score_batch(rows))
    assert summary.bound_widths["sketch"].seeds == {"0": 14, "1": 13, "2": 13}
    assert any("one for each of 3 seeds" in note for note in summary.notes)


def test_the_largest_upper_limit_holds_for_the_largest_but_not_for_what_it_chose() -> None:
    # GIVEN 50 sequences of 8 tokens whose squared distances are measured 4000 times with m = 64
    rng, m, confidence = np.random.default_rng(0), 64, 0.8
    truth = rng.exponential(1, (50, 8)) + 0.5
    factor = chi_square_factors(m, np.array([8]), 1 - 2 * (1 - confidence))[1][0]  # all that is left, to one side
    limits = (truth * rng.chisquare(m, (4000, 50, 8)) / m * factor).max(axis=2)
    largest = truth.max(axis=1)
    error = 4 * math.sqrt(confidence * (1 - confidence) / 4000)
    # THEN the largest limit is above the largest distance as often as promised
    assert np.mean(limits.max(axis=1) >= largest.max()) >= confidence - error
    # AND among the sequences that a threshold on the limits keeps it is not, where many lie just above
    truth = np.linspace(1.0, 1.2, 50)
    limits = truth * rng.chisquare(m, (4000, 50)) / m * factor
    kept = limits <= 1.1
    holds = np.where(kept, limits, -np.inf).max(axis=1) >= np.where(kept, truth, -np.inf).max(axis=1)
    assert np.mean(holds[kept.any(axis=1)]) < confidence - error


def test_terminal_and_page_show_widths_with_their_grade_and_certainty() -> None:
    summary = summarize(as_scored(rows_of("sketch", "interval")), thresholds=Thresholds(delta_max=0.05, max_of="k2"))
    text = printed(summary, full=True)
    for grade, sure in (("sketch", "at 95 % confidence"), ("interval", "rigorous")):
        assert f"Width of the bounds, upper less lower ({grade}, {sure})" in text
    for name in ("kl_width", "tv_width", "seq_max_kl_width", "seq_max_tv_width"):
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 2
    assert "Width of the bounds" not in printed(summary, full=False)
    html = render_html(summarize(as_scored(rows_of("sketch"))))
    assert "all sequences; bounds at 95 % confidence" in html
    assert "Width of the bounds (sketch)" in html
    assert html.count(">seq_max_tv_width</th>") == 1
    assert '<th scope="row">sketch_dim 64</th>' in html


def test_thresholds_on_the_estimate_lie_beside_the_noise_floor_of_kl_and_those_on_tv_do_not() -> None:
    run = run_with_floor(kl_max=0.03, kl_mean=1.2e-3)
    limits = [
        (f"seq_{kind}_{d}", 1e-4) for kind in ("max", "mean") for d in ("kl", "kl_estimate", "tv_upper", "tv_lower")
    ]
    floor = noise_floor([run], limits)
    assert floor is not None
    found = {below.statistic: below.floor for below in floor.below}
    assert found == {
        "seq_max_kl": 0.03,
        "seq_max_kl_estimate": 0.03,
        "seq_mean_kl": 1.2e-3,
        "seq_mean_kl_estimate": 1.2e-3,
    }


def test_sketches_of_different_confidence_are_compared_with_a_warning() -> None:
    builders = [SummaryBuilder(), SummaryBuilder()]
    for seed, builder in enumerate(builders):
        builder.add(as_scored(rows_of("sketch", seed=seed)))
    a, b = (builder.finish(runs=[RUN | {"confidence": c}]) for builder, c in zip(builders, (0.95, 0.999), strict=True))
    said = "Bounds from sketches hold at different confidences (A: 95 %, B: 99.9 %)"
    found = compare(*builders, a, b, "a", "b")
    assert any(said in note for note in found.notes)
    assert not any("confidences" in note for note in compare(*builders, a, a, "a", "a").notes)
    assert {"mean_kl_estimate", "mean_tv_upper", "seq_max_kl_estimate_max"} <= found.differences.keys()
