"""Two audits side by side: differences are those of a plain loop, and what is chance is called chance."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
from referencing import Registry, Resource
from report_rows import Row, random_rows, score_batch, token_values
from rich.console import Console

from trm_audit.report.blocks import Finding
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.compare import NO_INTERVALS, Comparison, Difference, compare
from trm_audit.report.gates import check, parse_gate
from trm_audit.report.metrics import NUM_BUCKETS
from trm_audit.report.shown import number, percent
from trm_audit.report.side_by_side import render_comparison
from trm_audit.report.summary import AuditSummary, Thresholds

SCHEMAS = Path(__file__).parents[1] / "schemas"
Audit = tuple[SummaryBuilder, AuditSummary]


SCALED = ("log_ratio", "kl", "kl_reverse", "kl_estimate")


def rows_of(seed: int, scale: float = 1.0, grade: str = "exact", groups: int = 30) -> list[Row]:
    """120 rows whose divergences are `scale` times as large."""
    rows = random_rows(np.random.default_rng(seed), 120, grade, groups)
    for row in rows:
        row |= {name: [scale * v for v in row[name]] for name in SCALED if name in row}
    return rows


def audit(rows: list[Row], parts: int = 1, delta: float | None = None, **given: Any) -> Audit:
    """Builder and summary; `delta` keeps rows by seq_max_k2, and each part of the rows has a builder of its own."""
    builder = SummaryBuilder(Thresholds(delta_max=delta, max_of="k2"), [] if delta is None else [f"k2 <= {delta}"])
    for part in range(parts):
        half = SummaryBuilder(builder.thresholds, builder.criteria)
        batch = score_batch(rows[part::parts])
        if delta is not None:
            largest = batch.column("seq_max_k2").to_numpy(zero_copy_only=False)
            batch = batch.append_column("keep", pa.array(largest <= delta))
        half.add(batch)
        builder = builder + half
    return builder, builder.finish(**given)


@functools.cache
def known(seed: int, scale: float = 1.0, grade: str = "exact", groups: int = 30, delta: float | None = None) -> Audit:
    """The audit of `rows_of`."""
    return audit(rows_of(seed, scale, grade, groups), delta=delta)


def compared(a: Audit, b: Audit, names: tuple[str, str] = ("before/", "after/")) -> Comparison:
    return compare(a[0], b[0], a[1], b[1], *names)


def edited(found: Audit, **changes: Any) -> Audit:
    return found[0], replace(found[1], **changes)


def tokens(rows: list[Row], name: str) -> list[float]:
    return [value for row in rows for value in token_values(row, name) or []]


def printed(comparison: Comparison, width: int = 80) -> str:
    out = io.StringIO()
    render_comparison(comparison, Console(file=out, width=width, legacy_windows=False))
    return out.getvalue()


def test_differences_are_those_of_a_loop_over_the_tokens() -> None:
    rows_a, rows_b = rows_of(0), rows_of(1, 1.5)
    found = compared(audit(rows_a, delta=0.05), audit(rows_b, delta=0.05)).differences
    for name in ("kl", "k3", "abs_log_ratio", "ratio"):
        a, b = (math.fsum(values) / len(values) for values in (tokens(rows_a, name), tokens(rows_b, name)))
        got = found[f"mean_{name}"]
        assert (got.a, got.b, got.difference) == pytest.approx((a, b, b - a), rel=1e-12)
        assert got.low <= got.difference <= got.high
    kept_a, kept_b = (
        sum(max(token_values(row, "k2") or [math.inf]) <= 0.05 for row in rows) / len(rows) for rows in (rows_a, rows_b)
    )
    assert (found["acceptance"].a, found["acceptance"].b) == (kept_a, kept_b)
    assert found["acceptance"].has_interval
    largest = [max(tokens(rows, "kl")) for rows in (rows_a, rows_b)]
    assert (found["seq_max_kl_max"].a, found["seq_max_kl_max"].b) == tuple(largest)


def test_quantiles_and_totals_are_those_of_the_summaries_and_have_no_interval() -> None:
    a, b = known(0), known(1)
    found = compared(a, b).differences
    for name in ("seq_max_kl", "seq_mean_kl", "seq_max_k2", "seq_mean_k3"):
        for figure in ("p50", "p99"):
            sides = [getattr(each[1].sequences[name], figure) for each in (a, b)]
            expected = Difference(*sides, sides[1] - sides[0], math.nan, math.nan, False, 0)
            assert str(found[f"{name}_{figure}"]) == str(expected)
    total = found["seq_sum_kl_mean"]
    assert (total.a, total.b) == (a[1].d_seq["seq_sum_kl"].interval.mean, b[1].d_seq["seq_sum_kl"].interval.mean)
    assert not total.has_interval


def test_only_what_both_have_is_compared() -> None:
    found = compared(known(0), known(1, grade="sampled")).differences
    assert "mean_k3" in found
    assert not [name for name in found if "kl" in name]


def test_paired_intervals_are_those_of_a_loop_that_draws_the_groups_of_both_together() -> None:
    rows_a, rows_b = rows_of(0), rows_of(1, 1.3)
    groups = sorted({row["group_id"] for row in rows_a})
    sums = [
        np.array([[math.fsum(v := tokens([r for r in rows if r["group_id"] == g], "k3")), len(v)] for g in groups])
        for rows in (rows_a, rows_b)
    ]
    draws = np.random.default_rng(5).integers(0, len(groups), (4000, len(groups)))
    a, b = (side[draws].sum(1) for side in sums)
    low, high = np.quantile(b[:, 0] / b[:, 1] - a[:, 0] / a[:, 1], (0.025, 0.975))
    got = compared(audit(rows_a), audit(rows_b)).differences["mean_k3"]
    assert got.paired
    assert got.clusters == len(groups)
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_pairing_takes_out_what_a_prompt_does_to_both() -> None:
    # GIVEN prompts of very different difficulty, and an engine that makes each of them a little worse
    rows_a = rows_of(0)
    for row in rows_a:
        row["log_ratio"] = [v * (1 + int(row["group_id"][1:]) % 10) / 10 for v in row["log_ratio"]]
    rows_b = [row | {"log_ratio": [1.05 * v for v in row["log_ratio"]]} for row in rows_a]
    others = [row | {"group_id": f"other-{row['group_id']}"} for row in rows_b]
    # WHEN the same rollouts come from the same prompts, and from others
    paired = compared(audit(rows_a), audit(rows_b)).differences["mean_abs_log_ratio"]
    alone = compared(audit(rows_a), audit(others)).differences["mean_abs_log_ratio"]
    # THEN the difference is the same, but only together is it more than chance
    assert paired.difference == pytest.approx(alone.difference, rel=1e-12)
    assert (paired.paired, alone.paired) == (True, False)
    assert paired.low > 0 > alone.low


def test_swapping_the_audits_turns_the_signs() -> None:
    a, b = known(0), known(1, 1.4)
    forth, back = compared(a, b).differences, compared(b, a).differences
    assert forth.keys() == back.keys()
    for name, found in forth.items():
        other = back[name]
        assert (found.a, found.b, found.difference) == (other.b, other.a, -other.difference)
        assert (found.low, found.high) == pytest.approx((-other.high, -other.low), rel=1e-9, nan_ok=True)


def test_an_audit_does_not_differ_from_itself() -> None:
    found = compared(known(0, delta=0.05), known(0, delta=0.05))
    assert {each.difference for each in found.differences.values()} == {0.0}
    assert {(each.low, each.high) for each in found.differences.values() if each.has_interval} == {(0.0, 0.0)}
    assert found.verdict.startswith("No difference is shown: mean_kl is ")
    assert [note.split()[0] for note in found.notes if not note.startswith("Read the warnings")] == ["Each"]


@pytest.mark.parametrize("parts", [2, 7])
def test_batches_and_builders_do_not_matter(parts: int) -> None:
    rows_a, rows_b = rows_of(0), rows_of(1, 1.2)
    whole = compared(known(0), known(1, 1.2)).differences
    pieces = compared(audit(rows_a, parts), audit(rows_b, parts)).differences
    assert list(whole) == list(pieces)
    for name, found in whole.items():
        assert dataclasses.astuple(pieces[name]) == pytest.approx(dataclasses.astuple(found), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize(
    ("scale", "grade", "says", "excludes"),
    [
        (5.0, "exact", "B is further from the trainer than A: mean_kl is", "which excludes 0"),
        (0.4, "exact", "B is nearer to the trainer than A: mean_kl is", "which excludes 0"),
        (1.0, "exact", "No difference is shown: mean_kl is", "which contains 0"),
        (5.0, "sketch", "B is further from the trainer than A: mean_kl_estimate is", "which excludes 0"),
        (2.0, "sampled", "B is further from the trainer than A: mean_k3 is", "which excludes 0"),
        (2.0, "interval", "B is further from the trainer than A: mean_k3 is", "which excludes 0"),
    ],
    ids=["further", "nearer", "same", "further-sketch", "further-sampled", "further-interval"],
)
def test_the_verdict_says_who_is_further_from_the_trainer(scale: float, grade: str, says: str, excludes: str) -> None:
    found = compared(known(0, 1.0, grade, delta=0.05), known(1, scale, grade, delta=0.05))
    assert found.verdict.startswith(says)
    assert excludes in found.verdict
    decisive = found.differences[{"exact": "mean_kl", "sketch": "mean_kl_estimate"}.get(grade, "mean_k3")]
    assert f"{decisive.low:.4g} to {decisive.high:.4g}" in found.verdict
    assert f"A keeps {percent(found.differences['acceptance'].a)}" in found.verdict


def test_without_an_interval_the_verdict_says_that_it_may_be_chance() -> None:
    found = compared(known(0, groups=1), known(1, 2.0, groups=1))
    assert found.verdict.startswith(
        "B is further from the trainer than A, but there is no interval, so it may be chance"
    )
    assert NO_INTERVALS in found.notes
    assert not any(each.has_interval for each in found.differences.values())


def test_infinite_means_have_no_difference_and_no_interval() -> None:
    rows = rows_of(0)
    rows[0] |= {"response_mask": [True], "log_ratio": [0.1], "kl": [math.inf], "kl_reverse": [0.1], "tv": [0.1]}
    infinite, finite = audit(rows), known(1)
    both = compared(infinite, infinite)
    assert both.verdict == "A and B cannot be told apart: mean_kl is inf in A and inf in B."
    assert math.isnan(both.differences["mean_kl"].difference)
    one = compared(finite, infinite)
    assert one.verdict.startswith("B is further from the trainer than A, but there is no interval")
    assert one.to_dict()["differences"]["mean_kl"] | {"a": 0} == {
        "a": 0, "b": "inf", "difference": "inf", "low": None, "high": None, "paired": False, "clusters": 0
    }  # fmt: skip
    assert one.differences["mean_k3"].has_interval


def test_nothing_read_and_nothing_in_common_are_said() -> None:
    empty, exact = (SummaryBuilder(), SummaryBuilder().finish()), known(0)
    assert compared(exact, empty).verdict == "No rollouts were read in B."
    assert compared(empty, empty).verdict == "No rollouts were read in A and B."
    assert compared(empty, empty).differences == {}
    bare = SummaryBuilder()
    bare.add(pa.RecordBatch.from_pydict({"rollout_id": ["x"], "seq_max_kl": [0.5]}))
    found = compared((bare, bare.finish()), exact)
    assert found.verdict.startswith("A and B have no mean divergence in common.")
    assert set(found.differences) == {"seq_max_kl_p50", "seq_max_kl_p99", "seq_max_kl_max"}


RUN = {"model_hash": "5c1e", "dtype": "bfloat16", "head_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": RUN | {"model_hash": "77ab"}}, "The models that scored them differ"),
        ({"run": RUN | {"dtype": "float32"}}, "precision (A: bfloat16, B: float32 (head bfloat16))"),
        ({"run": None}, "precision (A: bfloat16, B: not known)"),
        ({"criteria": ["k3 <= 1"]}, "The criteria differ"),
        ({"num_warnings": 2, "warnings": [Finding("few_kept", "y")] * 2}, "Read the warnings of B first: few_kept."),
    ],
    ids=["model", "precision", "no-run", "criteria", "warnings"],
)
def test_what_stands_in_the_way_of_a_comparison_is_noted(changes: dict[str, Any], said: str) -> None:
    a = audit(rows_of(0), runs=[RUN])
    assert not [note for note in compared(a, a).notes if said in note]
    assert [note for note in compared(a, edited(a, **changes)).notes if said in note]


def test_differing_grades_policies_and_horizons_are_noted() -> None:
    a = audit(rows_of(0), horizon=20)
    mixed = [row | {"audited_policy": "raw"} for row in rows_of(1, grade="interval")]
    notes = "\n".join(compared(a, audit(mixed, horizon=30)).notes)
    assert "Grades of evidence differ (A: 120 exact; B: 120 interval)" in notes
    assert "The audited policies differ" in notes
    assert "Horizons differ (A: 20, B: 30 policy tokens)" in notes


def test_a_verdict_on_unlike_audits_says_so() -> None:
    a = audit(rows_of(0), runs=[RUN])
    assert "like for like" not in compared(a, a).verdict
    others = [row | {"group_id": f"other-{row['group_id']}", "audited_policy": "raw"} for row in rows_of(1)]
    assert compared(a, audit(others)).verdict.endswith(
        "They are not like for like: audited policies, models, precisions, prompts differ."
    )


def test_dropped_rows_are_noted_and_acceptance_is_that_of_all_rows() -> None:
    a, b = known(0, delta=0.05), audit(rows_of(1), delta=0.05, num_dropped=120)
    found = compared(a, b)
    assert [note for note in found.notes if note.startswith("Rejected rows were dropped")]
    assert found.differences["acceptance"].b == b[1].acceptance == pytest.approx(known(1, delta=0.05)[1].n_kept / 240)
    assert not found.differences["acceptance"].has_interval


@pytest.mark.parametrize(
    ("groups_a", "groups_b", "said", "paired"),
    [
        (range(30), range(30, 60), "(0 groups in both, 30 only in A, 30 only in B)", False),
        (range(30), range(20, 50), "(10 groups in both, 20 only in A, 20 only in B)", False),
        (range(30), range(5, 35), "25 groups are in both and were drawn together; 5 only in A and 5 only in B", True),
        (range(10), range(10), "With 10 groups the intervals are narrower", True),
    ],
    ids=["other-prompts", "a-third-shared", "most-shared", "few"],
)
def test_the_notes_say_which_groups_the_intervals_rest_on(
    groups_a: Any, groups_b: Any, said: str, paired: bool
) -> None:
    audits = [
        audit([row | {"group_id": f"g{list(groups)[i % len(groups)]}"} for i, row in enumerate(rows_of(seed))])
        for seed, groups in ((0, groups_a), (1, groups_b))
    ]
    found = compared(*audits)
    assert [note for note in found.notes if said in note]
    assert {each.paired for each in found.differences.values() if each.has_interval} == {paired}


def test_groups_whose_hashes_coincide_are_not_called_the_same() -> None:
    # GIVEN other prompts in B, each with the hash of one in A
    rows_a, rows_b = rows_of(0), rows_of(1)
    by_hash = {zlib.crc32(f"other-{i}".encode()) % NUM_BUCKETS: f"other-{i}" for i in range(20 * NUM_BUCKETS)}
    named = {row["group_id"]: by_hash[zlib.crc32(row["group_id"].encode()) % NUM_BUCKETS] for row in rows_a}
    a, b = audit(rows_a), audit([row | {"group_id": named[row["group_id"]]} for row in rows_b])
    assert (a[0].metrics.clusters()[0] == b[0].metrics.clusters()[0]).all()
    # WHEN they are compared, THEN nothing is said to be paired
    found = compared(a, b)
    n = len(named)
    assert [note for note in found.notes if f"(0 groups in both, {n} only in A, {n} only in B)" in note]
    assert {each.paired for each in found.differences.values() if each.has_interval} == {False}


def test_without_groups_the_notes_speak_of_sequences() -> None:
    alone = [{name: value for name, value in row.items() if name != "group_id"} for row in rows_of(0)]
    notes = " ".join(compared(audit(alone), audit(alone[:100])).notes)
    assert "sequences are in both and were drawn together" in notes
    assert "groups" not in notes


def test_a_verdict_on_an_audit_without_its_rejected_rows_says_so() -> None:
    a, b = known(0, delta=0.05), audit(rows_of(0), delta=0.05, num_dropped=120)
    assert compared(a, b).verdict.endswith("They are not like for like: rejected rows (dropped before) differ.")


def test_the_json_is_what_the_schema_says() -> None:
    report, schema = (
        json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8")) for name in ("report", "comparison")
    )
    registry: Registry[Any] = Registry().with_resource("report.schema.json", Resource.from_contents(report))
    found = compared(known(0, delta=0.05), known(1, grade="sketch", delta=0.05))
    document = json.loads(found.to_json())
    jsonschema.Draft202012Validator(schema, registry=registry).validate(document)
    assert document["a"] == json.loads(found.a.to_json())
    assert list(document) == list(schema["properties"]) == schema["required"]
    assert set(document) - {"kind", "schema_version"} == {field.name for field in dataclasses.fields(Comparison)}
    assert list(schema["$defs"]["difference"]["properties"]) == [f.name for f in dataclasses.fields(Difference)]
    broken = document | {"differences": {"mean_k3": {"a": 1.0}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema, registry=registry).validate(broken)


def test_gates_can_name_differences_and_both_reports() -> None:
    found = compared(known(0, delta=0.05), known(1, 2.0, delta=0.05))
    gates = [
        "differences.mean_k3.difference>1e-3",
        "differences.mean_k3.low>0",
        "b.acceptance<0.7",
        "a.counts.n_total<1",
    ]
    failed = check([parse_gate(gate) for gate in gates], found)
    assert [message.split(" is ")[0] for message in failed] == [
        gate.replace(">", "<").split("<")[0] for gate in gates[:3]
    ]
    assert check([parse_gate("differences.seq_max_kl_p99.low>0")], found) == [
        "differences.seq_max_kl_p99.low is not known from these data, so differences.seq_max_kl_p99.low>0 cannot be "
        "ruled out"
    ]


@pytest.mark.parametrize("grade", ["exact", "sketch", "interval", "sampled"])
def test_the_terminal_shows_the_differences_within_eighty_columns(grade: str) -> None:
    found = compared(known(0, 1e-6, grade, delta=0.05), known(1, 1e-5, grade, delta=0.05))
    text = printed(found)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    drawn, rest = found.shown()
    assert drawn
    for name, each in (drawn | rest).items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:4] == [number(each.a), number(each.b), number(each.difference)]
        assert not each.has_interval or line.endswith(f"{number(each.low)} to {number(each.high)}")


def test_the_terminal_begins_with_the_verdict_and_the_warnings_and_obeys_no_name() -> None:
    hostile = "\x1b]0;title\x07[red]x[/red]\u202e"
    a = edited(known(0), num_warnings=1, warnings=[Finding("found", f"a warning {hostile}")])
    found = compared(a, known(1, 2.0), (f"{hostile}before", "after"))
    text = printed(found, width=300)
    order = [
        found.verdict,
        "A: <U+001B>]0;title<U+0007>[red]x[/red]<U+202E>before",
        "Warning (A): a warning",
        "B: after",
        "What was read",
        "Note:",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert places[0] == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
