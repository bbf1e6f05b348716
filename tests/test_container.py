"""The container and the conda environment agree with the lock file, and keep the rules of a safe image."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
DEPLOYMENTS = ROOT / "deployments"
LOCK = dict(line.partition(";")[0].split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())
PYTHON = (
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].strip("=").removesuffix(".*")
)

# The CUDA release of the wheel that `pip install torch==VERSION` gets: what its metadata requires as cuda-toolkit.
CUDA_OF_TORCH = {"2.13.0": "13.0"}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOYMENTS / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def commands() -> list[list[str]]:
    """Every command of every RUN, as words."""
    return [shlex.split(command) for run in of("RUN") for command in run.split("&&")]


def test_every_base_image_is_pinned_by_digest() -> None:
    images = [rest.split()[0] for rest in of("FROM")]
    assert images
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_base_has_the_cuda_release_of_the_locked_torch() -> None:
    image = of("FROM")[-1].split()[0]
    assert image.startswith(f"nvidia/cuda:{CUDA_OF_TORCH[LOCK['torch']]}.")


def test_the_image_has_the_project_s_python() -> None:
    assert any(rest.startswith(f"python:{PYTHON}.") for rest in of("FROM"))
    assert [f"python{PYTHON}", "-m", "venv", "/opt/venv"] in commands()


def test_pip_installs_nothing_but_what_is_locked() -> None:
    installs = [command for command in commands() if "pip" in command and "install" in command]
    assert installs
    for command in installs:
        assert command[command.index("-c") + 1] == "requirements.lock"
    copied = [rest.split() for name, rest in instructions() if name == "COPY"]
    order = [name for name, rest in instructions() if name == "COPY" or "pip install" in rest]
    assert "requirements.lock" in copied[1]
    # The lock file before the packages, the code after them: a change of code installs nothing anew.
    assert order == ["COPY", "COPY", "RUN", "COPY", "COPY", "COPY"]


def test_it_runs_as_nobody_special() -> None:
    user = of("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, so that Kubernetes can see that it is not root"
    names = [name for name, _ in instructions()]
    assert "USER" not in names[names.index("USER") + 1 :]
    assert "RUN" not in names[names.index("USER") :]


def test_nothing_is_fetched_past_the_package_managers() -> None:
    assert not of("ADD")
    words = {word for command in commands() for word in command}
    assert not words & {"curl", "wget", "npm", "conda"}
    assert not any("|" in run for run in of("RUN"))
    assert not any(
        secret in name for name in " ".join(of("ENV") + of("ARG")).split() for secret in ("TOKEN", "PASSWORD")
    )


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    rules = (DEPLOYMENTS / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source
        for rest in of("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }  # fmt: skip
    assert "*" in rules
    assert allowed == copied
    for name in copied:
        assert (ROOT / name).exists()
        assert not fnmatch.fnmatch(name, "data*")


@pytest.fixture(scope="module")
def conda() -> dict[str, list[object]]:
    found: dict[str, list[object]] = YAML(typ="safe").load(DEPLOYMENTS / "environment.yml")
    return found


def test_conda_brings_the_same_python(conda: dict[str, list[object]]) -> None:
    assert f"python={PYTHON}" in conda["dependencies"]


def test_conda_leaves_every_package_to_pip_and_the_lock_file(conda: dict[str, list[object]]) -> None:
    names = {re.split("[=<>]", entry)[0] for entry in conda["dependencies"] if isinstance(entry, str)}
    # A package from both would be in one version for conda and in another one for pip.
    assert not names & {name.lower() for name in LOCK} - {"pip"}
    (pip,) = (entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    # conda runs pip in the folder of the file.
    lock, project = (shlex.split(line) for line in pip)
    assert lock[0] == "-c"
    assert (DEPLOYMENTS / lock[1]).resolve() == ROOT / "requirements.lock"
    assert project[0] == "-e"
    assert (DEPLOYMENTS / project[1] / "pyproject.toml").is_file()


def test_the_lock_file_names_all_that_pip_would_install() -> None:
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked = {canonicalize_name(name) for name in LOCK}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in project["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement} is not in requirements.lock"
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                for line in metadata.requires(name) or []:
                    other = Requirement(line)
                    if other.marker is None or other.marker.evaluate({"extra": extra}):
                        waiting.append(other)
    assert len(seen) > 100
