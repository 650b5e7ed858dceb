"""Rows against the rules of schemas/rollout.md: what is accepted, what is not, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from some_rollouts import Row, as_table, rollout

from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.rollout import RolloutBatch, Sampling
from trm_audit.shards import schema
from trm_audit.shards.rows import RowRules, read_rows

INF, NAN = float("inf"), float("nan")


def batch_of(rows: list[Row]) -> pa.RecordBatch:
    return as_table(rows).combine_chunks().to_batches()[0]


def read(*rows: Row, rules: RowRules | None = None) -> tuple[RolloutBatch, list[RowError]]:
    return read_rows(batch_of(list(rows)), "a.parquet", np.arange(10, 10 + len(rows)), rules or RowRules())


def good(**more: Any) -> Row:
    """A row of three tokens."""
    row = {
        "rollout_id": "r",
        "prompt_ids": [5, 11],
        "response_ids": [3, 8, 1],
        "rollout_logprobs": [-0.1, -0.7, -0.01],
    }
    return {**row, **more}


def topk(ids: list[Any], logprobs: list[Any], **more: Any) -> Row:
    """A row whose second token has this list."""
    return good(rollout_topk_ids=[[3, 9], ids, [1]], rollout_topk_logprobs=[[-0.1, -2.5], logprobs, [-0.01]], **more)


FAULTS: Mapping[str, tuple[Row, str]] = {
    "top-p of zero": (good(top_p=0.0, logprobs_mode="raw"), "top_p is 0, outside (0, 1]"),
    "infinite temperature": (good(temperature=INF, logprobs_mode="raw"), "temperature is inf"),
    "NaN temperature": (good(temperature=NAN, logprobs_mode="raw"), "temperature is nan"),
    "minus infinity": (good(rollout_logprobs=[-0.1, -INF, -0.1]), "rollout_logprobs at position 1 is -inf: not finite"),
    "prompt too large": (good(prompt_ids=[5, 32]), "prompt_ids contains 32, outside 0..31"),
    "top-K id too large": (topk([8, 32], [-0.7, -2.0]), "the top-K list at position 1 names token 32, outside 0..31"),
    "top-K id negative": (topk([8, -1], [-0.7, -2.0]), "the top-K list at position 1 names token -1, outside 0..31"),
    "top-K id null": (topk([8, None], [-0.7, -2.0]), "the top-K list at position 1 names token -1, outside 0..31"),
    "top-K value null": (topk([8, 2], [-0.7, None]), "the top-K list at position 1 holds nan"),
    "top-K value positive": (topk([8, 2], [0.5, -1.0]), "the top-K list at position 1 holds 0.5"),
    "top-K empty": (topk([], []), "a top-K list is empty where response_mask is true"),
    "top-K all filler": (topk([8, 2], [-INF, -INF], logprobs_mode="processed"), "a top-K list is empty"),
    "top-K alone": (topk([8, 2], [-0.7, -2.0], rollout_logprobs=None), "top-K evidence without rollout_logprobs"),
    "temperature alone": (good(temperature=0.6), "logprobs_mode is missing, and at temperature 0.6"),
    "top-k alone": (good(top_k=20), "logprobs_mode is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_row_and_the_others_are_read(fault: str) -> None:
    bad, cause = FAULTS[fault]
    rows = [rollout(0), {**bad, "rollout_id": "bad"}, rollout(2)]
    batch, errors = read(*rows, rules=RowRules(vocab_size=32))
    assert [error.place for error in errors] == ["a.parquet, row 11 (rollout_id=bad)"]
    assert cause in errors[0].cause
    assert errors[0].next_step
    assert batch.rollout_id == ["r0000", "r0002"]
    assert batch.row_numbers.tolist() == [10, 12]


def test_each_bad_row_gets_its_first_fault() -> None:
    rows = [good(rollout_id=f"r{i}", prompt_ids=[-1 - i], rollout_logprobs=[1.0]) for i in range(3)]
    _, errors = read(*rows)
    assert [re.findall(r"-\d", error.cause)[0] for error in errors] == ["-1", "-2", "-3"]


def test_nothing_is_looked_at_outside_the_mask() -> None:
    row = topk([7, 7, 99], [0.5, NAN, -INF], rollout_logprobs=[-0.1, NAN, -0.01], response_mask=[True, False, True])
    batch, errors = read(row, rules=RowRules(vocab_size=32))
    assert errors == []
    assert batch.topk is not None
    assert batch.topk.ids.tolist() == [3, 9, 1]
    assert batch.topk.offsets.tolist() == [0, 2, 2, 3]


def test_filler_at_the_end_of_a_processed_list_says_what_a_shorter_list_says() -> None:
    filled, _ = read(topk([8, 2, 4], [-0.7, -2.0, -INF], temperature=0.5, logprobs_mode="processed"))
    shorter, _ = read(topk([8, 2], [-0.7, -2.0], temperature=0.5, logprobs_mode="processed"))
    assert filled.topk is not None
    assert shorter.topk is not None
    for name in ("ids", "logprobs", "offsets"):
        np.testing.assert_array_equal(getattr(filled.topk, name), getattr(shorter.topk, name))


def test_filler_in_the_middle_is_not_filler() -> None:
    _, errors = read(topk([8, 2, 4], [-0.7, -INF, -2.0], temperature=0.5, logprobs_mode="processed"))
    assert "is not in descending order" in errors[0].cause


def test_equal_values_may_come_in_any_order_and_a_little_rounding_is_forgiven() -> None:
    batch, errors = read(topk([8, 2], [-0.7, -0.7], rollout_logprobs=[5e-4, -0.7, -0.01]))
    assert errors == []
    assert list(batch.grade) == ["interval"]


def test_halves_may_sum_to_more_than_1_by_their_rounding() -> None:
    flat = np.full(56, -np.log(56)).astype(np.float16)
    assert np.exp(flat.astype(np.float64)).sum() > 1.001
    values = pa.array([[flat]], pa.list_(pa.list_(pa.float16())))
    batch = pa.RecordBatch.from_pydict(
        {
            "rollout_id": ["a"],
            "prompt_ids": pa.array([[1]], pa.list_(pa.int32())),
            "response_ids": pa.array([[2]], pa.list_(pa.int32())),
            "rollout_logprobs": pa.array([[flat[0]]], pa.list_(pa.float32())),
            "rollout_topk_ids": pa.array([[range(56)]], pa.list_(pa.list_(pa.int32()))),
            "rollout_topk_logprobs": values,
        }
    )
    at = batch.schema.get_field_index("rollout_topk_logprobs")
    assert read_rows(batch, "memory", np.arange(1), RowRules())[1] == []
    single = batch.set_column(at, "rollout_topk_logprobs", values.cast(pa.list_(pa.list_(pa.float32()))))
    assert "sum to 1.00" in read_rows(single, "memory", np.arange(1), RowRules())[1][0].cause


def test_several_grades_share_a_batch_and_the_best_evidence_decides() -> None:
    batch, errors = read(rollout(0), rollout(1, "interval"), {**rollout(2), "response_ids": [], "rollout_logprobs": []})
    assert errors == []
    assert list(batch.grade) == ["sampled", "interval", None]  # nothing to grade without a policy token


def test_a_row_without_policy_tokens_needs_no_evidence() -> None:
    batch, errors = read(good(response_mask=[False] * 3, rollout_logprobs=None))
    assert errors == []
    assert not batch.response_mask.any()


def test_an_empty_response_needs_no_prompt() -> None:
    batch, errors = read(good(prompt_ids=[], response_ids=[], rollout_logprobs=[]))
    assert errors == []
    assert batch.response.lengths.tolist() == [0]


def test_absent_columns_have_their_defaults() -> None:
    batch, _ = read(good())
    assert batch.sampling == [Sampling(1.0, 1.0, -1, "raw")]
    assert batch.response_mask.tolist() == [True] * 3
    assert (batch.group_id, batch.policy_version, batch.topk) == (None, None, None)


def test_given_defaults_stand_in_for_nulls_only() -> None:
    rules = RowRules(defaults=Sampling(0.6, 0.9, 20, "processed"), mode_given=True)
    rows = [good(), good(rollout_id="s", temperature=0.7, top_p=1.0, top_k=-1, logprobs_mode="tempered")]
    batch, errors = read(*rows, rules=rules)
    assert errors == []
    assert batch.sampling == [Sampling(0.6, 0.9, 20, "processed"), Sampling(0.7, 1.0, -1, "tempered")]


def test_top_k_of_0_is_off() -> None:
    batch, errors = read(good(top_k=0))
    assert errors == []
    assert not batch.sampling[0].truncates


def test_the_oldest_version_of_a_rows_policy_tokens_counts() -> None:
    rows = [good(policy_version=[3, 1, 2], response_mask=[True, False, True]), good(rollout_id="s")]
    batch, _ = read(*rows)
    assert batch.policy_version is not None
    np.testing.assert_array_equal(batch.policy_version, [2.0, NAN])


def test_slices_and_nulls_do_not_shift_what_belongs_to_a_row() -> None:
    # GIVEN a slice in the middle of a batch with null lists
    rows = [rollout(i) for i in range(6)]
    rows[2]["rollout_logprobs"], rows[2]["response_mask"] = None, [False] * len(rows[2]["response_ids"])
    whole = batch_of(rows)
    # WHEN it is read THEN each row has its own tokens and values
    batch, errors = read_rows(whole.slice(1, 4), "a", np.arange(4), RowRules())
    assert errors == []
    for i in range(4):
        start, stop = batch.response.offsets[i], batch.response.offsets[i + 1]
        assert batch.response[i].tolist() == rows[i + 1]["response_ids"]
        stored = rows[i + 1]["rollout_logprobs"] or [NAN] * int(stop - start)
        np.testing.assert_allclose(batch.rollout_logprobs[start:stop], stored, rtol=1e-6)


WIDER = {
    "rollout_id": pa.large_string(),
    "prompt_ids": pa.large_list(pa.int64()),
    "response_ids": pa.list_(pa.uint16()),
    "rollout_logprobs": pa.list_(pa.float64()),
    "temperature": pa.float32(),
    "top_k": pa.int32(),
}


def test_wider_and_narrower_types_are_the_same_row() -> None:
    row = good(temperature=0.5, top_k=5, logprobs_mode="processed")
    plain, _ = read(row)
    arrays = [pa.array([row[name]], WIDER.get(name)) for name in row]
    arrays[list(row).index("logprobs_mode")] = pa.array(["processed"]).dictionary_encode()
    other, errors = read_rows(
        pa.RecordBatch.from_arrays(arrays, names=list(row)), "a.parquet", np.arange(1), RowRules()
    )
    assert errors == []
    assert other.columns.equals(plain.columns)
    assert other.sampling == plain.sampling


def test_float16_values_are_read_and_their_step_is_known() -> None:
    row = topk([8, 2], [-0.7, -2.0])
    arrays = [pa.array([row[name]], schema.ROLLOUT_COLUMNS[name].type) for name in row]
    at = list(row).index("rollout_topk_logprobs")
    half = [[np.float16(v) for v in values] for values in row["rollout_topk_logprobs"]]
    arrays[at] = pa.array([half], pa.list_(pa.list_(pa.float16())))
    batch, errors = read_rows(pa.RecordBatch.from_arrays(arrays, names=list(row)), "a", np.arange(1), RowRules())
    assert errors == []
    assert batch.topk is not None
    assert batch.topk.step == 2.0**-11
    assert batch.topk.logprobs[2] == float(np.float16(-0.7))


def test_ids_that_int32_cannot_hold_are_refused_rather_than_wrapped() -> None:
    table = pa.table(
        {"rollout_id": ["r"], "prompt_ids": [[1]], "response_ids": [[2**32 + 1]], "rollout_logprobs": [[-1.0]]}
    )
    with pytest.raises(BadInput, match="column 'response_ids' does not fit"):
        read_rows(table.to_batches()[0], "a", np.arange(1), RowRules())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rollout_logprobs", [["a"]]),
        ("response_mask", [[0.5]]),
        ("temperature", ["hot"]),
        ("response_ids", [3]),
        ("rollout_topk_ids", [[1]]),
        ("policy_version", [0.5]),
    ],
)
def test_a_type_that_cannot_mean_the_column_is_refused(name: str, values: list[Any]) -> None:
    table = as_table([good()])
    table = table.drop_columns([name]) if name in table.column_names else table
    with pytest.raises(BadInput, match=f"column '{name}' is .*is needed"):
        read_rows(table.append_column(name, pa.array(values)).to_batches()[0], "a", np.arange(1), RowRules())


def test_a_column_of_nulls_is_no_column() -> None:
    table = as_table([good()]).append_column("rollout_topk_ids", pa.nulls(1)).append_column("reward", pa.nulls(1))
    batch, errors = read_rows(table.to_batches()[0], "a", np.arange(1), RowRules())
    assert errors == []
    assert batch.columns.schema.field("reward").type == pa.float64()


def test_unknown_columns_are_untouched() -> None:
    note = pa.array([{"a": [1, 2], "b": "x"}])
    batch, _ = read_rows(as_table([good()]).append_column("note", note).to_batches()[0], "a", np.arange(1), RowRules())
    assert batch.columns.column("note").equals(note)


def test_renaming_reads_their_column_as_ours() -> None:
    table = as_table([good()]).rename_columns(["id", "prompt", "response_ids", "lp"])
    ours = {"rollout_id": "id", "prompt_ids": "prompt", "rollout_logprobs": "lp"}
    assert schema.renamed(table.schema, ours, "a") == list(good())


def test_renaming_to_a_name_that_is_there_is_refused() -> None:
    with pytest.raises(UsageError, match="'prompt_ids' is there twice"):
        schema.renamed(as_table([good()]).schema, {"prompt_ids": "response_ids"}, "a")


def test_renaming_a_column_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(BadInput, match=r"'lp' named by --column is not there\n.*rollout_logprobs"):
        schema.renamed(as_table([good()]).schema, {"rollout_logprobs": "lp"}, "a")


def test_stored_trainer_values_are_needed_where_they_are_asked_for_and_not_elsewhere() -> None:
    rows = [good(trainer_logprobs=[-0.1, 9.0, -0.1]), good(rollout_id="s")]
    _, errors = read(*rows, rules=RowRules(stored_trainer=True))
    assert [error.cause.split(" ")[0] for error in errors] == ["trainer_logprobs", "trainer_logprobs"]
    _, errors = read(*rows)
    assert errors == []
