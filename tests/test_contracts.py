"""What keeps the house in order: import directions, and a dvc.yaml that names everything a stage depends on."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
import pytest
from ruamel.yaml import YAML

from tasks import params as all_params
from tasks.curve import COLUMNS
from tasks.section import Section, is_operational
from tasks.step_log import SPEEDS

ROOT = Path(__file__).parent.parent
PIPELINE: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")
STAGES: dict[str, Any] = PIPELINE["stages"]


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("tasks", "lm", cache_dir=None)


def code_of(stage: str, imports: grimp.ImportGraph) -> set[Path]:
    """The files of the stage's package and of all that it imports, at whatever remove."""
    package = f"tasks.{stage}"
    starts = {module for module in imports.modules if module == package or module.startswith(f"{package}.")}
    return {_file(module) for start in starts for module in {start, *imports.find_upstream_modules(start)}}


def test_imports_point_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_the_code_that_it_imports(stage: str, imports: grimp.ImportGraph) -> None:
    files = code_of(stage, imports)
    declared = [ROOT / dependency for dependency in STAGES[stage]["deps"]]
    missing = {
        str(file.relative_to(ROOT))
        for file in files
        if file.read_text().strip() and not any(file.is_relative_to(path) for path in declared)
    }
    assert not missing, f"dvc.yaml: {stage}: add to deps: {sorted(missing)}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_import(stage: str, imports: grimp.ImportGraph) -> None:
    single_files = {dependency for dependency in STAGES[stage]["deps"] if dependency.endswith(".py")}
    surplus = single_files - {str(file.relative_to(ROOT)) for file in code_of(stage, imports)}
    assert not surplus, f"dvc.yaml: {stage}: remove from deps: {sorted(surplus)}"


@pytest.mark.parametrize(
    ("curve", "columns"),
    [
        ("models/curve.csv", COLUMNS),
        ("models/int8/curve.csv", COLUMNS),
        ("speed/train.csv", SPEEDS),
        ("speed/quantize.csv", SPEEDS),
    ],
)
def test_all_that_a_curve_has_is_plotted(curve: str, columns: tuple[str, ...]) -> None:
    plotted: list[str] = []
    for plot in (plot for entry in PIPELINE["plots"] for plot in entry.values() if curve in plot["y"]):
        found = plot["y"][curve]
        plotted += [found] if isinstance(found, str) else found
    assert sorted(plotted) == sorted(set(columns) - {"step"})


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_locked_environment(stage: str) -> None:
    assert "requirements.lock" in STAGES[stage]["deps"]


def identity_of(section: type[Section], prefix: str) -> Iterator[str]:
    """The keys that decide what is written: a section inside that has operational ones too counts key by key."""
    for name, field in section.model_fields.items():
        inner, key = field.annotation, f"{prefix}.{name}"
        if is_operational(field):
            continue
        if (
            isinstance(inner, type)
            and issubclass(inner, Section)
            and any(map(is_operational, inner.model_fields.values()))
        ):
            yield from identity_of(inner, key)
        else:
            yield key


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "card"])
def test_a_stage_depends_on_each_of_its_parameters(stage: str) -> None:
    section = all_params.Params.model_fields[stage].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    identity = set(identity_of(section, stage))
    declared = {name for name in STAGES[stage]["params"] if name.startswith(f"{stage}.")}
    assert declared == identity


def test_the_card_depends_on_all_sections_but_the_flows() -> None:
    assert set(STAGES["card"]["params"]) == set(all_params.Params.model_fields) - {"flow", "notice", "publish"}


def test_each_stage_lies_in_a_package_of_its_name() -> None:
    for stage, description in STAGES.items():
        assert description["cmd"] == f"python -m tasks.{stage}"
        assert (ROOT / "tasks" / stage / "__main__.py").is_file()
        assert description["desc"]


def test_the_lock_file_pins_every_package_exactly() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    assert "torch==2.13.0" in lines


def test_no_test_lies_where_none_is_looked_for() -> None:
    looked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    places = [place for pattern in looked for place in ROOT.glob(pattern)]
    found = {file for place in places for file in (place.rglob("test_*.py") if place.is_dir() else [place])}
    assert found == set((ROOT / "tests").rglob("test_*.py"))


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
