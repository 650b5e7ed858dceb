"""SGLang's answers become rows. The answers here are laid out as its source does it: none was captured."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trm_audit.adapters.answers import read_answers
from trm_audit.adapters.base import Given, Row
from trm_audit.adapters.sglang import SOURCE, read, rows_of
from trm_audit.errors import BadInput
from trm_audit.pipeline.convert import as_batch
from trm_audit.shards.rows import RowRules, read_rows

VOCAB, K, TEMPERATURE = 30, 5, 0.7
PROMPT, RESPONSE = [4, 9, 2, 17], [3, 3, 21, 8, 1]
LEAST = float(np.finfo(np.float32).min)


def distributions() -> np.ndarray:
    """[T, V] log-probabilities after the temperature; the last token has support of three only."""
    logits = np.random.default_rng(11).normal(size=(len(RESPONSE), VOCAB)) * 2
    logits[-1, 3:] = -np.inf
    tempered = logits / TEMPERATURE
    out: np.ndarray = tempered - np.log(np.exp(tempered).sum(1, keepdims=True))
    return np.maximum(out, LEAST)


def sample(**meta: Any) -> Row:
    """An answer of /generate: sampled values, the K most probable tokens by value, ids of the prompt."""
    table = distributions()
    tops = [[[float(row[t]), int(t), None] for t in np.argsort(-row, kind="stable")[:K]] for row in table]
    info = {
        "id": "ab12",
        "finish_reason": {"type": "stop", "matched": 1},
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(RESPONSE),
        "weight_version": "12",
        "input_token_logprobs": [[None if at == 0 else -1.5, token, None] for at, token in enumerate(PROMPT)],
        "output_token_logprobs": [[float(table[at, t]), t, None] for at, t in enumerate(RESPONSE)],
        "output_top_logprobs": tops,
    }
    return {"text": "...", "output_ids": RESPONSE, "meta_info": info | meta}


REQUEST = {"sampling_params": {"temperature": TEMPERATURE, "top_p": 0.95, "top_k": -1}, "return_logprob": True}


def rows(path: Path, response: object, given: Given | None = None, request: Mapping[str, Any] = REQUEST) -> list[Row]:
    path.write_text(json.dumps({"request": request, "response": response}) + "\n")
    return list(read(path, given or Given()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_values_follow_the_temperature_and_rows_obey_the_schema(file: Path) -> None:
    given = Given()
    (row,) = rows(file, sample(), given)
    found, errors = read_rows(as_batch([row], None, "shard"), "shard", np.arange(1), RowRules())
    assert errors == []
    assert found.grade == [SOURCE.grade]
    assert (row["prompt_ids"], row["response_ids"]) == (PROMPT, RESPONSE)
    assert row["rollout_logprobs"] == [distributions()[at, token] for at, token in enumerate(RESPONSE)]
    assert (row["temperature"], row["top_p"], row["top_k"]) == (TEMPERATURE, 0.95, -1)
    assert (row["logprobs_mode"], row["finish_reason"], row["policy_version"]) == ("tempered", "stop", [12] * 5)
    assert any("SGLANG_RETURN_ORIGINAL_LOGPROB" in sentence for sentence in given.assumed)
    (raw,) = rows(file, sample(), Given(logprobs_mode="raw"))
    assert raw["logprobs_mode"] == "raw"


def test_lists_are_the_most_probable_tokens_without_those_of_probability_0(file: Path) -> None:
    (row,) = rows(file, sample())
    for at, values in enumerate(distributions()):
        order = [int(token) for token in np.argsort(-values, kind="stable")[:K] if values[token] > LEAST]
        assert row["rollout_topk_ids"][at] == order
    assert [len(top) for top in row["rollout_topk_ids"]] == [5, 5, 5, 5, 3]


def test_the_prompt_is_what_was_sent_as_ids_where_the_answer_does_not_have_all_of_it(file: Path) -> None:
    part = sample(input_token_logprobs=[[None, 17, None]])
    (row,) = rows(file, part, request=REQUEST | {"input_ids": PROMPT})
    assert row["prompt_ids"] == PROMPT
    with pytest.raises(BadInput, match="token ids of the prompt \\(1 of 4 tokens\\)") as error:
        rows(file, part)
    assert "logprob_start_len" in error.value.next_step


def test_samples_of_a_list_are_grouped_by_their_prompt(file: Path) -> None:
    two = rows(file, [sample(id="a"), sample(id="b")])
    assert [row["rollout_id"] for row in two] == ["answers/a", "answers/b"]
    assert two[0]["group_id"] == two[1]["group_id"] == "answers/1"
    other = [[None, token, None] for token in [5, 6, 7, 8]]
    batch = rows(file, [sample(id="a"), sample(id="b", input_token_logprobs=other)])
    assert batch[0]["group_id"] != batch[1]["group_id"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output_token_logprobs": None}, "no log-probabilities"),
        ({"completion_tokens": 4}, "log-probabilities of 5 tokens"),
        ({"output_top_logprobs": [[[-0.1, 3, None]]]}, "1 lists of top log-probabilities for 5 tokens"),
    ],
)
def test_what_cannot_be_a_whole_answer_is_refused(change: Row, match: str, file: Path) -> None:
    with pytest.raises(BadInput, match=match):
        rows(file, sample(**change))


def test_ids_that_are_not_those_of_the_values_are_refused(file: Path) -> None:
    with pytest.raises(BadInput, match="log-probabilities of 5 tokens, and 4 tokens"):
        rows(file, sample() | {"output_ids": RESPONSE[:4]})


def test_text_alone_is_refused_with_the_reason(file: Path) -> None:
    with pytest.raises(BadInput, match="retokenisation drift") as error:
        rows(
            file, {"text": "43", "meta_info": {"id": "a", "prompt_tokens": 4}}, request=REQUEST | {"input_ids": PROMPT}
        )
    assert '"return_logprob": true' in error.value.next_step
    with pytest.raises(BadInput, match="has no meta_info"):
        rows(file, {"text": "43"})


def test_weights_that_changed_on_the_way_are_told_apart_by_token(file: Path) -> None:
    spans = [{"version": "11", "start": 0, "end": 2}, {"version": "12", "start": 2, "end": 5}]
    (row,) = rows(file, sample(weight_versions=spans))
    assert row["policy_version"] == [11, 11, 12, 12, 12]
    (row,) = rows(file, sample(weight_version="default"))
    assert row["policy_version"] is None


def test_experts_are_read_where_k_is_known_and_said_to_be_left_out_where_not(file: Path) -> None:
    # GIVEN 3 layers of k = 2 for all of 9 tokens but the first 2 and the last
    experts = np.random.default_rng(2).integers(0, 16, (6, 3, 2)).astype("<i4")
    coded = sample(routed_experts=base64.b64encode(experts.tobytes()).decode())
    given = Given()
    (row,) = rows(file, coded, given, request=REQUEST | {"routed_experts_start_len": 2})
    assert row["routed_experts"] is None
    assert any("routed_experts" in sentence for sentence in given.assumed)
    (row,) = rows_of(read_answers(file), Given(), experts_per_token=2)
    assert np.array_equal(row["routed_experts"][2:], experts)
    assert (np.array(row["routed_experts"][:2]) == -1).all()
    with pytest.raises(BadInput, match="no multiple of 5"):
        list(rows_of(read_answers(file), Given(), experts_per_token=5))
