"""Which files are shards, what they are called, and what is read of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from some_rollouts import as_table, rollout, write_shard

from trm_audit.errors import BadInput, UsageError
from trm_audit.pipeline.selection import content_digest, sampled, select
from trm_audit.shards.read import find_shards, read_batches, rows_at_once


def plain(file: Path, table: pa.Table) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, one in a subfolder and one without a footer key; a note, a side file, hidden and temporary files."""
    write_shard(tmp_path / "b.parquet", [rollout(0, "exact")])
    plain(tmp_path / "deep" / "a.parquet", as_table([rollout(1), rollout(2)]))
    plain(tmp_path / "notes.parquet", pa.table({"text": ["hello"]}))
    plain(tmp_path / ".tmp" / "c.parquet", as_table([rollout(3)]))
    plain(tmp_path / "_temporary" / "c.parquet", as_table([rollout(3)]))
    (tmp_path / "readme.txt").write_text("x")
    return tmp_path


def test_a_folder_is_searched_for_shards_and_the_rest_is_named(folder: Path) -> None:
    found = find_shards([str(folder)], "rollouts")
    assert [(shard.name, shard.num_rows) for shard in found.shards] == [("b.parquet", 1), ("deep--a.parquet", 2)]
    assert [(path.name, reason) for path, reason in found.passed_over] == [("notes.parquet", "its columns do not fit")]
    assert found.bad == []


def test_tokens_are_counted_by_the_footer_alone(folder: Path) -> None:
    shards = find_shards([str(folder)], "rollouts").shards
    assert shards[0].num_tokens == len(rollout(0)["response_ids"])
    assert shards[1].num_tokens == sum(len(rollout(i)["response_ids"]) for i in (1, 2))


def test_side_files_are_those_the_footer_names_or_those_beside_the_shard(folder: Path) -> None:
    b, a = find_shards([str(folder)], "rollouts").shards
    assert [file.name for file in b.logits] == ["logits-b.parquet"]
    assert a.logits == ()
    shared = plain(folder / "plain.parquet", as_table([rollout(9)]))
    assert [file.name for file in find_shards([str(shared)], "rollouts").shards[0].logits] == ["logits-b.parquet"]


def test_a_side_file_that_is_gone_is_an_error(folder: Path) -> None:
    (folder / "logits-b.parquet").unlink()
    found = find_shards([str(folder)], "rollouts")
    assert "its footer names logits-b.parquet, which is not there" in str(found.bad[0])


def test_a_glob_and_a_list_of_files_keep_their_order(folder: Path) -> None:
    names = [str(folder / "deep" / "a.parquet"), str(folder / "b.parquet")]
    assert [shard.name for shard in find_shards(names, "rollouts").shards] == ["a.parquet", "b.parquet"]
    globbed = find_shards([f"{folder}/*[ab].parquet"], "rollouts").shards
    assert [shard.name for shard in globbed] == ["b.parquet"]


def test_two_inputs_of_one_name_are_refused(folder: Path) -> None:
    write_shard(folder / "other" / "b.parquet", [rollout(7)])
    with pytest.raises(UsageError, match=r"two inputs are called b\.parquet"):
        find_shards([str(folder / "b.parquet"), str(folder / "other" / "b.parquet")], "rollouts")


def test_a_folder_that_is_called_like_a_file_is_searched(folder: Path) -> None:
    plain(folder / "spark.parquet" / "part-00000.snappy.parquet", as_table([rollout(8)]))
    found = find_shards([str(folder)], "rollouts")
    assert "spark.parquet--part-00000.snappy.parquet" in [shard.name for shard in found.shards]
    assert found.bad == []


def test_a_file_that_the_user_names_has_to_be_a_shard(folder: Path) -> None:
    with pytest.raises(BadInput, match="Its columns are: text"):
        raise find_shards([str(folder / "notes.parquet")], "rollouts").bad[0]


def test_rollouts_where_scores_are_needed_get_the_command_to_run(folder: Path) -> None:
    with pytest.raises(BadInput, match="Run trm-audit score on it first"):
        raise find_shards([str(folder / "b.parquet")], "scores").bad[0]


