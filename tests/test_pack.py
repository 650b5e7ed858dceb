"""Packed rollouts are what their full logits say they are, the input stays as it was, and a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from some_rollouts import VOCAB, Row, as_table, log_softmax, rollout, write_shard
from test_sketch import hashed

from trm_audit.engine.packing import Target, copy_loss
from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.pipeline.pack import pack
from trm_audit.pipeline.pack_options import PackOptions, PackResult
from trm_audit.pipeline.progress import Silent
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.pipeline.validate import ValidateOptions, validate
from trm_audit.rollout import Sampling
from trm_audit.shards.logits import StoredLogits
from trm_audit.shards.rollout_writer import LogitsTableWriter, write_rollout_table
from trm_audit.shards.sketches import sketch_columns

TARGETS = ("sketch:5,64", "topk:5", "sampled", "q16")
HALF = 2.0**-11
STAGES = {
    "plain": {},
    "raw, tempered": {"temperature": 0.7, "logprobs_mode": "raw"},
    "raw, truncated": {"temperature": 1.3, "top_p": 0.8, "top_k": 20, "logprobs_mode": "raw"},
    "tempered": {"temperature": 0.7, "logprobs_mode": "tempered"},
    "tempered, truncated": {"temperature": 0.7, "top_k": 9, "logprobs_mode": "tempered"},
    "processed": {"temperature": 0.7, "top_k": 9, "logprobs_mode": "processed"},
}


def exact_row(index: int, stage: str = "plain", length: int = 6) -> Row:
    """A row whose tokens are among those that its settings leave, with logits of the stage that it says."""
    row = rollout(index, "exact", length, **STAGES[stage])
    settings = Sampling(**STAGES[stage])  # type: ignore[arg-type]
    logits = np.round(row["logits"] * 8, 2)
    if settings.logprobs_mode != "raw":
        logits = logits / settings.temperature
    if settings.logprobs_mode == "processed":
        kth = np.sort(logits, axis=1)[:, -settings.top_k][:, None]
        logits = np.where(logits >= kth, logits, -np.inf)
    row["logits"] = logits.astype(np.float32)
    row["response_ids"] = logits.argmax(1).tolist()
    row["rollout_logprobs"] = log_softmax(row["logits"]).max(1).tolist()
    return row


def by_definition(row: Row) -> np.ndarray:
    """log pi_roll [T, V] of a row in float64: what its settings still ask for, in plain numpy."""
    settings = Sampling(
        **{name: row[name] for name in ("temperature", "top_p", "top_k", "logprobs_mode") if name in row}
    )
    x = row["logits"].astype(np.float64)
    if settings.logprobs_mode == "raw":
        x = x / settings.temperature
    out = []
    for values in x:
        order = np.argsort(-values, kind="stable")
        if settings.logprobs_mode != "processed" and settings.top_k > 0:
            order = order[: settings.top_k]
        if settings.logprobs_mode != "processed" and settings.top_p < 1:
            p = np.exp(values[order] - values.max())
            p = p / p.sum()
            order = order[np.cumsum(p) - p < settings.top_p]
        kept = np.full(len(values), -np.inf)
        kept[order] = values[order]
        out.append(kept)
    return log_softmax(np.array(out))


def write(folder: Path, *shards: list[Row]) -> Path:
    for k, rows in enumerate(shards):
        write_shard(folder / f"part-{k}.parquet", rows)
    return folder


def run_pack(source: Path, output: Path, to: str, **settings: Any) -> PackResult:
    seed = settings.pop("seed", 1)
    return pack([str(source)], str(output), PackOptions(to=Target.parse(to, seed), **settings))


def rows_of(folder: Path) -> list[Row]:
    return [row for file in sorted((folder / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a reader sees of an output: tables of its shards, and of the full logits beside them."""
    out: dict[str, Any] = {}
    for name in ("data", "logits"):
        for file in sorted((folder / name).glob("*")):
            out[f"{name}/{file.name}"] = pq.read_table(file).replace_schema_metadata()
    return out


