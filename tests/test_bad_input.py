"""Every file of sample_data/bad fails with its own message: exit code 3, a place, a cause, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from some_rollouts import as_table, rollout, write_shard

from trm_audit.errors import BadInput
from trm_audit.shards.read import find_shards, read_batches

SAMPLES = Path(__file__).resolve().parent.parent / "sample_data"
MODEL = SAMPLES / "tiny" / "model"
CASES: list[dict[str, Any]] = json.loads((SAMPLES / "bad" / "cases.json").read_text())
ROLLOUTS = [case for case in CASES if case["kind"] == "rollouts"]
GOOD = SAMPLES / "tiny" / "rollouts"


def name(case: dict[str, Any]) -> str:
    return str(case["path"])


@pytest.fixture(scope="module")
def messages(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `score` says about each case, and what it published of those with a bad row: nothing."""
    out, found = tmp_path_factory.mktemp("out"), {}
    for case in CASES:
        path = SAMPLES / "bad" / case["path"]
        where = (GOOD, "--model", path) if case["kind"] == "model" else (path, "--model", MODEL)
        outcome = run("score", *where, "-o", out / case["path"])
        assert outcome.code == 3, (case["path"], outcome.err)
        assert case["row"] is None or not list((out / case["path"]).rglob("*.parquet"))
        assert case["kind"] == "rollouts" or not (out / case["path"]).exists()
        found[case["path"]] = outcome.err[outcome.err.index("Error: ") :]  # before it: how sequences are scored
    return found


@pytest.mark.parametrize("case", CASES, ids=name)
def test_score_names_the_place_and_the_cause(messages: dict[str, str], case: dict[str, Any]) -> None:
    error = messages[case["path"]]
    assert error.startswith("Error: ")
    assert f"sample_data/bad/{case['path']}" in error
    assert case["phrase"] in error
    assert "Traceback" not in error
    if case["row"] is not None:  # side files have no rows of rollouts: there the name says which it is
        assert f", row {case['row']} (rollout_id=" in error or f"parquet, rollout_id=good-{case['row']}" in error


def cause_of(message: str) -> str:
    """A message without its place: what is after the row, or after the file's name."""
    first = message.splitlines()[0]
    return first.partition("): ")[2] or first.rpartition(".parquet: ")[2] or first


def test_every_case_has_a_message_of_its_own(messages: dict[str, str]) -> None:
    causes: dict[str, list[str]] = {}
    for path, message in messages.items():
        causes.setdefault(cause_of(message), []).append(path)
    shared = {cause: paths for cause, paths in causes.items() if len(paths) > 1}
    assert shared == {}, shared


@pytest.mark.parametrize("case", [case for case in ROLLOUTS if not case["needs_model"]], ids=name)
def test_validate_finds_it_without_a_model(run: Run, case: dict[str, Any]) -> None:
    outcome = run("validate", SAMPLES / "bad" / case["path"])
    text = outcome.out.decode() + outcome.err
    assert outcome.code == 3
    assert f"sample_data/bad/{case['path']}" in text
    assert case["phrase"] in text
    assert "Traceback" not in text


def test_validate_says_every_error_once(run: Run) -> None:
    for case in ROLLOUTS:
        if case["row"] is not None and not case["needs_model"]:
            text = run("validate", SAMPLES / "bad" / case["path"]).out.decode()
            assert text.count("Error: ") == 1, case["path"]
            assert "1 errors" in text


def test_a_token_beyond_the_vocabulary_is_found_where_its_size_is_known(run: Run) -> None:
    file = SAMPLES / "bad" / "token-beyond-vocabulary.parquet"
    assert run("validate", file).code == 0
    told = run("validate", file, "--vocab-size", "19")
    assert told.code == 3
    assert "999, outside 0..18" in told.out.decode()


def test_skip_bad_scores_the_other_rows_and_says_so_with_its_exit_code(run: Run, tmp_path: Path) -> None:
    one_for_each_rule = {case["rule"]: case for case in ROLLOUTS if case["row"] is not None}
    assert set(one_for_each_rule) == set(range(1, 14))
    for case in one_for_each_rule.values():
        output = tmp_path / Path(case["path"]).stem
        outcome = run("score", SAMPLES / "bad" / case["path"], "--model", MODEL, "--skip-bad", "-o", output)
        assert outcome.code == 4, (case["path"], outcome.err)
        line = json.loads((output / "skipped.jsonl").read_text().splitlines()[0])
        assert case["phrase"] in line["place"] + line["cause"] + line["next_step"]
        scored = [row for file in (output / "data").iterdir() for row in pq.read_table(file)["rollout_id"].to_pylist()]
        assert scored in (["good-0", "good-2"], []), case["path"]  # unreadable logits take their shard with them


