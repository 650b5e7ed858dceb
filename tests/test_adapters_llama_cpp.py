"""llama.cpp's answers become rows, and tokens that it says nothing about get no value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trm_audit.adapters.base import Given, Row
from trm_audit.adapters.llama_cpp import SOURCE, read
from trm_audit.errors import BadInput, RowError
from trm_audit.pipeline.convert import as_batch
from trm_audit.shards.rows import RowRules, read_rows

CAPTURES = Path(__file__).parent / "data" / "captures"
REFERENCE = json.loads((CAPTURES / "llamacpp-reference.json").read_text())
RAW, POST, FRENCH = range(3)


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (CAPTURES / name).read_text().splitlines()]


def rows(name: str) -> list[Row]:
    return list(read(CAPTURES / name, Given()))


def read_back(path: Path, value: Any, given: Given | None = None) -> Row:
    """The row of one line."""
    path.write_text(json.dumps(value) + "\n")
    (row,) = read(path, given or Given())
    return row


def test_rows_obey_the_schema_and_have_the_settings_that_were_applied() -> None:
    some = rows("llamacpp-completion.jsonl") + rows("llamacpp-v1.jsonl")
    found, errors = read_rows(as_batch(some, None, "shard"), "shard", np.arange(4), RowRules())
    assert errors == []
    assert found.grade == [SOURCE.grade] * 4
    settings = [(s.logprobs_mode, s.temperature, s.top_p, s.top_k) for s in found.sampling]
    assert settings[:2] == [("raw", *np.float32([0.7, 0.9]), -1), ("processed", *np.float32([0.7, 0.9]), -1)]
    assert settings[3] == ("raw", 1.0, 1.0, -1)
    assert [row["finish_reason"] for row in some] == ["stop", "stop", "stop", "length"]
    assert some[RAW]["group_id"] == some[POST]["group_id"] != some[FRENCH]["group_id"]


def test_values_are_raw_before_the_samplers_and_of_the_nucleus_after_them() -> None:
    # GIVEN one request with either, and a float32 forward of the weights that were quantised to four bits
    raw, post, *_ = rows("llamacpp-completion.jsonl")
    assert raw["response_ids"] == post["response_ids"]
    reference = REFERENCE[raw["rollout_id"]]
    assert np.abs(np.subtract(raw["rollout_logprobs"], reference["raw"])).mean() < 0.15
    assert np.abs(np.subtract(raw["rollout_logprobs"], reference["shifted"])).mean() > 5
    # THEN what top_p left out is all that stands between the tempered value and the one after the samplers
    gained = np.subtract(post["rollout_logprobs"], reference["tempered"])
    assert -0.15 < gained.mean() < -math.log(0.9) + 0.15
    lists = lines("llamacpp-completion.jsonl")[POST]["response"]["completion_probabilities"]
    assert post["rollout_topk_logprobs"][0] == [math.log(one["prob"]) for one in lists[0]["top_probs"]]


def test_a_rollout_with_a_token_that_ends_inside_a_character_is_an_error_of_its_own() -> None:
    (error,) = read(CAPTURES / "llamacpp-missing.jsonl", Given())
    answer = lines("llamacpp-missing.jsonl")[0]["response"]
    assert len(answer["completion_probabilities"]) == len(answer["tokens"]) - 1
    assert isinstance(error, RowError)
    assert f"1 of {len(answer['tokens'])} tokens have no log-probability" in error.cause
    assert "inside a character" in error.next_step


def test_samplers_say_what_was_applied_whatever_the_settings_say(tmp_path: Path) -> None:
    line = lines("llamacpp-completion.jsonl")[RAW]
    settings = line["response"]["generation_settings"]
    settings |= {"samplers": ["top_k", "min_p", "temperature"], "top_k": 40, "min_p": 0.05, "top_p": 0.9}
    given = Given()
    row = read_back(tmp_path / "a.jsonl", line, given)
    assert (row["top_k"], row["top_p"], row["temperature"]) == (40, 1.0, settings["temperature"])
    assert [sentence.split()[0] for sentence in given.assumed if "shaped" in sentence] == ["min_p"]
    settings["samplers"] = []
    row = read_back(tmp_path / "a.jsonl", line)
    assert (row["top_k"], row["top_p"], row["temperature"]) == (-1, 1.0, 1.0)


def test_llama_cpp_python_is_refused_with_the_recorder_as_the_way_out() -> None:
    with pytest.raises(BadInput, match="retokenisation drift") as error:
        rows("llamacpp-python.jsonl")
    assert "trm_audit.record.llama_cpp.LlamaRecorder" in error.value.next_step


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda line: line["request"].update(prompt="What is 17 + 26?"), "no token ids of the prompt"),
        (lambda line: line["request"]["prompt"].pop(), "sampled after 41 tokens, the request has 40"),
        (lambda line: line["response"].update(truncated=True), "sampled after 41 tokens"),
        (lambda line: line["response"]["tokens"].pop(), "ids of 5 of 6 tokens"),
        (lambda line: line["response"].update(completion_probabilities=[]), "no log-probabilities"),
        (lambda line: line["response"]["completion_probabilities"][2].update(id=7), "of token 7, which is not"),
        (lambda line: line.update(response={"tokens": [1]}), "no answer to /completion"),
    ],
)
def test_what_cannot_be_a_whole_answer_is_refused(change: Any, match: str, tmp_path: Path) -> None:
    line = lines("llamacpp-completion.jsonl")[RAW]
    change(line)
    with pytest.raises(BadInput, match=match):
        read_back(tmp_path / "a.jsonl", line)


def test_without_return_tokens_the_entries_are_the_ids_unless_some_are_missing(tmp_path: Path) -> None:
    line = lines("llamacpp-completion.jsonl")[RAW]
    tokens = line["response"]["tokens"]
    line["response"]["tokens"] = []
    assert read_back(tmp_path / "a.jsonl", line)["response_ids"] == tokens
    line = lines("llamacpp-missing.jsonl")[0]
    line["response"]["tokens"] = []
    with pytest.raises(BadInput, match="ids of 5 of 6 tokens"):
        read_back(tmp_path / "a.jsonl", line)


def test_v1_completions_are_read_where_every_token_is_there(tmp_path: Path) -> None:
    line = lines("llamacpp-v1.jsonl")[0]
    content = line["response"]["choices"][0]["logprobs"]["content"]
    row = read_back(tmp_path / "a.jsonl", line)
    assert row["response_ids"] == [one["id"] for one in content]
    assert row["rollout_logprobs"] == [one["logprob"] for one in content]
    content.pop()
    with pytest.raises(BadInput, match="ids of 3 of 4 tokens"):
        read_back(tmp_path / "a.jsonl", line)
