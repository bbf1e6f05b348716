"""A whole project for one scenario: the repository's own files, tiny parameters, a little text, and ``overnight``."""

import dataclasses
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import psutil
import tiny
from processes import within
from ruamel.yaml import YAML

STAGES = ("ingest", "shard", "train", "quantize", "evaluate", "card")
# What a version consists of. `dvc.lock` names each file's digest, code and parameters included.
ARTIFACTS = ("data/corpus", "data/shards", "models", "dvc.lock", "data/raw.dvc")
SECONDS_TO_END = 10.0
_SECONDS_A_RUN = 240


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    def outcomes(self) -> dict[str, str]:
        """The table of stages at the end of a run: collect and each stage with ran, cached, skipped or failed."""
        rows = re.findall(r"^(\w+) +(ran|cached|skipped|failed)\b", self.out, re.MULTILINE)
        return dict(rows)

    def first_steps(self, stage: str) -> list[int]:
        """The steps that ``stage`` had done when it first reported, one number an attempt."""
        pattern = rf"^(?:[-\d]+ [:\d]+ )?{stage} +(?:training (\d+)/|.*; attempt \d+ starts)"
        told = re.findall(pattern, self.err, re.MULTILINE)
        # An empty string is where a new attempt was announced.
        return [int(step) for before, step in zip(["", *told], told, strict=False) if step and not before]

    def complaint(self) -> str:
        """The one error line; fails when there is none, several, or a traceback."""
        assert self.code != 0
        assert "Traceback" not in self.out + self.err, self.err
        lines = re.findall(r"^error: (.*)$", self.err, re.MULTILINE)
        assert len(lines) == 1, self.err
        return str(lines[0])


@dataclasses.dataclass(frozen=True)
class Chain:
    """A project at ``root``. ``home`` stands in for the user's: no settings from outside take part.

    ``api`` is the Prefect server that its runs use; None: each run starts one of its own.
    """

    root: Path
    home: Path
    api: str | None = None

    def environment(self, **more: str) -> dict[str, str]:
        api = {"PREFECT_API_URL": self.api} if self.api else {}
        return command.surroundings(self.home, DVC_SITE_CACHE_DIR=str(self.home), **{**api, **more})

    def start(self, *arguments: str, **more: str) -> "Running":
        process = command.start(self.root, self.environment(**more), arguments)
        return Running(process, self)

    def overnight(self, *arguments: str, **more: str) -> Ended:
        """Runs ``overnight ARGUMENTS`` to its end."""
        return self.start(*arguments, **more).end()

    def copy(self, root: Path) -> "Chain":
        """Returns a copy as it is now, with DVC's cache, checkpoints and Prefect's database."""
        shutil.copytree(self.root, root, symlinks=True)
        return dataclasses.replace(self, root=root)

    def at(self, api: str) -> "Chain":
        """Returns the same project, whose runs use the Prefect server at ``api``: some seconds less a run."""
        return dataclasses.replace(self, api=api)

    def version(self) -> dict[str, bytes]:
        """The content of each file that a version consists of; what a killed stage had begun is none of them."""
        found: dict[str, bytes] = {}
        for name in ARTIFACTS:
            place = self.root / name
            if place.is_dir():
                found |= {f"{name}/{path}": content for path, content in tiny.files_of(place).items()}
            elif place.exists():
                found[name] = place.read_bytes()
        return {name: content for name, content in found.items() if "/.partial-" not in name}

    def outputs(self, stage: str) -> list[Path]:
        """The files and folders that ``stage``, which has run, wrote."""
        lock = YAML(typ="safe").load(self.root / "dvc.lock")
        return [self.root / output["path"] for output in lock["stages"][stage]["outs"]]

    def forget_from(self, stage: str) -> None:
        """Makes the project one in which ``stage`` and those after it have never run."""
        yaml = YAML()
        lock = yaml.load(self.root / "dvc.lock")
        for name in STAGES[STAGES.index(stage) :]:
            for output in self.outputs(name):
                shutil.rmtree(output) if output.is_dir() else output.unlink()
            del lock["stages"][name]
            shutil.rmtree(self.root / ".overnight/checkpoints" / name, ignore_errors=True)
        yaml.dump(lock, self.root / "dvc.lock")
        # DVC would restore the outputs from here.
        shutil.rmtree(self.root / ".dvc/cache/runs")

    def set(self, path: str, value: object) -> None:
        """Sets the value at the dotted ``path`` of ``params.yaml``, which need not be there."""
        yaml = YAML()
        content = yaml.load(self.root / "params.yaml")
        *sections, key = path.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[key] = value
        yaml.dump(content, self.root / "params.yaml")

    def checkpoints(self, stage: str) -> list[int]:
        """The steps after which ``stage`` has checkpoints, in order."""
        files = self.root.glob(f".overnight/checkpoints/{stage}/*/step-*.pt")
        return sorted(int(file.name.split("-")[1]) for file in files)

    def processes(self) -> list[psutil.Process]:
        """Every living process whose current directory is in the project."""
        return within(self.root)

    def seconds_until_empty(self) -> float:
        """Returns how long it takes until no process of the project is left; fails after ``SECONDS_TO_END``."""
        started = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - started < SECONDS_TO_END, left
            time.sleep(0.05)
        return time.monotonic() - started


