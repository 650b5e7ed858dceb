"""The rules of the house: what imports what, what loads torch, and that documents say what the code does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import click
import pyarrow.parquet as pq
import pytest
from conftest import Run

import trm_audit
from trm_audit.cli import cli
from trm_audit.rollout import DIVERGENCES, TOKEN_SCORES
from trm_audit.shards import schema
from trm_audit.shards.training import FIRST

ROOT = Path(trm_audit.__file__).parent
HEAVY = {"torch", "transformers", "scipy", "rich", "pyarrow", "numpy", "safetensors", "matplotlib", "jinja2"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "console": set(),
    "flags": {"rollout"},
    "numerics": {"numerics"},
    "rollout": {"numerics"},
    "criteria": {"criteria", "rollout", "errors", "numerics"},
    "shards": {"shards", "rollout", "errors", "numerics"},
    "record": {"record", "shards", "rollout", "errors", "numerics", "__init__"},
    "adapters": {"adapters", "shards", "rollout", "errors", "numerics"},
    "engine": {"engine", "record", "shards", "rollout", "errors", "numerics"},
    "report": {"report", "rollout", "errors", "numerics"},
    "pipeline": {
        "pipeline",
        "adapters",
        "engine",
        "record",
        "report",
        "criteria",
        "shards",
        "rollout",
        "errors",
        "numerics",
        "__init__",
    },
    "commands": {"pipeline", "adapters", "report", "console", "flags", "errors"},
    "cli": {
        "commands",
        "pipeline",
        "report",
        "criteria",
        "console",
        "flags",
        "rollout",
        "errors",
        "numerics",
        "__init__",
    },
    "__init__": set(),
}
"""Which parts of the package a part may import (`__init__` stands for the version)."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(file: Path) -> Iterator[str]:
    """Parts of the package that a module imports, whether at its head, within functions, or for types."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [str(node.module)]
        for name in names:
            if name.split(".")[0] == "trm_audit":
                yield name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("file", [file for file in modules() if part_of(file) != "__init__"], ids=str)
def test_imports_run_one_way(file: Path) -> None:
    assert part_of(file) in MAY_IMPORT, "a new part of the house needs its line above"
    assert set(imports_of(file)) <= MAY_IMPORT[part_of(file)]


def loaded_after(code: str, *arguments: object) -> set[str]:
    """Which heavy packages a fresh process has loaded after some code."""
    tail = f"\nimport sys; print('\\n' + ' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    command = [sys.executable, "-c", code + tail, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(found.stdout.splitlines()[-1].split())


def test_importing_the_package_and_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_after("import trm_audit, trm_audit.cli, trm_audit.console") == set()


def test_filter_report_validate_and_bounds_never_load_torch(exact_scores: Path, tmp_path: Path) -> None:
    # GIVEN one process that runs them all
    code = """
import sys
from trm_audit.cli import cli
scores, rollouts, out = sys.argv[1:]
for command in (
    ["filter", scores, "--delta-max", "0.05", "-o", out],
    ["report", scores, "--delta-max", "0.05"],
    ["report", scores, "--json"],
    ["report", scores, "--format", "html"],
    ["report", scores, out],
    ["bounds", "--horizon", "4096", "--kl-max", "1e-4", "--kl-seq", "0.01"],
    ["validate", rollouts, "--no-logits"],
    ["schema", "rollout"],
):
    try:
        cli.main(command, standalone_mode=False)
    except SystemExit:
        raise AssertionError(command)