def mixed_rows() -> list[Row]:
    """Rows of every grade, one without a policy token, an empty response, tool tokens, and rows of other stages."""
    masked = exact_row(3, "raw, truncated", 9)
    masked["response_mask"] = [t not in (0, 4, 5) for t in range(9)]
    tools = exact_row(4, length=5)
    tools["response_mask"] = [False] * 5
    listed = rollout(5, "interval", 7)
    return [
        exact_row(0),
        exact_row(1, "raw, truncated"),
        exact_row(2, "processed"),
        masked,
        tools,
        listed,
        rollout(6),
        rollout(7, length=0),
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_a_sketch_is_that_of_the_rebuilt_policy_within_float16(tmp_path: Path, stage: str) -> None:
    # GIVEN a rollout whose logits are stored at some stage
    row = exact_row(0, stage)
    # WHEN it is packed
    run_pack(write(tmp_path / "in", [row]), tmp_path / "out", "sketch:5,64", seed=9)
    (found,) = rows_of(tmp_path / "out")
    # THEN everything in it is what pi_roll gives in float64, by the definition
    logp = by_definition(row)
    wanted = np.array([{i for i in np.argsort(-row)[:5] if row[i] > -np.inf} for row in logp])
    for t, at in enumerate(logp):
        ids, values = found["rollout_topk_ids"][t], np.array(found["rollout_topk_logprobs"][t], np.float64)
        np.testing.assert_allclose(np.sort(at[ids])[::-1], np.sort(at[list(wanted[t])])[::-1])
        np.testing.assert_allclose(values, at[ids], rtol=HALF, atol=1e-6)
        tail = at.copy()
        tail[ids] = -np.inf
        assert found["rollout_tail_mass"][t] == pytest.approx(np.exp(tail).sum(), rel=1e-5, abs=1e-30)
        projected = np.exp(tail / 2) @ hashed(VOCAB, 64, 9) / 8
        vector = np.frombuffer(found["rollout_sketch"], "<f2").reshape(-1, 64)[t]
        np.testing.assert_allclose(vector, projected, rtol=HALF, atol=2e-6)
        there = at[at > -np.inf]
        assert found["rollout_entropy"][t] == pytest.approx(-(np.exp(there) * there).sum(), rel=1e-5, abs=1e-6)
    assert (found["sketch_dim"], found["sketch_seed"], found["sketch_vocab_size"]) == (64, 9, VOCAB)
    assert found["logprobs_mode"] == "processed"


def test_real_logits_of_a_large_vocabulary_keep_their_kl_in_270_bytes(tmp_path: Path) -> None:
    # GIVEN the raw float16 logits of a real engine
    source = Path(__file__).parent.parent / "sample_data" / "smollm2" / "full"
    logits = load_file(source / "logits-00000.safetensors")
    # WHEN they are packed
    result = run_pack(source, tmp_path / "out", "sketch:20,64")
    # THEN projections and tails are those of the definition in float64
    assert result.bytes_after < 300 * result.num_tokens < result.bytes_before / 300
    matrix = hashed(49152, 64, 1).astype(np.float64) / 8
    found = {row["rollout_id"]: row for row in rows_of(tmp_path / "out")}
    assert set(found) == set(logits)
    for name, values in logits.items():
        logp = log_softmax(values)
        for t, row in enumerate(logp):
            row[found[name]["rollout_topk_ids"][t]] = -np.inf
            assert found[name]["rollout_tail_mass"][t] == pytest.approx(np.exp(row).sum(), rel=1e-5)
        vectors = np.frombuffer(found[name]["rollout_sketch"], "<f2").reshape(len(logp), 64)
        np.testing.assert_allclose(vectors, np.exp(logp / 2) @ matrix, rtol=HALF, atol=2e-5)


@pytest.mark.parametrize("to", ["sketch:5,64", "topk:5", "sampled"])
def test_tokens_get_the_log_probabilities_of_pi_roll_and_what_was_stored_is_kept(tmp_path: Path, to: str) -> None:
    rows = [exact_row(0), exact_row(1, "raw, truncated"), exact_row(2, "processed"), exact_row(3, "raw, tempered")]
    del rows[3]["rollout_logprobs"]
    run_pack(write(tmp_path / "in", rows), tmp_path / "out", to)
    found = rows_of(tmp_path / "out")
    for row, packed in zip(rows, found, strict=True):
        logp = by_definition(row)[np.arange(6), row["response_ids"]]
        np.testing.assert_allclose(packed["rollout_logprobs"], logp, atol=2e-6)
    # only where the stage is another has the column been replaced
    assert [row["rollout_logprobs_stored"] is not None for row in found] == [False, True, False, False]
    np.testing.assert_allclose(found[1]["rollout_logprobs_stored"], rows[1]["rollout_logprobs"], rtol=1e-6)
    assert found[0]["rollout_logprobs"] == pytest.approx(rows[0]["rollout_logprobs"], rel=1e-7)
    assert [row["temperature"] for row in found] == [1.0, 1.3, 0.7, 0.7]
    assert [(row["top_p"], row["top_k"]) for row in found] == [(1.0, -1), (0.8, 20), (1.0, 9), (1.0, -1)]


@pytest.mark.parametrize("stage", STAGES)
def test_lists_are_the_most_probable_tokens_without_filler(tmp_path: Path, stage: str) -> None:
    row = exact_row(0, stage)
    run_pack(write(tmp_path / "in", [row]), tmp_path / "out", "topk:12")
    (found,) = rows_of(tmp_path / "out")
    for at, ids, values in zip(
        by_definition(row), found["rollout_topk_ids"], found["rollout_topk_logprobs"], strict=True
    ):
        there = np.sort(at[at > -np.inf])[::-1][:12]
        np.testing.assert_allclose(at[ids], there)
        np.testing.assert_allclose(values, there, rtol=HALF, atol=1e-6)
    assert "rollout_sketch" not in found
    assert found["logprobs_mode"] == "processed"


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()], ids=str)
def test_longer_lists_are_cut_and_stay_as_finely_rounded_as_they_were(tmp_path: Path, kind: pa.DataType) -> None:
    # GIVEN lists of 5 in a type that says how far they are rounded, beside a row with full logits
    rows = [rollout(0, "interval", 4), exact_row(1), rollout(2, length=3)]
    rows[0]["response_mask"] = [True, False, True, True]
    table = as_table(rows)
    at = table.schema.get_field_index("rollout_topk_logprobs")
    table = table.set_column(at, "rollout_topk_logprobs", table.column(at).cast(pa.list_(pa.list_(kind))))
    write(tmp_path / "in", [rows[1]])  # for its side file
    write_rollout_table(tmp_path / "in" / "part-0.parquet", table)
    # WHEN they are packed to lists of 3
    result = run_pack(tmp_path / "in", tmp_path / "out", "topk:3")
    written = pq.read_table(tmp_path / "out" / "data" / "part-0.parquet")
    # THEN the three largest of each are there, in the same type, and bytes of the others are gone
    assert written.schema.field("rollout_topk_logprobs").type == pa.list_(pa.list_(kind))
    stored = table["rollout_topk_logprobs"][0].as_py()
    cut = [values[:3] if mine else [] for values, mine in zip(stored, rows[0]["response_mask"], strict=True)]
    assert written["rollout_topk_logprobs"][0].as_py() == cut
    assert [len(ids) for ids in written["rollout_topk_ids"][0].as_py()] == [3, 0, 3, 3]
    assert written["rollout_topk_ids"][2].as_py() is None
    assert (result.packed, result.left) == (2, 1)
    assert written["logprobs_mode"].to_pylist() == ["raw", "processed", "raw"]


