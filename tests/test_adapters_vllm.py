"""vLLM's answers become rows: values, ids and lists are those that the engine had, and nothing is made up."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from trm_audit.adapters.answers import Entry, without_added
from trm_audit.adapters.base import Given, Row
from trm_audit.adapters.vllm import SOURCE, read
from trm_audit.adapters.vllm_outputs import rows_of, table_of
from trm_audit.errors import BadInput, UsageError
from trm_audit.rollout import RolloutBatch
from trm_audit.shards.rollout_writer import LogitsTableWriter
from trm_audit.shards.rows import RowRules, read_rows

CAPTURES = Path(__file__).parent / "data" / "captures"
REFERENCE = json.loads((CAPTURES / "vllm-reference.json").read_text())


def rows(name: str, mode: str | None = None, **given: Any) -> list[Row]:
    return list(read(CAPTURES / name, Given(logprobs_mode=mode, **given)))


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (CAPTURES / name).read_text().splitlines()]


def write(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def checked(some: Sequence[Row]) -> RolloutBatch:
    """The rows by the rules of the schema; none of them breaks one."""
    batch = table_of(some).combine_chunks().to_batches()[0]
    found, errors = read_rows(batch, "shard", np.arange(len(some)), RowRules())
    assert errors == []
    return found


@pytest.mark.parametrize("name", ["vllm-ids.jsonl", "vllm-generate.jsonl", "vllm-text.jsonl"])
def test_raw_values_are_those_of_a_forward_of_the_same_weights_at_the_same_token(name: str) -> None:
    some = rows(name, "raw")
    values = np.concatenate([row["rollout_logprobs"] for row in some])
    for reading, low, high in (("raw", 0.0, 0.06), ("shifted", 5.0, np.inf)):
        other = np.concatenate([REFERENCE[row["rollout_id"]][reading] for row in some])
        assert low <= np.abs(other - values).mean() <= high


def test_processed_values_are_tempered_ones_over_the_mass_of_the_nucleus() -> None:
    some = rows("vllm-processed.jsonl", "processed")
    values = np.concatenate([row["rollout_logprobs"] for row in some])
    tempered = np.concatenate([REFERENCE[row["rollout_id"]]["tempered"] for row in some])
    raw = np.concatenate([REFERENCE[row["rollout_id"]]["raw"] for row in some])
    assert {(row["temperature"], row["top_p"]) for row in some} == {(0.7, 0.9)}
    # the nucleus holds between 0.9 and all of the mass
    assert 0 <= (values - tempered).mean() <= -np.log(0.9)
    assert np.abs(values - raw).mean() > 0.1


def test_rows_of_every_capture_obey_the_schema() -> None:
    grades = {
        name: checked(rows(name, mode)).grade[0]
        for name, mode in (
            ("vllm-ids.jsonl", "raw"),
            ("vllm-generate.jsonl", None),
            ("vllm-streams.sse", None),
            ("vllm-text.jsonl", None),
            ("vllm-processed.jsonl", "processed"),
        )
    }
    assert grades == {
        "vllm-ids.jsonl": SOURCE.grade,
        "vllm-generate.jsonl": SOURCE.grade,
        "vllm-streams.sse": "sampled",
        "vllm-text.jsonl": "sampled",
        "vllm-processed.jsonl": "sampled",
    }


def test_a_sampled_token_that_pushed_another_one_out_of_a_chats_list_is_left_out() -> None:
    # GIVEN a chat's lists of 8: the sampled token, then the others by rank
    answer = lines("vllm-ids.jsonl")[0]
    sizes = set()
    for row, choice in zip(rows("vllm-ids.jsonl", "raw"), answer["response"]["choices"], strict=False):
        for at, position in enumerate(choice["logprobs"]["content"]):
            first, *others = position["top_logprobs"]
            expected = {int(one["token"].removeprefix("token_id:")): one["logprob"] for one in others}
            if first["logprob"] >= min(expected.values()):
                expected[row["response_ids"][at]] = first["logprob"]
            # THEN the row has those that are the most probable for certain, in order
            found = dict(zip(row["rollout_topk_ids"][at], row["rollout_topk_logprobs"][at], strict=True))
            assert found == expected
            assert list(found.values()) == sorted(found.values(), reverse=True)
            sizes.add(len(found))
    assert sizes == {7, 8}


def engine_list(logprobs: np.ndarray, sampled: int, k: int, cut: bool, ranked: bool) -> list[Entry]:
    """A list as vLLM makes it: the sampled token, the k most probable without it, in chats no more than k together."""
    order = np.argsort(-logprobs, kind="stable")
    listed = [sampled, *(int(token) for token in order[:k] if token != sampled)][: k if cut else k + 1]
    rank = int((logprobs >= logprobs[sampled]).sum())
    ranks = {token: at for at, token in enumerate(order, start=1)} | {sampled: rank}
    return [Entry(token, float(logprobs[token]), int(ranks[token]) if ranked else None) for token in listed]


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("ranked", [True, False])
def test_what_is_left_of_a_list_is_exactly_the_most_probable_tokens_whatever_was_sampled(
    cut: bool, ranked: bool
) -> None:
    random, lengths = np.random.default_rng(5), set()
    for _ in range(300):
        # GIVEN distributions with many ties, as logits of half precision give them
        logits = np.round(random.normal(size=12) * 2) / 2
        logprobs = logits - np.log(np.exp(logits).sum())
        sampled, k = int(random.integers(12)), int(random.integers(2, 6))
        entries = engine_list(logprobs, sampled, k, cut, ranked)
        kept = without_added(entries[0], entries)
        # THEN nothing outside is more probable than what is inside
        inside = {entry.id for entry in kept}
        outside = [value for token, value in enumerate(logprobs) if token not in inside]
        assert len(kept) == len(inside) >= k - 1
        assert min(entry.logprob for entry in kept if entry.logprob is not None) >= max(outside)
        lengths.add(len(kept) - k)
    assert lengths == ({-1, 0} if cut else {-1, 0, 1})


def test_lists_that_name_tokens_by_text_are_left_out_and_that_is_said() -> None:
    given = Given(logprobs_mode="processed")
    (row, *_) = read(CAPTURES / "vllm-processed.jsonl", given)
    assert row["rollout_topk_ids"] is None
    assert row["rollout_logprobs"] is not None
    assert any("return_tokens_as_token_ids" in sentence for sentence in given.assumed)


def test_samples_of_a_prompt_share_a_group_also_where_a_request_has_several_prompts() -> None:
    chat, completion, several = (lines("vllm-ids.jsonl")[at]["response"]["id"] for at in range(3))
    some = rows("vllm-ids.jsonl", "raw")
    groups = [row["group_id"] for row in some]
    assert groups[:4] == [f"vllm-ids/{chat}"] * 2 + [f"vllm-ids/{completion}"] * 2
    assert groups[4] == groups[5] != groups[6] == groups[7]
    assert all(group.startswith(f"vllm-ids/{several}/") for group in groups[4:])
    assert len({row["rollout_id"] for row in some}) == 8


def test_a_stream_gives_what_the_whole_answer_gives() -> None:
    whole = [row for row in rows("vllm-ids.jsonl", "raw") if "cmpl-8227" in row["rollout_id"]]
    streamed = rows("vllm-streams.sse", "raw", temperature=0.8)[2:]
    assert len(whole) == len(streamed) == 2
    for one, other in zip(whole, streamed, strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        assert one["temperature"] == other["temperature"]
        for name in ("response_ids", "rollout_logprobs", "rollout_topk_ids", "rollout_topk_logprobs"):
            assert one[name][:3] == other[name][:3]
    assert [row["finish_reason"] for row in streamed] == ["stop", "length"]


def test_the_end_of_sequence_token_is_part_of_a_response() -> None:
    streamed = rows("vllm-streams.sse")
    assert [row["response_ids"][-1] == 2 for row in streamed] == [row["finish_reason"] == "stop" for row in streamed]
    assert any(row["finish_reason"] == "stop" for row in streamed)


def refused(name: str, match: str, mode: str | None = None) -> BadInput:
    with pytest.raises(BadInput, match=match) as error:
        rows(name, mode)
    return error.value


def test_an_answer_that_does_not_say_its_stage_is_refused_where_it_matters_and_the_hint_is_shown() -> None:
    error = refused("vllm-processed.jsonl", "raw or processed.*temperature 0.7, top_p 0.9")
    assert "-9999" in error.cause
    assert "--logprobs-mode" in error.next_step
    assert "-9999" not in refused("vllm-ids.jsonl", "raw or processed").cause


def test_values_that_were_truncated_are_not_taken_for_raw_ones(tmp_path: Path) -> None:
    refused("vllm-processed.jsonl", "cannot be raw", "raw")
    bare = write(tmp_path / "bare.jsonl", lines("vllm-processed.jsonl")[0]["response"])
    with pytest.raises(BadInput, match="truncated, and nothing says how"):
        list(read(bare, Given()))


def test_text_without_token_ids_is_refused_with_the_reason_and_the_way_out(tmp_path: Path) -> None:
    answer = lines("vllm-text.jsonl")[0]
    answer["response"]["prompt_token_ids"] = answer["response"]["choices"][0]["token_ids"] = None
    with pytest.raises(BadInput, match="retokenisation drift") as error:
        list(read(write(tmp_path / "a.jsonl", answer), Given()))
    assert "return_token_ids" in error.value.next_step
    assert error.value.place.endswith("a.jsonl, line 1")
    assert "prompt" in refused("vllm-no-prompt-ids.jsonl", "token ids of the prompt", "raw").cause


def test_a_prompt_that_was_sent_as_token_ids_needs_no_answer_to_repeat_it(tmp_path: Path) -> None:
    answer = lines("vllm-no-prompt-ids.jsonl")[0]
    answer["request"]["prompt"] = [1, 9690, 198]
    (row,) = read(write(tmp_path / "a.jsonl", answer), Given(logprobs_mode="raw"))
    assert row["prompt_ids"] == [1, 9690, 198]
    names = answer["response"]["choices"][0]["logprobs"]["tokens"]
    assert [f"token_id:{token}" for token in row["response_ids"]] == names


def test_what_stands_beside_an_answer_goes_to_its_samples(tmp_path: Path) -> None:
    answer = lines("vllm-generate.jsonl")[0] | {"reward": [1.0, 0.0], "group_id": "sea", "policy_version": 7}
    found = list(read(write(tmp_path / "a.jsonl", answer), Given()))
    assert [(row["reward"], row["group_id"], row["policy_version"]) for row in found] == [(1, "sea", 7), (0, "sea", 7)]
    with pytest.raises(BadInput, match="3 values for 2 samples"):
        list(read(write(tmp_path / "a.jsonl", answer | {"reward": [1, 2, 3]}), Given()))


@pytest.fixture
def answer(tmp_path: Path) -> Callable[..., Row]:
    """The first choice of an answer of `generate` after a change -> its row."""

    def changed(change: Callable[[Any, Any], None]) -> Row:
        line = lines("vllm-generate.jsonl")[0]
        del line["response"]["choices"][1:]
        change(line["request"], line["response"]["choices"][0])
        (row,) = read(write(tmp_path / "a.jsonl", line), Given())
        return row

    return changed


def test_a_placeholder_leaves_a_row_without_evidence(answer: Callable[..., Row]) -> None:
    def change(request: Any, choice: Any) -> None:
        choice["logprobs"]["content"][3]["logprob"] = -9999.0

    row = answer(change)
    assert row["rollout_logprobs"] is row["rollout_topk_ids"] is row["rollout_topk_logprobs"] is None


def test_versions_of_weights_are_told_apart_by_token(answer: Callable[..., Row]) -> None:
    def change(request: Any, choice: Any) -> None:
        spans = [{"version": "4", "start": 0, "end": 3}, {"version": "5", "start": 3, "end": 8}]
        choice["weight_versions"] = spans

    assert answer(change)["policy_version"] == [4, 4, 4, 5, 5, 5, 5, 5]
    assert answer(lambda request, choice: None)["policy_version"] is None  # "default"


def test_experts_stand_at_their_tokens_and_those_not_asked_for_are_unknown(answer: Callable[..., Row]) -> None:
    # GIVEN experts for all of 46 + 8 tokens but the first 10 and the last, [layers, k] = [3, 2]
    experts = np.random.default_rng(0).integers(0, 8, (46 + 8 - 1 - 10, 3, 2), dtype=np.uint8)
    file = io.BytesIO()
    np.save(file, experts, allow_pickle=False)

    def change(request: Any, choice: Any) -> None:
        request["sampling_params"]["routed_experts_prompt_start"] = 10
        choice["routed_experts"] = base64.b64encode(file.getvalue()).decode()

    found = answer(change)
    assert (np.array(found["routed_experts"][:10]) == -1).all()
    assert np.array_equal(found["routed_experts"][10:], experts)
    assert checked([found]).routed_experts is not None


def test_files_of_json_are_read_like_lines_and_errors_of_a_server_are_named(tmp_path: Path) -> None:
    every = lines("vllm-ids.jsonl")
    (tmp_path / "vllm-ids.json").write_text(json.dumps(every, indent=1))
    assert list(read(tmp_path / "vllm-ids.json", Given(logprobs_mode="raw"))) == rows("vllm-ids.jsonl", "raw")
    failed = write(tmp_path / "b.jsonl", every[0], {"request": {}, "response": {"error": {"message": "too long"}}})
    with pytest.raises(BadInput, match=r"line 2: the server answered with an error.*too long"):
        list(read(failed, Given(logprobs_mode="raw")))
    (tmp_path / "c.jsonl").write_text('\n{"a": \n')
    with pytest.raises(BadInput, match="line 2: is no JSON"):
        list(read(tmp_path / "c.jsonl", Given()))


class Flat(SimpleNamespace):
    """Flat lists with the length that vLLM's have."""

    def __len__(self) -> int:
        return len(self.start_indices)