def test_foreign_columns_are_recognised_by_their_new_names(tmp_path: Path) -> None:
    table = as_table([rollout(0)])
    plain(
        tmp_path / "a.parquet", table.rename_columns(["id", "g", "prompt", "response", "lp", "r"][: table.num_columns])
    )
    names = pq.read_schema(tmp_path / "a.parquet").names
    ours = dict(zip(table.column_names, names, strict=True))
    with pytest.raises(BadInput, match="no rollouts shards found"):
        find_shards([str(tmp_path)], "rollouts")
    assert find_shards([str(tmp_path)], "rollouts", ours).shards[0].num_tokens == len(rollout(0)["response_ids"])


def test_an_empty_shard_keeps_its_columns(tmp_path: Path) -> None:
    file = plain(tmp_path / "a.parquet", as_table([rollout(0)]).slice(0, 0))
    (batch,) = read_batches(file, batch_rows=8)
    assert (batch.num_rows, batch.schema.names) == (0, as_table([rollout(0)]).column_names)
    (batch,) = read_batches(file, batch_rows=8, columns=["group_id"])
    assert batch.schema.names == ["group_id"]


@pytest.mark.parametrize("length", [50, 500])
def test_batches_take_about_so_much_memory_whatever_the_length_of_rows(length: int, tmp_path: Path) -> None:
    file = write_shard(tmp_path / "a.parquet", [rollout(i, "interval", length=length) for i in range(40)])
    (shard,) = find_shards([str(file)], "rollouts").shards
    in_memory = pq.read_table(file).nbytes / 40  # of a row
    assert rows_at_once(shard, int(in_memory * 10)) == pytest.approx(10, rel=0.5)
    assert rows_at_once(shard, 1) == 1
    assert [batch.num_rows for batch in read_batches(file, batch_rows=16)] == [16, 16, 8]


def test_names_seen_twice_are_found_wherever_the_columns_stand(tmp_path: Path) -> None:
    # GIVEN files with group_id before rollout_id, and one whose ids are integers
    rows = [rollout(i, group_id="same") for i in (0, 1)]
    order = ["group_id", "rollout_id", "prompt_ids", "response_ids"]
    plain(tmp_path / "a.parquet", as_table(rows).select(order))
    numbers = as_table(rows).select(order[2:]).append_column("rollout_id", pa.array([7, 7]))
    plain(tmp_path / "b.parquet", numbers)
    shards = find_shards([str(tmp_path)], "rollouts").shards
    # WHEN the ids are looked at with a sample, which reads groups too
    for sample in (1.0, 0.99):
        duplicates = select(shards, {}, sample, None).duplicates
        # THEN groups are no ids, and the integer is found under the name that its row will have
        assert duplicates == {"7": (str(tmp_path / "b.parquet"), 0)}


def test_a_sample_takes_whole_groups_and_always_the_same(tmp_path: Path) -> None:
    rows = [rollout(i) for i in range(400)]
    for k in range(2):
        write_shard(tmp_path / f"{k}.parquet", rows[200 * k : 200 * k + 200])
    shards = find_shards([str(tmp_path)], "rollouts").shards
    taken = select(shards, {}, 0.3, None).rows
    groups = pa.array(row["group_id"] for row in rows)
    mask = sampled(groups, 0.3)
    assert sum(taken.values()) == mask.sum()
    assert 0.15 < mask.mean() < 0.45
    assert all(len(set(mask[i : i + 4])) == 1 for i in range(0, 400, 4))
    assert not (mask & ~sampled(groups, 0.6)).any()  # a larger sample holds the smaller one


def test_a_limit_takes_the_first_rows_and_no_shard_without_any(tmp_path: Path) -> None:
    for k in range(3):
        write_shard(tmp_path / f"{k}.parquet", [rollout(4 * k + i) for i in range(4)])
    shards = find_shards([str(tmp_path)], "rollouts").shards
    assert select(shards, {}, 1.0, 6).rows == {"0.parquet": 4, "1.parquet": 2}


def test_the_digest_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    digests = [content_digest([tmp_path / name]) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert content_digest([tmp_path / "a", tmp_path / "c"]) != content_digest([tmp_path / "c", tmp_path / "a"])