def test_lists_that_are_short_enough_are_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [rollout(0, "interval", 4)])
    result = run_pack(source, tmp_path / "out", "topk:5")
    assert (result.packed, result.left) == (0, 1)
    (found,), (given,) = rows_of(tmp_path / "out"), pq.read_table(source / "part-0.parquet").to_pylist()
    assert found["rollout_topk_logprobs"] == given["rollout_topk_logprobs"]


def test_a_sketch_packs_down_to_a_list_and_to_sampled_values(tmp_path: Path) -> None:
    run_pack(write(tmp_path / "in", [exact_row(0)]), tmp_path / "sketched", "sketch:8,64")
    listed = run_pack(tmp_path / "sketched", tmp_path / "listed", "topk:3")
    sampled = run_pack(tmp_path / "sketched", tmp_path / "sampled", "sampled")
    assert (listed.packed, sampled.packed, sampled.left) == (1, 1, 0)
    (whole,), (some,), (least,) = (rows_of(tmp_path / name) for name in ("sketched", "listed", "sampled"))
    assert some["rollout_topk_ids"] == [ids[:3] for ids in whole["rollout_topk_ids"]]
    assert some["rollout_topk_logprobs"] == [values[:3] for values in whole["rollout_topk_logprobs"]]
    assert not [name for name in some if name.startswith("sketch_")]
    assert not [name for name in least if name.startswith(("sketch_", "rollout_topk", "rollout_sketch"))]
    assert least["rollout_logprobs"] == whole["rollout_logprobs"]


def test_q16_halves_the_logits_within_its_bound_and_the_footer_finds_them(tmp_path: Path) -> None:
    rows = [exact_row(0), exact_row(1, "processed"), exact_row(2, "raw, truncated", 70)]
    source = write(tmp_path / "in", rows[:2], rows[2:])
    result = run_pack(source, tmp_path / "out", "q16")
    worst, total = 0.0, 0.0
    for k, part in enumerate((rows[:2], rows[2:])):
        footer = pq.read_metadata(tmp_path / "out" / "data" / f"part-{k}.parquet").metadata
        assert json.loads(footer[b"trm_audit.logits"]) == [f"../logits/logits-part-{k}.parquet"]
        copy = StoredLogits([tmp_path / "out" / "logits" / f"logits-part-{k}.parquet"])
        for row in part:
            p, q = log_softmax(row["logits"]), copy.rows(row["rollout_id"], 0, len(row["logits"])).double().numpy()
            np.testing.assert_array_equal(np.isneginf(p), np.isneginf(q))
            q = q - np.log(np.exp(q).sum(1, keepdims=True))
            there = p > -np.inf
            off = np.where(there, q, 0) - np.where(there, p, 0)
            kl = (np.exp(p) * (np.expm1(off) - off)).sum(1)
            span = p.max(1) - p.min(1, where=there, initial=0.0)
            assert (kl <= np.square(span / 65535) / 12 + 1e-12).all()
            worst, total = max(worst, kl.max()), total + kl.sum()
    assert result.num_copied == 82
    assert result.kl_max == pytest.approx(worst, rel=0.05)
    assert result.kl_sum == pytest.approx(total, rel=0.05)
    assert [row["logprobs_mode"] for row in rows_of(tmp_path / "out")] == ["raw", "processed", "raw"]
    assert validate([str(tmp_path / "out")], ValidateOptions()).errors == []


