"""What a version was computed with: ``environment.json``, written when it is published and compared when it is rebuilt.

Its facts are those of the process that publishes; beside them stands what computed a stage elsewhere
(:mod:`flows.computed`).

It explains why two machines may give different bytes. No stage reads it, so a version's bytes never depend on it.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.git import show
from flows.leaves import leaves
from tasks import atomic, paths
from tasks.section import read_yaml

FILE = Path("environment.json")
ABSENT = "none"
_SECONDS_FOR_A_VERSION = 20
_SITE_PACKAGES = "lib/python3.*/site-packages"

# What decides which of a library's kernels runs, and with it the order of a sum.
_CPU_FLAGS = re.compile(r"fma|f16c|avx\w*|amx_\w+|sse4_[12]|asimd\w*|sve\w*|bf16|i8mm|neon")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    # The older name of ONEDNN_MAX_CPU_ISA, which oneDNN still reads.
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


# What only tests and checks of the code use (pyproject.toml), so that no stage computes with it.
TOOLS = frozenset(
    ("hypothesis", "import-linter", "kubernetes-validate", "mypy", "openai", "pandas-stubs", "peft", "pytest",
     "pytest-timeout", "pytest-xdist", "ruff", "transformers", "xllamacpp")
)  # fmt: skip
# How many cores there are changes no number, as threads are parameters; of a lock file, what is installed is compared.
_WITHOUT_EFFECT = frozenset({"cpu.cores", "lock_sha256", *(f"packages.{name}" for name in TOOLS)})


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Processor(_Facts):
    """The CPU: ``flags`` are its instruction sets that arithmetic libraries choose by, ``cores`` those we may use."""

    model: str
    flags: tuple[str, ...]
    cores: int


class Processes(_Facts):
    """In how many processes a stage computes, and with how many threads each."""

    world_size: int
    threads_per_process: int


class Environment(_Facts):
    """The recorded facts. ``packages`` are those of the lock file that are installed."""

    python: str
    system: str
    libc: str
    cpu: Processor
    gpus: tuple[str, ...]
    driver: str | None
    packages: Mapping[str, str]
    stages: Mapping[str, Processes]
    variables: Mapping[str, str]
    lock_sha256: str
    # What compiled the layers' kernels, where `train.compile` had them compiled.
    compiler: str | None = None
    # Each stage that was computed in another environment, with the facts that were others; None: not known in which.
    computed: Mapping[str, Mapping[str, str] | None] = {}

    @property
    def unknown(self) -> tuple[str, ...]:
        """The stages of which it is not known what computed them."""
        return tuple(stage for stage, facts in self.computed.items() if facts is None)


class Difference(_Facts):
    """A fact that is another one here than recorded, both as text."""

    fact: str
    recorded: str
    here: str

    @property
    def has_effect(self) -> bool:
        """Whether it may change what is computed. It may also be that of a stage: ``train: cpu.cores``."""
        return self.fact.rpartition(": ")[2] not in _WITHOUT_EFFECT

    def __str__(self) -> str:
        return f"{self.fact}: {self.recorded} recorded, {self.here} here"


def record(root: Path, python: Path | None = None) -> Environment:
    """Returns the facts of this machine, of the project at ``root``, and of the Python environment of ``python``.

    ``python`` is the interpreter of a virtual environment; None stands for the one that runs this.
    """
    lock = (root / paths.LOCK).read_bytes()
    gpus, driver = _gpus()
    params = read_yaml(root / paths.PARAMS)
    return Environment(
        python=platform.python_version() if python is None else _version_of(python),
        system=f"{platform.system()} {platform.machine()}",
        libc=" ".join(platform.libc_ver()),
        cpu=_processor(Path("/proc/cpuinfo")),
        gpus=gpus,
        driver=driver,
        packages=_packages(lock.decode(), python),
        stages=dict(_stages(params)),
        variables={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        lock_sha256=hashlib.sha256(lock).hexdigest(),
        compiler=_compiler() if (params.get("train") or {}).get("compile") else None,
    )


def write(root: Path, facts: Environment | None = None) -> None:
    """Writes ``environment.json`` of the project at ``root``, for Git to keep with the version: ``facts``, or those of
    this machine.
    """
    atomic.write_json(root / FILE, content(facts or record(root)))


def content(facts: Environment) -> dict[str, Any]:
    """Returns ``facts`` as they are written down."""
    return facts.model_dump(mode="json", exclude=None if facts.computed else {"computed"})


def recorded(root: Path, commit: str) -> Environment | None:
    """Returns what ``commit`` records, or None where it records nothing that can be read."""
    content = show(root, commit, FILE)
    if content is None:
        return None
    try:
        return Environment.model_validate_json(content)
    except ValidationError:
        return None


def compare(recorded: Environment, here: Environment, stages: Collection[str] = ()) -> tuple[Difference, ...]:
    """Returns the facts that are not the same, in the order in which they are recorded.

    A package that only one of the two has takes no part: the lock file also names tools for tests, and a stage that
    lacks what it imports would not have run. Where a stage was computed elsewhere, its own facts are compared as well;
    a fact that was another one for each of ``stages`` is told of them alone.
    """
    both = recorded.packages.keys() & here.packages.keys()
    theirs, ours = (
        facts_of(one.model_copy(update={"packages": {name: one.packages[name] for name in sorted(both)}}))
        for one in (recorded, here)
    )
    own = [(recorded.computed.get(stage) or {}).keys() for stage in stages]
    differences = [
        Difference(fact=fact, recorded=theirs.get(fact, ABSENT), here=ours.get(fact, ABSENT))
        for fact in {**theirs, **ours}
        if theirs.get(fact, ABSENT) != ours.get(fact, ABSENT) and not (own and all(fact in facts for facts in own))
    ]
    for stage in {**recorded.computed, **here.computed}:
        before, after = (one.computed.get(stage) or {} for one in (recorded, here))
        for fact in {**before, **after}:
            was, now = before.get(fact, theirs.get(fact, ABSENT)), after.get(fact, ours.get(fact, ABSENT))
            if was != now and not (fact.startswith("packages.") and ABSENT in (was, now)):
                differences.append(Difference(fact=f"{stage}: {fact}", recorded=was, here=now))
    return tuple(differences)


def other_facts(stage: str, computed: Environment, here: Environment) -> dict[str, str]:
    """Returns the facts that may have had an effect on ``stage`` where it was computed, and are others in ``here``.

    What the parameters have since come to say of another stage is none of them.
    """
    return {
        one.fact: one.recorded
        for one in compare(computed, here)
        if one.has_effect
        and (
            one.fact.startswith(f"stages.{stage}.")
            or not (one.fact.startswith("stages.") or (one.fact == "compiler" and ABSENT in (one.recorded, one.here)))
        )
    }


def facts_of(environment: Environment) -> dict[str, str]:
    """Returns each fact as text, by its name, but for those of stages that were computed elsewhere."""

    return {name: _told(value) for name, value in leaves(environment.model_dump(mode="json", exclude={"computed"}))}


def _told(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or ABSENT
    return ABSENT if value is None else str(value)


def _processor(cpuinfo: Path) -> Processor:
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip().lower(), value.strip())
    # x86 and Arm name them differently; Arm says no model, but the numbers of its maker and part.
    flags = (facts.get("flags") or facts.get("features") or "").split()
    arm = " ".join(facts[name] for name in ("cpu implementer", "cpu part") if name in facts)
    return Processor(
        model=facts.get("model name") or arm or platform.processor() or platform.machine(),
        flags=tuple(sorted(flag for flag in flags if _CPU_FLAGS.fullmatch(flag))),
        cores=len(os.sched_getaffinity(0)),
    )


def _gpus() -> tuple[tuple[str, ...], str | None]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_FOR_A_VERSION, check=True)
    except (OSError, subprocess.SubprocessError):
        return (), None
    return _parse_gpus(done.stdout)


def _parse_gpus(table: str) -> tuple[tuple[str, ...], str | None]:
    rows = [line.rpartition(", ") for line in table.splitlines() if ", " in line]
    return tuple(name for name, _, _ in rows), (rows[0][2] if rows else None)


def _compiler() -> str | None:
    command = [os.environ.get("CXX") or "g++", "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_FOR_A_VERSION, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0]


def _packages(lock: str, python: Path | None) -> dict[str, str]:
    if python is None:
        found = importlib.metadata.distributions()
    else:
        found = importlib.metadata.distributions(path=list(map(str, python.parent.parent.glob(_SITE_PACKAGES))))
    installed = {_normal(one.metadata["Name"]): one.version for one in found if one.metadata}
    names = [line.partition("==")[0].strip() for line in lock.splitlines() if "==" in line]
    return {name: installed[_normal(name)] for name in names if _normal(name) in installed}


def _normal(name: str) -> str:
    # As packages are compared: PEP 503.
    return re.sub(r"[-_.]+", "-", name).lower()


def _version_of(python: Path) -> str:
    # A virtual environment says which Python it was made with; starting that would cost a process to learn the same.
    for line in (python.parent.parent / "pyvenv.cfg").read_text().splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "version":
            return value.strip()
    return platform.python_version()


def _stages(params: Mapping[str, Any]) -> Iterator[tuple[str, Processes]]:
    for name, section in params.items():
        with contextlib.suppress(ValidationError, TypeError):
            yield name, Processes.model_validate(section)
