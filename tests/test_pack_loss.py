"""What packing loses is what two score runs show, and a plan says what each choice costs before anything is written."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_checkpoint
from rich.console import Console
from some_rollouts import Row, rollout
from test_pack import STAGES, TARGETS, exact_row, rows_of, run_pack, write

from trm_audit.cli import cli
from trm_audit.errors import BadInput, RowError, UsageError
from trm_audit.pipeline.pack import pack
from trm_audit.pipeline.pack_loss import plan
from trm_audit.pipeline.pack_options import PackOptions, PackResult, Target
from trm_audit.pipeline.score import ScoreOptions, score
from trm_audit.report.pack_tables import (
    SEQUENCES,
    TOKENS,
    Figures,
    Loss,
    Spread,
    console_on,
    loss_of,
    plan_sentence,
    render_loss,
    render_plan,
)

INF = math.inf


def trained_on(
    folder: Path, to: str, checkpoint: Path, rows: list[list[Row]]
) -> tuple[list[Row], list[Row], PackResult]:
    """Rows of score shards: with full logits, and as packed; and what packing said."""
    source = write(folder / "in", *rows)
    result = run_pack(source, folder / "out", to, model=checkpoint, measure=1.0, deltas=(0.02, 0.3))
    score([str(source)], str(folder / "exact"), ScoreOptions(model=checkpoint))
    score([str(folder / "out")], str(folder / "packed"), ScoreOptions(model=checkpoint))
    return rows_of(folder / "exact"), rows_of(folder / "packed"), result


@pytest.mark.parametrize("to", TARGETS)
def test_bounds_of_packed_rollouts_hold_and_the_loss_is_what_two_score_runs_show(
    tmp_path: Path, to: str, checkpoint: Path
) -> None:
    shards = [[exact_row(8 * k + i, list(STAGES)[i % 6], 3 + i) for i in range(8)] for k in range(3)]
    exact, packed, result = trained_on(tmp_path, to, checkpoint, shards)
    assert len(exact) == len(packed) == 24
    loss = result.loss
    assert loss is not None
    estimate = {"sketch": "kl_estimate", "topk": "kl_lower", "sampled": "k2", "q16": "kl"}[to.partition(":")[0]]
    for row, mine in zip(exact, packed, strict=True):
        np.testing.assert_allclose(mine["log_ratio"], row["log_ratio"], atol=2e-4)
        for name, sign in (("lower", 1), ("upper", -1)) if estimate.startswith("kl_") else ():
            for of in ("kl", "tv"):
                gap = np.array(row[of]) - np.array(mine[f"{of}_{name}"])
                assert (sign * gap >= -1e-5 * (1 + np.array(row[of]))).all()
    # THEN the loss that was printed is that of these two runs
    kl, found = (
        np.array([row[f"seq_max_{name}"] for row in rows]) for name, rows in (("kl", exact), (estimate, packed))
    )
    assert (loss.num_sequences, loss.num_tokens, loss.num_violated) == (24, sum(len(r["kl"]) for r in exact), 0)
    assert loss.estimate is not None
    assert loss.estimate.least == pytest.approx((found / kl).min(), rel=1e-4)
    assert loss.estimate.most == pytest.approx((found / kl).max(), rel=1e-4)
    for one in loss.verdicts:
        if to.startswith("topk"):
            upper = np.array([row["seq_max_kl_upper"] for row in packed])
            assert one.changed == 0
            assert one.undecided == ((found <= one.delta) & (upper > one.delta)).sum()
        else:
            assert one.changed == ((found <= one.delta) != (kl <= one.delta)).sum()
    assert loss.bytes_after == pytest.approx(result.bytes_after / result.num_tokens)
    assert loss.bytes_before == pytest.approx(result.bytes_before / result.num_tokens)


def test_without_a_share_a_few_rollouts_are_measured_on(tmp_path: Path, checkpoint: Path) -> None:
    source = write(tmp_path / "in", [exact_row(i) for i in range(12)])
    result = run_pack(source, tmp_path / "out", "sketch:5,64", model=checkpoint)
    assert result.loss is not None
    assert result.loss.num_sequences == 8
    nothing = run_pack(write(tmp_path / "none", [rollout(41)]), tmp_path / "out-none", "sampled", model=checkpoint)
    assert nothing.loss is None


def figures(**values: list[float]) -> Figures:
    """Sequences of one token each; what is not given is not known."""
    n = len(next(iter(values.values())))
    tokens = {name: np.array(values.get(name, [math.nan] * n)) for name in TOKENS}
    names = (name.removeprefix("seq_max_") for name in SEQUENCES)
    return Figures({f"seq_max_{name}": np.array(values.get(name, [math.nan] * n)) for name in names}, tokens)


EXACT = figures(kl=[0.01, 0.04, 0.06, 0.2], tv=[0.05, 0.1, 0.12, 0.3])


def sketched(**values: list[float]) -> Loss:
    best = {"kl_estimate": [0.01, 0.04, 0.06, 0.2], "kl_lower": [0.0] * 4, "kl_upper": [1.0] * 4}
    best |= {"tv_lower": [0.0] * 4, "tv_upper": [0.06, 0.1, 0.12, 0.33]}
    return loss_of("sketch:20,64", EXACT, figures(**{**best, **values}), [0.05], 100.0, 10.0)


def test_a_verdict_changes_where_estimate_and_exact_kl_stand_on_different_sides() -> None:
    assert [one.changed for one in sketched().verdicts] == [0]
    assert [one.changed for one in sketched(kl_estimate=[0.01, 0.051, 0.049, 0.2]).verdicts] == [2]
    assert [one.changed for one in sketched(kl_estimate=[0.01, 0.05, 0.06, 0.2]).verdicts] == [0]  # equality keeps


def test_a_verdict_is_undecided_where_the_bounds_contain_the_threshold() -> None:
    for lower, upper, undecided in ((0.0, 0.05, 0), (0.0, 0.06, 1), (0.05, 0.06, 1), (0.051, 0.06, 0)):
        (one,) = sketched(kl_lower=[lower] + [0.0] * 3, kl_upper=[upper] + [0.01] * 3).verdicts
        assert one.undecided == undecided  # an upper bound of delta keeps, a lower one does not reject
    farthest = math.sqrt(0.05 / 2)
    (one,) = sketched(tv_lower=[0.0, 0.0, 0.0, 0.3], tv_upper=[farthest, 0.2, 0.1, 0.4]).verdicts
    assert one.undecided_tv == 1


def test_lists_change_no_verdict_unless_a_bound_is_wrong() -> None:
    right = figures(kl_lower=[0.0, 0.0, 0.055, 0.1], kl_upper=[0.02, 0.06, 0.07, 0.3])
    wrong = figures(kl_lower=[0.0, 0.055, 0.055, 0.1], kl_upper=[0.02, 0.06, 0.07, 0.3])
    for packed, changed in ((right, 0), (wrong, 1)):
        found = loss_of("topk:20", EXACT, packed, [0.05], 1.0, 1.0)
        assert [one.changed for one in found.verdicts] == [changed]
        assert found.num_violated == changed


def test_bounds_on_the_wrong_side_are_counted_token_by_token() -> None:
    loss = sketched(kl_lower=[0.02, 0.0, 0.0, 0.0], tv_upper=[0.06, 0.09, 0.12, 0.29])
    assert (loss.num_bounds, loss.num_violated) == (16, 3)
    assert sketched(tv_upper=[0.05, 0.1, 0.12, 0.3]).num_violated == 0  # equality holds
    assert sketched(kl_upper=[INF] * 4).num_violated == 0


def test_ratios_leave_out_what_has_none() -> None:
    exact = figures(kl=[0.0, 0.1, INF, 0.2, math.nan], tv=[0.0, 0.1, 1.0, 0.2, math.nan])
    packed = figures(k2=[0.5, 0.3, 0.5, 0.4, math.nan])
    loss = loss_of("sampled", exact, packed, [0.05], 1.0, 1.0)
    assert loss.estimate is not None
    assert (loss.estimate.least, loss.estimate.most) == pytest.approx((2.0, 3.0))
    assert (loss.num_sequences, loss.tv_upper, loss.kl_width, loss.num_bounds) == (4, None, None, 0)
    assert loss.verdicts[0].undecided is None


def test_quantiles_are_values_so_that_an_infinite_one_stays_where_it_is() -> None:
    spread = Spread.of(np.array([1.0, 2.0, 3.0, INF, math.nan]))
    assert spread is not None
    assert (spread.least, spread.most) == (1.0, INF)
    assert spread.median in (2.0, 3.0)
    assert Spread.of(np.array([math.nan])) is None


def test_the_cheapest_that_decides_as_the_logits_do_is_named() -> None:
    good = sketched(tv_upper=[0.055, 0.11, 0.13, 0.32])
    wide = loss_of(
        "sketch:8,64",
        EXACT,
        figures(kl_estimate=[0.01, 0.04, 0.06, 0.2], tv_upper=[0.1, 0.2, 0.3, 0.6]),
        [0.05],
        100.0,
        5.0,
    )
    wrong = loss_of("sampled", EXACT, figures(k2=[0.1, 0.04, 0.06, 0.2]), [0.05], 100.0, 1.0)
    assert [loss.as_exact for loss in (good, wide, wrong)] == [True, False, False]
    assert plan_sentence([wide, good, wrong]).startswith("sketch:20,64, 10 bytes a token, is the cheapest")
    assert "keep full logits" in plan_sentence([wide, wrong])


def test_a_plan_measures_every_choice_and_writes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    source = write(tmp_path / "in", [rollout(60), *(exact_row(i) for i in range(8))], [exact_row(20)])
    before = sorted(tmp_path.rglob("*"))
    losses = plan([str(source)], PackOptions(model=checkpoint), tokens=30)
    assert sorted(tmp_path.rglob("*")) == before
    names = [loss.to for loss in losses]
    assert names[:3] == ["sketch:8,64", "sketch:8,128", "sketch:8,256"]
    assert {"topk:20", "sampled", "q16"} <= set(names)
    assert len(names) == len(set(names)) == 18
    assert {(loss.num_sequences, loss.num_tokens) for loss in losses} == {(5, 30)}
    q16 = losses[names.index("q16")]
    assert q16.estimate is not None
    assert q16.estimate.median == pytest.approx(1, abs=1e-3)
    # a longer list and a longer sketch take more bytes, and each of these figures is that of packing to it
    assert losses[0].bytes_after < losses[1].bytes_after < losses[2].bytes_after
    packed = run_pack(write(tmp_path / "same", [exact_row(i) for i in range(5)]), tmp_path / "out", "sketch:8,128")
    assert losses[1].bytes_after == pytest.approx(packed.bytes_after / packed.num_tokens, rel=0.1)


def test_a_plan_needs_a_model_and_full_logits(tmp_path: Path, checkpoint: Path) -> None:
    source = str(write(tmp_path / "in", [rollout(0)]))
    with pytest.raises(UsageError, match="--model"):
        plan([source], PackOptions())
    with pytest.raises(BadInput, match="no rollout has full logits"):
        plan([source], PackOptions(model=checkpoint))


def test_tables_show_the_figures() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    render_loss(sketched(kl_estimate=[0.01, 0.051, 0.06, 0.2]), console)
    render_plan([sketched()], console)
    shown = console.export_text()
    for part in ("kl_estimate / kl", "tv_upper / tv", "1 (25 %)", "0 of 16 bounds", "sketch:20,64", "4 rollouts"):
        assert part in shown


@pytest.mark.parametrize("width", [60, 80])
def test_a_plan_names_every_choice_in_full_in_a_narrow_terminal(width: int) -> None:
    # GIVEN the choices of a plan whose names are longest, and 304,128 bytes a token
    names = ["sketch:8,64", "sketch:20,256", "sketch:256,256", "topk:20", "topk:256", "sampled", "q16"]
    unknown = figures(k2=[0.1] * 4, kl=EXACT.sequences["seq_max_kl"].tolist())
    losses = [loss_of(to, EXACT, unknown, [0.02, 0.05, 0.1], 608256.0, 304128.0) for to in names]
    # WHEN they are shown in few columns THEN each is there whole, with its bytes, and nothing is cut off
    console = Console(width=width, record=True, file=io.StringIO())
    render_plan(losses, console)
    lines = console.export_text().splitlines()
    for to in names:
        assert [line.split()[1] for line in lines if line.split()[:1] == [to]] == ["304,128"]
    assert not [line for line in lines if "…" in line or len(line) > width]
    assert "before compression" in " ".join(lines)


def test_a_plan_takes_80_columns_without_breaking_a_figure() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    render_plan([sketched()], console)
    (row,) = (line for line in console.export_text().splitlines() if line.startswith("sketch:20,64 "))
    assert row.split() == ["sketch:20,64", "10", "10", "1.00-1.00", "1.000", "0", "4", "1"]


def test_tables_in_a_pipe_have_120_columns_or_those_that_the_user_asked_for(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns, width in (("80", 120), ("200", 200)):
        monkeypatch.setenv("COLUMNS", columns)
        assert console_on(io.StringIO()).width == width
    monkeypatch.delenv("COLUMNS")
    source = write(tmp_path / "in", [exact_row(0)])
    shown = CliRunner().invoke(cli, ["pack", str(source), "--plan", "--model", str(checkpoint)])
    assert shown.exit_code == 0
    (line,) = (line for line in shown.output.splitlines() if line.startswith("bytes: "))
    assert 80 < len(line) <= 120


def test_a_model_of_another_vocabulary_is_refused_when_the_loss_is_measured(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", 40)
    source = write(tmp_path / "in", [exact_row(0)])
    with pytest.raises(RowError, match="32 columns, 40 are needed"):
        run_pack(source, tmp_path / "out", "sketch:5,64", model=other)
    assert math.isfinite(run_pack(source, tmp_path / "out", "sketch:5,64").seconds)  # the packing itself is done
    assert os.listdir(tmp_path / "out" / "data") == ["part-0.parquet"]


def test_a_model_that_is_not_there_is_said_before_anything_is_packed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [rollout(0)])
    options = PackOptions(Target("sampled"), model=tmp_path / "nowhere")
    with pytest.raises(BadInput, match="is not a folder"):
        pack([str(source)], str(tmp_path / "out"), options)
    assert not (tmp_path / "out").exists()