def test_a_copy_that_is_not_one_is_noticed(tmp_path: Path) -> None:
    row = exact_row(0)
    sides = {}
    for name, moved in (("good", 0.0), ("bad", 1e-3)):
        file = tmp_path / f"logits-{name}.parquet"
        logits = row["logits"] + moved * np.arange(VOCAB, dtype=np.float32)
        with LogitsTableWriter(file, "q16") as writer:
            writer.add("r0000", logits)
        sides[name] = StoredLogits([file])
    stored = write(tmp_path / "in", [row]) / "logits-part-0.parquet"
    for name, holds in (("good", True), ("bad", False)):
        kl, most = copy_loss(StoredLogits([stored]), sides[name], "r0000", 6, None)
        assert (kl <= most).all() == holds


@pytest.mark.parametrize("to", TARGETS)
def test_rows_of_every_kind_keep_their_place_and_their_other_columns(tmp_path: Path, to: str) -> None:
    rows = [{**row, "note": f"note {i}"} for i, row in enumerate(mixed_rows())]
    source = write(tmp_path / "in", rows)
    before = pq.read_table(source / "part-0.parquet").to_pylist()
    result = run_pack(source, tmp_path / "out", to)
    after = rows_of(tmp_path / "out")
    for name in ("rollout_id", "group_id", "prompt_ids", "response_ids", "response_mask", "reward", "note"):
        assert [row[name] for row in after] == [row[name] for row in before]
    lists_go = to in ("sampled",)
    assert (result.rows, result.packed, result.left) == (8, 5 if lists_go else 4, 1 if lists_go else 2)
    checked = validate([str(tmp_path / "out")], ValidateOptions())
    assert checked.errors == []
    grades = {"sketch:5,64": "sketch", "topk:5": "interval", "sampled": "sampled", "q16": "exact"}
    assert checked.grades[grades[to]] >= 4
    # a row that had nothing to pack says what it said
    for row in (6, 7):
        for name in ("rollout_logprobs", "rollout_topk_ids", "rollout_sketch"):
            assert after[row].get(name) == before[row].get(name)


def test_long_responses_with_tool_tokens_are_packed_position_by_position(tmp_path: Path) -> None:
    # GIVEN a response of several stored blocks, some of whose tokens a tool wrote
    row = exact_row(0, "raw, truncated", 200)
    row["response_mask"] = [not (t % 7 == 3 or 60 <= t < 130) for t in range(200)]
    run_pack(write(tmp_path / "in", [row]), tmp_path / "out", "sketch:3,64")
    (found,) = rows_of(tmp_path / "out")
    # THEN each of the others has its own
    logp = by_definition(row)
    for t in np.flatnonzero(row["response_mask"]):
        ids = found["rollout_topk_ids"][t]
        assert found["rollout_logprobs"][t] == pytest.approx(logp[t][row["response_ids"][t]], abs=2e-6)
        assert found["rollout_tail_mass"][t] == pytest.approx(1 - np.exp(logp[t][ids]).sum(), abs=1e-6)
        assert ids[0] == np.argmax(logp[t])


def test_positions_that_the_policy_did_not_sample_stay_empty(tmp_path: Path) -> None:
    rows = mixed_rows()
    run_pack(write(tmp_path / "in", rows), tmp_path / "out", "sketch:5,64")
    found = rows_of(tmp_path / "out")
    vectors = np.frombuffer(found[3]["rollout_sketch"], "<f2").reshape(9, 64)
    for t in range(9):
        assert bool(vectors[t].any()) == rows[3]["response_mask"][t]
        assert bool(found[3]["rollout_topk_ids"][t]) == rows[3]["response_mask"][t]
    assert found[4]["rollout_sketch"] is None  # not one token is the policy's
    assert found[7]["response_ids"] == []


@pytest.mark.parametrize("to", TARGETS)
def test_the_input_is_not_touched(tmp_path: Path, to: str) -> None:
    source = write(tmp_path / "in", mixed_rows(), [exact_row(20)])
    before = hashes(source)
    run_pack(source, tmp_path / "out", to)
    assert hashes(source) == before


@pytest.mark.parametrize("to", TARGETS)
def test_packing_twice_is_packing_once(tmp_path: Path, to: str) -> None:
    source = write(tmp_path / "in", mixed_rows(), [exact_row(20)])
    first = run_pack(source, tmp_path / "out", to)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.parquet")}
    again = run_pack(source, tmp_path / "out", to)
    assert (first.shards, first.done, again.shards, again.done, again.complete) == (2, 0, 0, 2, True)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.parquet")} == before
    assert again.to_json() == first.to_json()