def as_object(value: Any) -> Any:
    """A captured output with its attributes, and dicts by token id, as vLLM has them."""
    if isinstance(value, dict):
        if value and all(key.isdigit() for key in value):
            return {int(key): as_object(one) for key, one in value.items()}
        kind = Flat if "start_indices" in value else SimpleNamespace
        return kind(**{key: as_object(one) for key, one in value.items()})
    return [as_object(one) for one in value] if isinstance(value, list) else value


def offline(name: str) -> tuple[Any, Any]:
    """A captured RequestOutput and its SamplingParams."""
    captured = json.loads((CAPTURES / "vllm-offline.json").read_text())[name]
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | captured["sampling_params"]
    return as_object(captured["request_output"]), SimpleNamespace(**params)


def test_outputs_in_python_give_the_same_rows_flat_or_not() -> None:
    some = {}
    for name in ("top", "flat"):
        output, params = offline(name)
        some[name] = list(rows_of([output], params, Given(logprobs_mode="raw"), name="x"))
        checked(some[name])
    for one, other in zip(some["top"], some["flat"], strict=True):
        assert one["prompt_ids"] == other["prompt_ids"]
        for name in ("response_ids", "rollout_logprobs", "rollout_topk_ids", "rollout_topk_logprobs"):
            assert one[name] == other[name]
    # 5 were asked for; a sampled token from outside made it 6 in the engine, and is not in the row's list
    assert {len(position) for sample in offline("top")[0].outputs for position in sample.logprobs} == {5, 6}
    assert {len(top) for row in some["top"] for top in row["rollout_topk_ids"]} == {5}