class Running:
    """An ``overnight`` command at work. Its output is read all the time, so that it never waits for a reader."""

    def __init__(self, process: psutil.Popen, chain: Chain) -> None:
        self.process, self._chain = process, chain
        self._said = {"out": "", "err": ""}
        pipes = {"out": process.stdout, "err": process.stderr}
        self._readers = [threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes.items()]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, pipe: Iterator[str]) -> None:
        for line in pipe:
            self._said[name] += line

    def said(self, name: str = "out") -> str:
        """What it has printed so far to stdout (``out``) or stderr (``err``)."""
        return self._said[name]

    def end(self) -> Ended:
        """Waits for the end; kills the command when it takes far too long."""
        try:
            code = self.process.wait(_SECONDS_A_RUN)
        except psutil.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still at work after {_SECONDS_A_RUN} s: {self._said['err']}") from None
        for reader in self._readers:
            reader.join()
        return Ended(code, self._said["out"], self._said["err"])

    def stage_process(self, stage: str, later_than: psutil.Process | None = None) -> psutil.Process | None:
        """Waits for the stage's own Python process; returns None when the command ended without starting it.

        ``later_than`` is the process of an earlier attempt, which does not count.
        """
        found: list[psutil.Process] = []

        def look() -> bool:
            found.extend(one for one in self._descendants() if one != later_than and _runs(one, f"tasks.{stage}"))
            return bool(found) or self.process.poll() is not None

        # Each look goes over all processes of the machine.
        self.wait_until(look, pause=0.05)
        return found[0] if found else None

    def kill_stage(self, stage: str, after: float) -> bool:
        """SIGKILLs the process of ``stage`` when it is ``after`` seconds old; returns False when it ended before."""
        process = self.stage_process(stage)
        return process is not None and signal_at(process, signal.SIGKILL, after)

    def wait_until(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        deadline = time.monotonic() + _SECONDS_A_RUN
        while not condition():
            assert time.monotonic() < deadline, self._said["err"]
            time.sleep(pause)

    def wait_for_checkpoint(self, stage: str, step: int) -> None:
        """Returns when ``stage`` has saved a checkpoint after ``step`` steps or more."""

        def saved() -> bool:
            assert self.process.poll() is None, self._said["err"]
            return max(self._chain.checkpoints(stage), default=0) >= step

        self.wait_until(saved)

    def _descendants(self) -> list[psutil.Process]:
        try:
            return list(self.process.children(recursive=True))
        except psutil.NoSuchProcess:
            return []


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        command, name = process.cmdline(), process.name()
    except psutil.Error:
        return False
    # The shell that DVC starts holds the same words in one argument, and the ranks of a training are forks of it.
    return bool(command[1:3] == ["-m", module]) and not name.startswith("rank ")


def signal_at(process: psutil.Process, number: signal.Signals, age: float) -> bool:
    """Sends a signal to ``process`` when it is ``age`` seconds old; returns False when it ended before."""
    try:
        time.sleep(max(0.0, process.create_time() + age - time.time()))
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def seconds_of_stages(running: Running) -> dict[str, float]:
    """Follows a run to its end; returns how long each stage's process lived."""
    seconds: dict[str, float] = {}
    for stage in STAGES:
        process = running.stage_process(stage)
        assert process is not None, running.end().err
        born = process.create_time()
        process.wait(_SECONDS_A_RUN)
        seconds[stage] = time.time() - born
    return seconds
