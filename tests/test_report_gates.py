"""A gate names what must not be: it fails when its condition holds, and when the report cannot tell."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from trm_audit.errors import UsageError
from trm_audit.report.builder import SummaryBuilder
from trm_audit.report.gates import Gate, check, parse_gate
from trm_audit.report.summary import AuditSummary


@pytest.fixture
def summary() -> AuditSummary:
    builder = SummaryBuilder()
    builder.add(
        pa.RecordBatch.from_pydict(
            {
                "keep": [True, True, False, True],
                "seq_max_kl": [0.01, 0.02, math.inf, 0.04],
                "num_tokens": [5, 5, 5, 5],
                "engine": ["vllm", "vllm", "sglang", "sglang"],
            }
        )
    )
    return builder.finish()


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("acceptance<0.7", Gate("acceptance", "<", 0.7)),
        (" tokens.k3.mean >= 1e-3 ", Gate("tokens.k3.mean", ">=", 1e-3)),
        ("sequences.seq_max_kl.max==inf", Gate("sequences.seq_max_kl.max", "==", math.inf)),
        ("n_kept!=-1", Gate("n_kept", "!=", -1.0)),
    ],
)
def test_gates_are_name_operator_number(text: str, gate: Gate) -> None:
    assert parse_gate(text) == gate


@pytest.mark.parametrize("text", ["", "acceptance", "acceptance<", "<0.7", "acceptance=0.7", "a<b", "a<nan", "a<1<2"])
def test_what_is_no_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r'--fail-on "acceptance<0\.7"'):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("acceptance<0.75", False),
        ("acceptance<=0.75", True),
        ("acceptance>0.75", False),
        ("acceptance>=0.75", True),
        ("acceptance==0.75", True),
        ("acceptance!=0.75", False),
        ("sequences.seq_max_kl.max>100", True),
        ("by_engine.0.acceptance<0.6", True),
        ("by_engine.1.acceptance<0.6", False),
    ],
)
def test_a_gate_fails_exactly_when_its_condition_holds(summary: AuditSummary, text: str, fails: bool) -> None:
    assert bool(check([parse_gate(text)], summary)) is fails


def test_each_failure_says_the_number_and_the_condition(summary: AuditSummary) -> None:
    gates = [parse_gate(text) for text in ("acceptance<0.9", "n_kept<2", "counts.num_tokens>19")]
    assert check(gates, summary) == [
        "acceptance is 0.75 (acceptance<0.9)",
        "counts.num_tokens is 20 (counts.num_tokens>19)",
    ]


def test_what_the_data_cannot_tell_fails(summary: AuditSummary) -> None:
    messages = check([parse_gate("violations.prompts.share>0.1"), parse_gate("counts.num_groups<1")], summary)
    assert len(messages) == 2
    assert all("is not known" in message for message in messages)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("acceptence<0.7", "acceptance"),
        ("sequences.seq_max_k1.p99>1", "sequences.seq_max_kl.p99"),
        ("seq_max_kl>1", "d_max.seq_max_kl"),
        ("by_engine.7.n>1", "counts"),
        ("verdict>1", "acceptance"),
    ],
)
def test_an_unknown_name_lists_near_ones(summary: AuditSummary, text: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"(?s)no number named.*Near: .*{near}"):
        check([parse_gate(text)], summary)