class Killed(BaseException):
    """Stands for whatever ends a process: not an Exception, so nothing handles it."""


class EndsAfter(Silent):
    """Ends a stage after so many batches: their rows are written, their shard is not yet published."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def advance(self, tokens: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_run_that_was_ended_in_any_shard_goes_on_to_the_same_output(tmp_path: Path, to: str, batches: int) -> None:
    source = write(tmp_path / "in", *([exact_row(i), rollout(i + 50)] for i in range(3)))
    options = PackOptions(to=Target.parse(to))
    with pytest.raises(Killed):
        pack([str(source)], str(tmp_path / "out"), options, progress=EndsAfter(batches))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    result = run_pack(source, tmp_path / "out", to)
    whole = run_pack(source, tmp_path / "undisturbed", to)
    assert (result.done, result.shards, result.complete) == (batches, 3 - batches, True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert result.to_json() == whole.to_json()


KILL = """
import os, signal, sys
from trm_audit.engine.packing import Target
from trm_audit.pipeline.pack import pack
from trm_audit.pipeline.pack_options import PackOptions
from trm_audit.pipeline.progress import Silent

class Kill(Silent):
    left = 1
    def advance(self, tokens):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

pack([sys.argv[1]], sys.argv[2], PackOptions(to=Target.parse("q16")), progress=Kill())
"""


def test_sigkill_while_logits_are_written_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    # GIVEN a process that is ended in its second shard, whose logits are half-written
    source = write(tmp_path / "in", *([exact_row(i)] for i in range(3)))
    killed = subprocess.run([sys.executable, "-c", KILL, source, tmp_path / "out"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "out" / "logits").glob("*.partial"))
    # WHEN the same command runs again THEN the output is as if it had not happened
    assert run_pack(source, tmp_path / "out", "q16").done == 1
    run_pack(source, tmp_path / "undisturbed", "q16")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_logits_that_are_gone_are_written_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [exact_row(0)], [exact_row(1)])
    run_pack(source, tmp_path / "out", "q16")
    side = tmp_path / "out" / "logits" / "logits-part-1.parquet"
    side.unlink()
    result = run_pack(source, tmp_path / "out", "q16")
    assert (result.done, result.shards) == (1, 1)
    assert side.is_file()


def test_other_settings_are_refused_and_overwrite_takes_the_old_logits_away(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [exact_row(0)])
    run_pack(source, tmp_path / "out", "q16")
    with pytest.raises(BadInput, match=r"was made with another recipe(.|\n)*--overwrite"):
        run_pack(source, tmp_path / "out", "sketch:5,64")
    run_pack(source, tmp_path / "out", "sketch:5,64", overwrite=True)
    assert not (tmp_path / "out" / "logits").exists()
    with pytest.raises(BadInput, match="another recipe"):
        run_pack(source, tmp_path / "out", "sketch:5,64", seed=2)


@pytest.mark.parametrize("output", ["in", "in/packed", "."])
def test_an_output_that_is_the_input_or_shares_its_folder_is_refused(tmp_path: Path, output: str) -> None:
    source = write(tmp_path / "in", [exact_row(0)])
    before = hashes(tmp_path)
    with pytest.raises(UsageError, match="the input is never touched"):
        run_pack(source, tmp_path / output, "sampled", overwrite=True)
    assert hashes(tmp_path) == before


def test_packed_folders_can_be_packed_again_and_not_into_themselves(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [exact_row(0)])
    run_pack(source, tmp_path / "q16", "q16")
    with pytest.raises(UsageError, match="the input is never touched"):
        run_pack(tmp_path / "q16", tmp_path / "q16", "sampled", overwrite=True)
    run_pack(tmp_path / "q16", tmp_path / "sketched", "sketch:5,64")
    run_pack(source, tmp_path / "direct", "sketch:5,64")
    (far,), (near,) = rows_of(tmp_path / "sketched"), rows_of(tmp_path / "direct")
    assert far["rollout_topk_ids"] == near["rollout_topk_ids"]
    np.testing.assert_allclose(far["rollout_tail_mass"], near["rollout_tail_mass"], rtol=1e-3)


@pytest.mark.parametrize("to", TARGETS)
def test_bad_rows_are_refused_with_their_place_or_left_out_one_by_one(tmp_path: Path, to: str) -> None:
    # GIVEN rows of which one is no distribution at one position
    bad = exact_row(1, "raw, tempered")
    del bad["rollout_logprobs"]
    rows = [exact_row(0), bad, exact_row(2)]
    file = write(tmp_path / "in", rows) / "logits-part-0.parquet"
    table = pq.read_table(file)
    blocks = table["data"].to_pylist()
    values = np.frombuffer(blocks[1], "<f4").copy()
    values[3 * VOCAB] = np.nan
    blocks[1] = values.tobytes()
    pq.write_table(table.set_column(5, "data", pa.array(blocks, pa.large_binary())), file)
    # WHEN it is packed THEN the error names the row, and --skip-bad packs the others
    with pytest.raises(RowError, match="position 3 contain NaN") as caught:
        run_pack(tmp_path / "in", tmp_path / "out", to)
    assert "rollout_id=r0001" in caught.value.place
    assert not list((tmp_path / "out" / "data").iterdir())
    result = run_pack(tmp_path / "in", tmp_path / "out", to, skip_bad=True)
    assert (result.rows, result.packed, result.num_skipped, result.complete) == (2, 2, 1, True)
    assert [row["rollout_id"] for row in rows_of(tmp_path / "out")] == ["r0000", "r0002"]
    assert "r0001" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert validate([str(tmp_path / "out")], ValidateOptions()).errors == []


def test_a_token_that_its_logits_exclude_cannot_be_packed(tmp_path: Path) -> None:
    row = exact_row(0)
    row["logits"][2, row["response_ids"][2]] = -np.inf
    source = write(tmp_path / "in", [row])
    for to in ("sketch:5,64", "topk:5"):
        with pytest.raises(RowError, match="position 2 of response_ids has probability 0"):
            run_pack(source, tmp_path / "out", to, overwrite=True)


def test_q16_of_a_long_response_is_written_in_pieces_and_a_fault_in_a_late_one_leaves_out_the_row(
    tmp_path: Path,
) -> None:
    # GIVEN two responses longer than what is copied at once, of which one is damaged near its end
    rows = [exact_row(0, length=600), exact_row(1, length=600)]
    source = write(tmp_path / "in", rows)
    run_pack(source, tmp_path / "whole", "q16")
    rows[1]["logits"][590, 0] = -1e4
    run_pack(write(tmp_path / "damaged", rows), tmp_path / "out", "q16", skip_bad=True)
    # THEN pieces make the same table as one, and of the damaged row nothing can be found
    with LogitsTableWriter(tmp_path / "logits-once.parquet", "q16") as writer:
        for row in rows[:1]:
            writer.add(row["rollout_id"], row["logits"])
    once, whole = (pq.read_table(file) for file in (tmp_path / "logits-once.parquet", side_of(tmp_path / "whole")))
    assert whole.slice(0, once.num_rows) == once
    assert [row["rollout_id"] for row in rows_of(tmp_path / "out")] == ["r0000"]
    assert validate([str(tmp_path / "out")], ValidateOptions()).errors == []


def side_of(folder: Path) -> Path:
    return folder / "logits" / "logits-part-0.parquet"


def test_logits_too_far_apart_for_q16_are_a_fault_of_their_row(tmp_path: Path) -> None:
    row = exact_row(1)
    row["logits"][0, 0] = -1e4
    source = write(tmp_path / "in", [exact_row(0), row])
    with pytest.raises(RowError, match="span") as caught:
        run_pack(source, tmp_path / "out", "q16")
    assert "row 1 (rollout_id=r0001)" in caught.value.place
    assert run_pack(source, tmp_path / "out", "q16", skip_bad=True).num_skipped == 1


def test_a_token_beyond_the_stored_columns_is_refused(tmp_path: Path) -> None:
    row = exact_row(0)
    row["response_ids"][1] = VOCAB
    with pytest.raises(RowError, match=f"contains {VOCAB}, the stored logits have {VOCAB} columns"):
        run_pack(write(tmp_path / "in", [row]), tmp_path / "out", "sketch:5,64")


def test_a_damaged_shard_is_left_out_where_that_is_wanted(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [exact_row(0)], [exact_row(1)])
    (source / "part-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadInput, match=r"part-0\.parquet"):
        run_pack(source, tmp_path / "out", "sketch:5,64")
    result = run_pack(source, tmp_path / "out", "sketch:5,64", skip_bad=True)
    assert (result.bad_shards, result.shards, result.complete) == (1, 1, True)


def test_settings_and_names_given_for_the_input_need_not_be_given_for_the_output(
    tmp_path: Path, checkpoint: Path
) -> None:
    # GIVEN rows that call their response otherwise and do not say how they were sampled
    row = exact_row(0, "raw, tempered")
    plain = rollout(1)
    for one in (row, plain):
        one["tokens"] = one.pop("response_ids")
        one.pop("temperature", None)
        one.pop("logprobs_mode", None)
    source = write(tmp_path / "in", [row, plain])
    given: dict[str, Any] = {
        "columns": {"response_ids": "tokens"},
        "defaults": Sampling(0.7, 1.0, -1, "raw"),
        "mode_given": True,
    }
    # WHEN they are packed and scored THEN neither has to be told to score
    run_pack(source, tmp_path / "out", "sketch:20,64", **given)
    score([str(tmp_path / "out")], str(tmp_path / "packed"), ScoreOptions(model=checkpoint))
    score([str(source)], str(tmp_path / "exact"), ScoreOptions(model=checkpoint, **given))
    near, exact = rows_of(tmp_path / "packed"), rows_of(tmp_path / "exact")
    assert [one["audited_policy"] for one in near] == [one["audited_policy"] for one in exact] == ["sampling", "raw"]
    for mine, theirs in zip(near, exact, strict=True):
        np.testing.assert_allclose(mine["log_ratio"], theirs["log_ratio"], atol=1e-5)


def test_padding_columns_are_cut_off(tmp_path: Path) -> None:
    row = exact_row(0)
    wide = {**row, "logits": np.concatenate([row["logits"], np.full((6, 8), 3.0, np.float32)], axis=1)}
    run_pack(write(tmp_path / "wide", [wide]), tmp_path / "cut", "sketch:5,64", vocab_size=VOCAB)
    run_pack(write(tmp_path / "in", [row]), tmp_path / "out", "sketch:5,64")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "out")
    run_pack(tmp_path / "wide", tmp_path / "q16", "q16", vocab_size=VOCAB)
    assert StoredLogits([tmp_path / "q16" / "logits" / "logits-part-0.parquet"]).vocab_size("r0000") == VOCAB


def test_half_and_bfloat16_logits_are_packed_as_they_are_read(tmp_path: Path) -> None:
    row = exact_row(0)
    for encoding in ("float16", "bfloat16"):
        folder = tmp_path / encoding
        write_shard(folder / "part-0.parquet", [row])
        halves = row["logits"].astype(np.float16)
        patterns = (row["logits"].view(np.uint32) >> 16).astype(np.uint16)
        with LogitsTableWriter(folder / "logits-part-0.parquet", encoding) as writer:  # type: ignore[arg-type]
            writer.add("r0000", halves if encoding == "float16" else patterns)
        stored = StoredLogits([folder / "logits-part-0.parquet"]).rows("r0000", 0, 6).double().numpy()
        run_pack(folder, tmp_path / f"{encoding}-q16", "q16")
        run_pack(folder, tmp_path / f"{encoding}-sketch", "sketch:5,64")
        copy = StoredLogits([tmp_path / f"{encoding}-q16" / "logits" / "logits-part-0.parquet"]).rows("r0000", 0, 6)
        np.testing.assert_allclose(copy.double().numpy(), log_softmax(stored), atol=2e-4)
        (found,) = rows_of(tmp_path / f"{encoding}-sketch")
        logp = log_softmax(stored)
        for t in range(6):
            values, ids = found["rollout_topk_logprobs"][t], found["rollout_topk_ids"][t]
            np.testing.assert_allclose(np.array(values, np.float64), logp[t][ids], rtol=HALF, atol=1e-6)


def near_20(index: int) -> Row:
    """A row whose logits are of the size of an engine's, where half precision rounds by more than a list's does."""
    row = rollout(index, "exact", 40)
    row["logits"] = np.random.default_rng([index, 2]).normal(20, 1, (40, VOCAB)).astype(np.float32)
    row["response_ids"] = row["logits"].argmax(1).tolist()
    row["rollout_logprobs"] = log_softmax(row["logits"]).max(1).astype(np.float32).tolist()
    return row


def write_rounded(folder: Path, rows: list[Row], encoding: Any) -> Path:
    """A shard whose logits were rounded when they were stored; the sampled values are the engine's own."""
    write_shard(folder / "part-0.parquet", rows)
    with LogitsTableWriter(folder / "logits-part-0.parquet", encoding) as writer:
        for row in rows:
            if encoding == "bfloat16":
                bits = torch.from_numpy(row["logits"]).bfloat16().view(torch.uint16)
                writer.add(row["rollout_id"], bits.numpy())
            else:
                writer.add(row["rollout_id"], row["logits"].astype("f2" if encoding == "float16" else "f4"))
    return folder


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", ["sketch:5,64", "topk:5"])
def test_values_disagree_with_packed_rollouts_where_they_did_with_full_logits(
    tmp_path: Path, checkpoint: Path, encoding: str, to: str
) -> None:
    # GIVEN an engine's own values beside logits that were rounded after they were taken, and one value that is wrong
    rows = [near_20(0), near_20(1)]
    rows[1]["rollout_logprobs"][7] -= 2.0
    source = write_rounded(tmp_path / "in", rows, encoding)
    # WHEN they are packed and scored
    run_pack(source, tmp_path / "out", to)
    score([str(source)], str(tmp_path / "exact"), ScoreOptions(model=checkpoint))
    score([str(tmp_path / "out")], str(tmp_path / "packed"), ScoreOptions(model=checkpoint))
    # THEN as many disagree as before
    for scores in ("exact", "packed"):
        assert [row["num_disagreements"] for row in rows_of(tmp_path / scores)] == [0, 1]
    # and where logits were rounded, values are those of the list's distribution, and the engine's are kept
    stored = StoredLogits([source / "logits-part-0.parquet"])
    for row, packed in zip(rows, rows_of(tmp_path / "out"), strict=True):
        if encoding == "float32":
            assert packed["rollout_logprobs"] == row["rollout_logprobs"]
            assert "rollout_logprobs_stored" not in packed
            continue
        logp = log_softmax(stored.rows(row["rollout_id"], 0, 40).double().numpy())[np.arange(40), row["response_ids"]]
        if row is rows[1]:
            logp[7] = row["rollout_logprobs"][7]
        np.testing.assert_allclose(packed["rollout_logprobs"], logp, atol=2e-6)
        np.testing.assert_array_equal(
            np.float32(packed["rollout_logprobs_stored"]), np.float32(row["rollout_logprobs"])
        )