"""
    rows = exact_scores.parent / "plain"
    rows.mkdir(exist_ok=True)
    table = pq.read_table(exact_scores.parent / "rollouts" / "part-0.parquet")
    pq.write_table(table.replace_schema_metadata({"trm_audit.kind": "rollouts"}), rows / "a.parquet")
    # THEN neither torch nor transformers is there
    loaded = loaded_after(code, exact_scores, rows, tmp_path / "train")
    assert not loaded & {"torch", "transformers"}
    assert {"pyarrow", "numpy"} <= loaded


def test_every_public_name_resolves() -> None:
    for name in trm_audit.__all__:
        assert getattr(trm_audit, name) is not None
    assert set(trm_audit.__all__) <= set(dir(trm_audit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = trm_audit.nothing


def test_the_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.asname for block in guarded for node in block.body for alias in getattr(node, "names", ())}
    assert seen == set(trm_audit.__all__) - {"__version__"}


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_help_and_version_work(run: Run) -> None:
    helped = run("--help")
    assert helped.code == 0
    for name in cli.commands:
        assert f"  {name} ".encode() in helped.out
        assert run(name, "--help").code == 0
    assert run("--version").out.decode().strip().endswith(trm_audit.__version__)


def documented(page: str) -> dict[str, str]:
    """Columns in the tables of a page of schemas/ -> type, from lines like | `a`, `b` | type | ..."""
    found = {}
    text = files("trm_audit.schemas").joinpath(page).read_text("utf-8")
    for line in text.splitlines():
        cells = [cell.strip().replace("\\<", "<").replace("\\>", ">") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) >= 2 and cells[0].startswith("`"):
            found.update(dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1]))
    return found


def test_rollout_md_lists_the_columns_that_are_read() -> None:
    text = files("trm_audit.schemas").joinpath("rollout.md").read_text("utf-8")
    section = text.split("## Columns")[1].split("## Rules")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", section, flags=re.M)
    types = {name: kind.strip().replace("\\", "") for name, kind, _ in rows}
    assert list(types) == list(schema.ROLLOUT_COLUMNS)
    for name, column in schema.ROLLOUT_COLUMNS.items():
        spelled = str(column.type).replace("item: ", "").replace("element: ", "")
        assert types[name].split(" or ")[0] == spelled
    assert {name for name, _, needed in rows if needed.strip() == "MUST"} == {
        name for name, column in schema.ROLLOUT_COLUMNS.items() if column.required
    }


def test_score_md_lists_the_columns_that_are_written(exact_scores: Path) -> None:
    names = documented("score.md")
    written = pq.read_schema(exact_scores / "data" / "part-0.parquet")
    expected = set(TOKEN_SCORES) | {"grade", "audited_policy", "num_tokens", "staleness"}
    expected |= {"num_disagreements", "num_infinite", "seq_max_D", "seq_mean_D", "seq_sum_D", "seq_argmax_D"}
    assert expected == {name for name in names if not name.startswith("trm_audit.")}
    for name, kind in names.items():
        if "_D" in name:
            for divergence in DIVERGENCES:
                assert str(written.field(name.replace("_D", f"_{divergence}")).type) == kind
        elif name in TOKEN_SCORES:
            assert str(written.field(name).type) == "list<element: float>"
        elif not name.startswith("trm_audit."):
            assert str(written.field(name).type) == kind


def test_score_md_names_every_divergence_in_order() -> None:
    text = files("trm_audit.schemas").joinpath("score.md").read_text("utf-8")
    line = text.split("D is each of")[1].split("with ratio")[0]
    assert tuple(re.findall(r"`(\w+)`", line)) == DIVERGENCES


def test_score_md_lists_the_footer_and_its_counts(exact_scores: Path) -> None:
    footer = pq.read_metadata(exact_scores / "data" / "part-0.parquet").metadata
    names = {name for name in documented("score.md") if name.startswith("trm_audit.")}
    assert names == {key.decode() for key in footer if key.startswith(b"trm_audit.")}
    described = documented("score.md")["trm_audit.counts"]
    for name in json.loads(footer[b"trm_audit.counts"]):
        assert name in described or name in ("grades", "audited_policies")


def test_training_md_lists_the_columns_that_are_written() -> None:
    names = [name for name in documented("training.md") if re.fullmatch(r"[a-z_]+", name)]
    causes = {"no_policy_tokens"}
    assert [name for name in names if name in FIRST] == list(FIRST)
    assert set(names) - set(FIRST) - causes <= {"grade", "num_tokens", "seq_"}


@pytest.mark.parametrize("name", ["rollout", "score", "training", "stream", "report"])
def test_every_page_of_the_formats_can_be_printed(run: Run, name: str) -> None:
    outcome = run("schema", name)
    assert outcome.code == 0
    assert outcome.out.decode() == files("trm_audit.schemas").joinpath(f"{name}.md").read_text("utf-8")


def test_pages_that_messages_point_to_exist() -> None:
    mentioned = set()
    for file in modules():
        mentioned |= set(re.findall(r"schemas/([\w.]+\.(?:md|json))", file.read_text("utf-8")))
    assert mentioned
    for page in mentioned:
        assert files("trm_audit.schemas").joinpath(page).is_file(), page


def test_rules_that_messages_name_exist() -> None:
    text = files("trm_audit.schemas").joinpath("rollout.md").read_text("utf-8")
    rules = {int(number) for number in re.findall(r"^(\d+)\. ", text, flags=re.M)}
    assert rules == set(range(1, 14))
    for file in modules():
        for number in re.findall(r"rule (\d+)", file.read_text("utf-8")):
            assert int(number) in rules, file


def test_modules_and_functions_stay_small() -> None:
    too_long = []
    for file in modules():
        text = file.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 40:
                    too_long.append(f"{file.name}: {node.name} has {lines} lines")
    assert too_long == []


def test_every_folder_of_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))
    folders = {file.parent.relative_to(ROOT.parent) for file in ROOT.rglob("__init__.py")}
    names = {".".join(folder.parts) for folder in folders} | {"trm_audit.schemas"}
    assert set(project["tool"]["setuptools"]["packages"]) == names
