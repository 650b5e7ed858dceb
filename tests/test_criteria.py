"""Which criteria mean something, what decides at which grade, and what users are told where nothing does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trm_audit.criteria.grades import CRITERION_DIVERGENCES
from trm_audit.criteria.thresholds import Criteria, describe, needed_columns, resolve
from trm_audit.errors import BadInput, UsageError
from trm_audit.rollout import GRADES

ALL = {"delta_max": 0.05, "delta_avg": 0.002, "delta_total": 0.5}


def usage_error(**given: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        Criteria(**given)
    return caught.value


# Criteria that mean something


def test_without_any_criterion_the_flags_are_named() -> None:
    for given in ({}, {"undecided": "keep"}):
        for flag in ("--delta-max", "--delta-avg", "--delta-total", "--keep"):
            assert flag in usage_error(**given).next_step


def test_a_threshold_of_zero_is_a_threshold() -> None:
    assert [rule.delta for rule in Criteria(delta_max=0.0).rules] == [0.0]


@pytest.mark.parametrize("delta", [-0.01, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "flag"), [("delta_max", "--delta-max"), ("delta_avg", "--delta-avg"), ("delta_total", "--delta-total")]
)
def test_a_threshold_that_is_negative_infinite_or_no_number_is_refused(name: str, flag: str, delta: float) -> None:
    assert usage_error(**{name: delta}).place == flag


def test_a_divergence_without_its_threshold_is_refused() -> None:
    error = usage_error(delta_max=0.05, avg_of="k3")
    assert (error.place, "--delta-avg" in error.cause) == ("--avg-of", True)


@pytest.mark.parametrize("divergence", ["k1", "log_ratio", "ratio", "kl_lower", "hellinger2", "KL", ""])
def test_a_divergence_that_no_threshold_can_name_is_refused_and_expressions_are_offered(divergence: str) -> None:
    error = usage_error(delta_max=0.05, max_of=divergence)
    assert error.place == "--max-of"
    assert "kl, kl-reverse, tv, kl-estimate, abs-log-ratio, k2, k3" in error.next_step
    assert "--keep" in error.next_step


def test_divergences_are_spelled_as_columns_or_as_flags() -> None:
    assert Criteria(delta_max=1.0, max_of="abs-log-ratio") == Criteria(delta_max=1.0, max_of="abs_log_ratio")


def test_an_expression_that_cannot_be_read_is_refused_when_the_criteria_are_made() -> None:
    assert usage_error(keep="seq_max_kl <").place == "--keep"


def test_an_unknown_word_for_undecided_is_refused() -> None:
    assert usage_error(delta_max=0.05, undecided="maybe").place == "--undecided"


@pytest.mark.parametrize("grade", GRADES)
def test_criteria_survive_json_resolved_or_not(grade: str) -> None:
    criteria = Criteria(**ALL, avg_of="k3", keep="reward > 0", undecided="keep", on_estimate=True)
    for each in (criteria, resolve(criteria, {grade})):
        assert Criteria.from_json(each.to_json()) == each
    assert json.loads(criteria.to_json())["delta_max"] == 0.05


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"delta_min": 1, "defaulted": []}'])
def test_json_that_holds_no_criteria_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput, match="no criteria"):
        Criteria.from_json(text)


def test_json_written_before_estimates_could_decide_is_read_as_it_was_meant() -> None:
    criteria = Criteria(delta_max=0.05, max_of="kl", undecided="keep")
    older = json.loads(criteria.to_json())
    del older["on_estimate"]
    assert Criteria.from_json(json.dumps(older)) == criteria


@pytest.mark.parametrize("given", [{"max_of": "tv"}, {"max_of": "k2", "delta_avg": 0.1, "avg_of": "kl_reverse"}])
def test_an_estimate_cannot_decide_where_no_threshold_is_on_kl(given: dict[str, Any]) -> None:
    error = usage_error(delta_max=0.05, on_estimate=True, **given)
    assert error.place == "--on-estimate"
    assert "--max-of" in error.next_step


def test_an_estimate_cannot_decide_where_there_is_no_threshold() -> None:
    assert usage_error(keep="seq_max_kl < 1", on_estimate=True).place == "--on-estimate"


@pytest.mark.parametrize("given", [{}, {"max_of": "kl"}, {"max_of": "kl-estimate"}, {"max_of": "k2", "delta_avg": 1.0}])
@pytest.mark.parametrize("grade", GRADES)
def test_an_estimate_may_be_asked_for_of_rows_that_need_none(given: dict[str, Any], grade: str) -> None:
    criteria = Criteria(delta_max=0.05, on_estimate=True, **given)
    tells = given.get("max_of") in (None, "k2") or grade == "sketch" or (given["max_of"] == "kl" and grade != "sampled")
    if tells:
        assert resolve(criteria, [grade]).on_estimate
    else:
        with pytest.raises(UsageError, match="do not tell"):
            resolve(criteria, [grade])


# What decides at which grade


@pytest.mark.parametrize(
    ("grade", "names"),
    [
        ("exact", ("kl", "kl", "kl")),
        ("sketch", ("kl_estimate", "kl_estimate", "kl_estimate")),
        ("interval", ("k2", "k3", "k3")),
        ("sampled", ("k2", "k3", "k3")),
    ],
)
def test_the_grade_names_the_divergences_that_the_user_does_not(grade: str, names: tuple[str, ...]) -> None:
    resolved = resolve(Criteria(**ALL), [grade])
    assert (resolved.max_of, resolved.avg_of, resolved.total_of) == names
    assert resolve(resolved, [grade]) == resolved


@pytest.mark.parametrize("divergence", ["k2", "k3", "abs_log_ratio"])
def test_what_the_user_names_stays_at_every_grade_and_mixture(divergence: str) -> None:
    criteria = Criteria(delta_max=0.05, max_of=divergence)
    assert resolve(criteria, GRADES) == criteria


MIXTURES = [("exact", "sampled"), ("exact", "sketch"), ("exact", "interval"), ("interval", "sampled"), GRADES]


@pytest.mark.parametrize("grades", MIXTURES)
def test_a_mixture_of_grades_has_to_name_its_divergences(grades: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(Criteria(**ALL, avg_of="k3"), grades)
    assert ", ".join(grades) in caught.value.cause
    assert caught.value.place == "--delta-max and --delta-total"
    assert "--max-of and --total-of" in caught.value.next_step
    assert "--avg-of" not in caught.value.next_step


def test_what_is_offered_for_a_mixture_can_be_had_at_each_of_its_grades() -> None:
    with pytest.raises(UsageError, match="kl, tv, abs-log-ratio, k2 and k3 can be had here"):
        resolve(Criteria(delta_max=0.05), ["interval", "exact"])


def test_a_mixture_with_sketches_is_told_how_one_threshold_on_kl_decides_on_all_of_it() -> None:
    hint = "With kl and --on-estimate, sketched rows go by their estimate of it."
    for grades, hinted in ((["exact", "sketch"], True), (["exact", "interval"], False), (["sketch", "sampled"], False)):
        with pytest.raises(UsageError) as caught:
            resolve(Criteria(delta_max=0.05), grades)
        assert (hint in caught.value.next_step) == hinted
    named = Criteria(delta_max=0.05, max_of="kl", on_estimate=True)
    assert resolve(named, ["exact", "sketch", "interval"]) == named


def test_rows_that_know_kl_itself_are_not_judged_by_an_estimate_of_it() -> None:
    with pytest.raises(UsageError, match="exact do not tell kl_estimate") as caught:
        resolve(Criteria(delta_max=0.05, max_of="kl_estimate"), ["exact", "sketch"])
    assert "Name kl" in caught.value.next_step
    assert "--on-estimate" in caught.value.next_step


def test_an_expression_alone_fits_every_mixture() -> None:
    criteria = Criteria(keep="seq_max_k2 <= 0.05")
    assert resolve(criteria, GRADES) == criteria


def test_criteria_resolved_for_one_grade_refuse_rows_of_another() -> None:
    resolved = resolve(Criteria(delta_max=0.05), ["exact"])
    for grades in (["sampled"], ["interval"], ["exact", "sampled"]):
        with pytest.raises(UsageError, match="several grades"):
            resolve(resolved, grades)


def test_without_rows_nothing_is_decided_about_the_grade() -> None:
    criteria = Criteria(delta_max=0.05)
    assert resolve(criteria, []) == criteria


TOLD = [
    ("exact", ["kl", "kl_reverse", "tv", "abs_log_ratio", "k2", "k3"]),
    ("sketch", ["kl", "tv", "kl_estimate", "abs_log_ratio", "k2", "k3"]),
    ("interval", ["kl", "tv", "abs_log_ratio", "k2", "k3"]),
    ("sampled", ["abs_log_ratio", "k2", "k3"]),
]


@pytest.mark.parametrize(("grade", "told"), TOLD)
def test_a_divergence_that_the_grade_cannot_tell_is_refused_and_those_it_can_are_offered(
    grade: str, told: list[str]
) -> None:
    for divergence in CRITERION_DIVERGENCES:
        criteria = Criteria(delta_avg=0.05, avg_of=divergence)
        if divergence in told:
            assert resolve(criteria, [grade]) == criteria
            continue
        with pytest.raises(UsageError, match=f"rows of grade {grade} do not tell {divergence}") as caught:
            resolve(criteria, [grade])
        assert caught.value.place == "--avg-of"
        if (grade, divergence) != ("exact", "kl_estimate"):
            assert ", ".join(told[:-1]).replace("_", "-") in caught.value.next_step


def test_an_unknown_grade_is_bad_input() -> None:
    with pytest.raises(BadInput, match="guessed"):
        resolve(Criteria(delta_max=0.05), ["exact", "guessed"])


def test_the_lines_for_the_user_say_what_decides_at_which_grade() -> None:
    thresholds = Criteria(delta_max=0.05, delta_avg=0.002)
    assert describe(thresholds, ["exact"]) == ["max: kl <= 0.05 (exact)", "mean: kl <= 0.002 (exact)"]
    assert describe(thresholds, ["sampled"]) == ["max: k2 <= 0.05 (sampled)", "mean: k3 <= 0.002 (sampled)"]
    assert describe(thresholds, ["interval"]) == [
        "max: k2 <= 0.05, vetoed by kl_lower > 0.05 (interval)",
        "mean: k3 <= 0.002, vetoed by kl_lower > 0.002 (interval)",
    ]
    assert describe(Criteria(delta_max=0.05, max_of="k2", keep="a<1"), GRADES) == [
        "max: k2 <= 0.05 (exact, sketch, interval, sampled)",
        "keep: a < 1",
    ]
    assert describe(Criteria(delta_total=0.5, total_of="tv"), ["exact", "interval"]) == [
        "sum: tv <= 0.5 (exact)",
        "sum: tv_upper <= 0.5 keeps, tv_lower > 0.5 rejects, between the two --undecided mask (interval)",
    ]


def test_the_lines_for_sketches_name_the_estimate_or_say_at_which_confidence_bounds_hold() -> None:
    assert describe(Criteria(delta_max=0.05), ["sketch"]) == ["max: kl_estimate <= 0.05 (sketch)"]
    named = {"delta_max": 0.05, "max_of": "kl"}
    assert describe(Criteria(**named, on_estimate=True), ["exact", "sketch"]) == [
        "max: kl <= 0.05 (exact)",
        "max: kl_estimate <= 0.05 (sketch)",
    ]
    bounds = "max: kl_upper <= 0.05 keeps, kl_lower > 0.05 rejects, between the two --undecided mask"
    assert describe(Criteria(**named), ["sketch", "interval"]) == [
        f"{bounds}; the bounds hold at the confidence of the run (sketch)",
        f"{bounds} (interval)",
    ]
    assert describe(Criteria(**named), ["sketch"], 0.999) == [
        f"{bounds}; the bounds hold at 99.9 % confidence (sketch)"
    ]


# What has to be read


def test_only_the_columns_that_decide_are_needed() -> None:
    thresholds = Criteria(delta_max=0.05, delta_avg=0.002)
    both = ["grade", "num_tokens"]
    assert needed_columns(thresholds, ["sampled"]) == [*both, "seq_max_k2", "seq_mean_k3", "seq_argmax_k2"]
    assert needed_columns(thresholds, ["exact"]) == [*both, "seq_max_kl", "seq_mean_kl", "seq_argmax_kl"]
    assert needed_columns(Criteria(delta_total=1.0), ["interval"]) == [
        *both,
        "seq_max_kl_lower",
        "seq_sum_k3",
        "seq_sum_kl_lower",
        "seq_argmax_kl_lower",
    ]
    assert needed_columns(Criteria(delta_avg=0.05, avg_of="tv"), ["sketch"]) == [
        *both,
        "seq_max_kl_lower",
        "seq_mean_tv_lower",
        "seq_mean_tv_upper",
        "seq_argmax_kl_lower",
    ]
    assert needed_columns(Criteria(keep="reward > 0 and num_tokens > 3"), ["sampled"]) == [*both, "reward"]


def test_the_bounds_of_kl_are_not_needed_where_its_estimate_decides() -> None:
    criteria = Criteria(delta_max=0.05, max_of="kl", on_estimate=True)
    assert needed_columns(criteria, ["exact", "sketch"]) == [
        "grade",
        "num_tokens",
        "seq_max_kl",
        "seq_max_kl_lower",
        "seq_max_kl_estimate",
        "seq_argmax_kl",
        "seq_argmax_kl_lower",
        "seq_argmax_kl_estimate",
    ]


def test_columns_that_the_shard_lacks_are_named_before_anything_is_read() -> None:
    available = ["grade", "num_tokens", "seq_max_k2", "seq_mean_k3"]
    assert needed_columns(Criteria(delta_max=0.05), ["sampled"], available) == ["grade", "num_tokens", "seq_max_k2"]
    with pytest.raises(BadInput, match="seq_sum_k3"):
        needed_columns(Criteria(delta_total=0.05), ["sampled"], available)
    with pytest.raises(UsageError, match="Did you mean seq_max_k2"):
        needed_columns(Criteria(keep="seq_maxk2 < 1"), ["sampled"], available)