def test_without_a_list_the_engines_values_stay_which_are_finer_than_rounded_logits(tmp_path: Path) -> None:
    source = write_rounded(tmp_path / "in", [near_20(0)], "float16")
    run_pack(source, tmp_path / "out", "sampled")
    (found,) = rows_of(tmp_path / "out")
    assert found["rollout_logprobs"] == near_20(0)["rollout_logprobs"]
    assert "rollout_logprobs_stored" not in found


def test_values_that_all_disagree_are_left_as_they_are(tmp_path: Path) -> None:
    row = near_20(0)
    wrong = (np.array(row["rollout_logprobs"]) - 2).astype(np.float32).tolist()
    source = write_rounded(tmp_path / "in", [{**row, "rollout_logprobs": wrong}], "float16")
    run_pack(source, tmp_path / "out", "topk:5")
    (found,) = rows_of(tmp_path / "out")
    assert found["rollout_logprobs"] == wrong
    assert found["rollout_logprobs_stored"] is None


def test_lists_of_a_sketch_are_written_token_by_token_where_the_policy_sampled() -> None:
    # GIVEN evidence of two rows around one without, some of whose lists are shorter
    rng = np.random.default_rng(3)
    masks = [np.array([True, False, True, True]), np.array([True, True]), np.zeros(0, bool), np.array([False, True])]
    rows: list[dict[str, Any] | None] = []
    for mask in masks:
        n = int(mask.sum())
        values = -np.sort(rng.exponential(3, (n, 3))).astype(np.float16)
        values[n // 2 :, 2] = -np.inf
        row = {name: np.full(n, -1.0, np.float32) for name in ("logprobs", "tail_mass", "entropy")}
        row |= {"topk_ids": rng.integers(0, 99, (n, 3)), "topk_logprobs": values, "vectors": np.ones((n, 64), "<f2")}
        rows.append(row | {"seed": np.array(1), "vocab_size": np.array(99)})
    rows[1] = None
    # WHEN they become columns THEN each list is that of its token, without filler, and empty elsewhere
    found = sketch_columns(rows, masks)
    for name in ("topk_ids", "topk_logprobs"):
        wanted: list[list[list[Any]] | None] = []
        for row, mask in zip(rows, masks, strict=True):
            left = iter(range(3))
            at = [next(left) if mine else None for mine in mask]
            wanted.append(
                None
                if row is None
                else [[] if i is None else row[name][i][row["topk_logprobs"][i] > -np.inf].tolist() for i in at]
            )
        assert found[f"rollout_{name}"].to_pylist() == wanted
    assert found["rollout_topk_ids"].type == pa.list_(pa.list_(pa.int32()))
    assert found["rollout_topk_logprobs"].type == pa.list_(pa.list_(pa.float16()))
    assert len(sketch_columns([], [])["rollout_topk_ids"]) == 0


@pytest.mark.parametrize(
    ("text", "kind", "k", "dim"),
    [("sketch:20,64", "sketch", 20, 64), ("topk:7", "topk", 7, 64), ("q16", "q16", 20, 64)],
)
def test_a_target_is_read_as_it_is_spelled(text: str, kind: str, k: int, dim: int) -> None:
    target = Target.parse(text, seed=3)
    assert (target.kind, target.recipe.k, target.recipe.dim, str(target)) == (kind, k, dim, text)


@pytest.mark.parametrize(
    "text", ["sketch", "sketch:20", "sketch:20,63", "topk:0", "topk:", "q16:4", "q8", "", "sketch:-1,64"]
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_what_was_done_is_said_in_sentences(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixed_rows())
    options = PackOptions(to=Target.parse("sketch:5,64"))
    said = pack([str(source)], str(tmp_path / "out"), options).sentences(options)
    assert any("2 rollouts have no full logits and are left as they are" in line for line in said)
    assert any(line.startswith("probability outside the lists: 5 % ") for line in said)
    assert any("--model CKPT" in line for line in said)
    tokens = 6 + 6 + 6 + 6
    before = sum(len(row["response_ids"]) * VOCAB * 4 for row in mixed_rows()[:4])
    line = next(line for line in said if line.startswith("evidence of a token"))
    assert int(line.split()[4]) >= before // tokens
    options = PackOptions(to=Target.parse("q16"))
    said = pack([str(source)], str(tmp_path / "q16"), options).sentences(options)
    assert any(line.startswith("KL(stored || q16) over 27 positions: mean ") for line in said)