def test_tokens_of_probability_0_are_not_listed() -> None:
    output, params = offline("processed")
    listed = [len(position) for position in output.outputs[0].logprobs]
    (row,) = rows_of([output], params, Given(logprobs_mode="processed"), name="x")
    assert np.isfinite(np.concatenate(row["rollout_topk_logprobs"])).all()
    assert all(len(top) < size for top, size in zip(row["rollout_topk_ids"], listed, strict=True))
    assert checked([row]).grade == ["interval"]
    with pytest.raises(BadInput, match="raw or processed"):
        list(rows_of([output], params, Given(), name="x"))


def whole(logprobs: np.ndarray, token: int, flat: bool) -> list[tuple[int, float, int]]:
    """All tokens of a position as vLLM lists them."""
    order = [int(one) for one in np.argsort(-logprobs, kind="stable")]
    ranks = {one: at for at, one in enumerate(order, start=1)}
    return [(one, float(logprobs[one]), ranks[one]) for one in [token, *(o for o in order if flat or o != token)]]


@pytest.mark.parametrize("flat", [True, False])
def test_whole_distributions_are_written_beside_the_rows_column_by_token_id(flat: bool, tmp_path: Path) -> None:
    # GIVEN 70 positions over 97 tokens, more than a block of the long table holds
    random = np.random.default_rng(3)
    logits = random.normal(size=(70, 97)).astype(np.float32) * 3
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    tokens = [int(one) for one in random.integers(0, 97, 70)]
    lists = [whole(row, token, flat) for row, token in zip(logprobs, tokens, strict=True)]
    output, params = offline("top")
    sample, params.logprobs = output.outputs[0], -1
    output.outputs, sample.token_ids, sample.weight_versions = [sample], tokens, None
    if flat:
        ends = np.cumsum([len(one) for one in lists]).tolist()
        ids, values, ranks = zip(*(entry for one in lists for entry in one), strict=True)
        sample.logprobs = Flat(
            start_indices=[0, *ends[:-1]], end_indices=ends, token_ids=ids, logprobs=values, ranks=ranks
        )
    else:
        sample.logprobs = [{t: SimpleNamespace(logprob=v, rank=r) for t, v, r in one} for one in lists]
    # WHEN they are read with somewhere to write to
    with LogitsTableWriter(tmp_path / "logits-0.parquet", "float32") as writer:
        (row,) = rows_of([output], params, Given(), name="x", logits=writer)
    # THEN the row has the sampled values, and the table every value at its token
    table = pq.read_table(tmp_path / "logits-0.parquet")
    stored = np.concatenate([np.frombuffer(data.as_py(), "<f4").reshape(-1, 97) for data in table["data"]])
    assert np.array_equal(stored, logprobs)
    assert set(table["rollout_id"].to_pylist()) == {row["rollout_id"]}
    assert row["rollout_logprobs"] == [float(logprobs[at, token]) for at, token in enumerate(tokens)]
    assert row["rollout_topk_ids"] is None
    with pytest.raises(UsageError, match="nowhere to write"):
        list(rows_of([output], params, Given(), name="x"))