def test_good_rows_beside_bad_ones_are_scored_as_alone(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    rows = [rollout(i) for i in range(4)]
    write_shard(tmp_path / "good" / "a.parquet", rows)
    write_shard(tmp_path / "mixed" / "a.parquet", [rows[0], {**rows[1], "prompt_ids": [99]}, *rows[2:]])
    run("score", tmp_path / "good", "--model", checkpoint, "-o", tmp_path / "one")
    run("score", tmp_path / "mixed", "--model", checkpoint, "--skip-bad", "-o", tmp_path / "two")
    one, two = (pq.read_table(tmp_path / n / "data" / "a.parquet").to_pylist() for n in ("one", "two"))
    for mine, alone in zip(two, [one[0], one[2], one[3]], strict=True):
        np.testing.assert_allclose(mine["trainer_logprobs"], alone["trainer_logprobs"], rtol=1e-5)


def test_a_damaged_shard_is_left_out_whole_and_the_others_stay(run: Run, tmp_path: Path) -> None:
    for k in range(2):
        write_shard(tmp_path / "rollouts" / f"part-{k}.parquet", [rollout(k)])
    (tmp_path / "rollouts" / "part-2.parquet").write_bytes((SAMPLES / "bad" / "flipped-byte.parquet").read_bytes())
    refused = run("score", tmp_path / "rollouts", "--model", MODEL, "-o", tmp_path / "out", "--vocab-size", "19")
    assert refused.code == 3
    outcome = run("score", tmp_path / "rollouts", "--model", MODEL, "-o", tmp_path / "out", "--skip-bad")
    assert outcome.code == 4
    assert "left out" in outcome.err
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_hostile_name_reaches_the_terminal_without_its_escapes(run: Run, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(0, rollout_id="\x1b[31m[/red]evil", temperature=-1.0)])
    outcome = run("score", tmp_path / "a.parquet", "--model", MODEL, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "\x1b" not in outcome.err
    assert "[/red]evil" in outcome.err


def test_a_path_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    outcome = run("score", tmp_path / "nothing", "--model", MODEL, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert f"{tmp_path}/nothing: does not exist" in outcome.err


def test_a_shard_without_rollout_id_among_others_is_not_passed_over(run: Run, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rollout(0)])
    nameless = as_table([rollout(1)]).drop_columns(["rollout_id"])
    pq.write_table(nameless.replace_schema_metadata({"trm_audit.kind": "rollouts"}), tmp_path / "b.parquet")
    outcome = run("score", tmp_path, "--model", MODEL, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "b.parquet: column 'rollout_id' is missing" in outcome.err


@pytest.mark.parametrize("value", ["{not json", "3", '["nowhere.parquet"]'])
def test_a_footer_that_names_its_side_files_badly_is_an_error(run: Run, tmp_path: Path, value: str) -> None:
    table = as_table([rollout(0)]).replace_schema_metadata(
        {"trm_audit.kind": "rollouts", "trm_audit.schema_version": "1", "trm_audit.logits": value}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    outcome = run("score", tmp_path, "--model", MODEL, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "a.parquet: its footer" in outcome.err


def test_damaged_parquet_without_checksums_is_an_error_and_never_a_crash(tmp_path: Path) -> None:
    # GIVEN a shard as others write it, without page checksums, with a few bytes overwritten at random
    file = tmp_path / "a.parquet"
    pq.write_table(as_table([rollout(i, "interval") for i in range(20)]), file)
    content, rng, noticed = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        for at in rng.integers(4, len(damaged) - 8, 3):
            damaged[at] = rng.integers(0, 256)
        file.write_bytes(bytes(damaged))
        # WHEN it is read THEN nothing but a BadInput comes out
        try:
            for error in find_shards([str(file)], "rollouts").bad:
                raise error
            for batch in read_batches(file, batch_rows=8):
                batch.to_pylist()
        except BadInput:
            noticed += 1
    assert noticed > 50


def test_a_page_that_lost_its_rows_is_noticed(tmp_path: Path) -> None:
    # GIVEN a file whose footer promises rows that its pages do not hold: pyarrow alone returns what is there
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"rollout_id": pa.array(["x"] * 300)}), file, use_dictionary=False, compression="none")
    metadata = pq.read_metadata(file)
    # WHEN the three places where the footer says 300 say 301 instead (zigzag varint d8 04 -> da 04)
    content = file.read_bytes()
    start = len(content) - 8 - metadata.serialized_size
    file.write_bytes(content[:start] + content[start:].replace(b"\xd8\x04", b"\xda\x04"))
    # THEN it is an error
    assert pq.read_metadata(file).num_rows == 301
    with pytest.raises(BadInput, match=r"301|damaged"):
        list(read_batches(file, batch_rows=100))
