"""A rebuilt version: computed by its own code, without a cache, compared byte for byte, with a certificate."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import page
import pytest
import tiny
from processes import leave_lock, left_within
from ruamel.yaml import YAML
from waiting import until

from flows import environment, lock, virtual_environment
from flows.certificate import Certificate, Verdict
from flows.rebuild import FOLDER, rebuild
from tasks.errors import TryAgain, UserMistake

if TYPE_CHECKING:
    from versioned import Said, Versioned

WORKTREE = Path(".overnight/worktrees/rebuild-v1.0.0")


def rebuilt(versioned: "Versioned", name: str = "v1.0.0", own_environment: bool = False) -> "Said":
    return versioned.call(lambda out, err: rebuild(name, own_environment, out, err))


def certificate(versioned: "Versioned", name: str = "v1.0.0") -> Certificate:
    return Certificate.model_validate_json((versioned.root / f".overnight/certificates/{name}.json").read_bytes())


def checkout(versioned: "Versioned") -> dict[str, bytes]:
    """Every file of the project that is not Overnight's, DVC's or Git's own."""
    files = tiny.files_of(versioned.root)
    return {name: content for name, content in files.items() if not name.startswith((".overnight/", ".dvc/", ".git/"))}


def cache(versioned: "Versioned") -> dict[str, bytes]:
    return tiny.files_of(versioned.root / ".dvc/cache")


def test_it_is_identical_whatever_the_checkout_holds_by_now(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other code, other data, other parameters, and a path to modules that the stages must not see.
    (versioned.root / "stage.py").write_text("raise SystemExit('the code of now')")
    (versioned.root / "data/raw/a.txt").unlink()
    (versioned.root / "out/measure.json").write_text("{}")
    (versioned.root.parent / "json.py").write_text("raise SystemExit('a module from elsewhere')")
    report = versioned.root.parent / "report"
    monkeypatch.setenv("PYTHONPATH", str(versioned.root.parent))
    monkeypatch.setenv("REPORT", str(report))
    before = checkout(versioned), cache(versioned)
    said = rebuilt(versioned)
    assert said.code == 0, said.err
    # Both stages ran, though DVC knows their results, and neither its cache nor its table of runs was touched.
    assert report.read_text().split() == ["work", sys.executable, "measure", sys.executable]
    assert (checkout(versioned), cache(versioned)) == before
    made = certificate(versioned)
    assert (made.verdict, made.attempts, made.environment) == (Verdict.IDENTICAL, 1, ())
    assert [(one.path, one.files, one.identical) for one in made.outputs] == [
        ("out/work", 2, True), ("out/measure.json", 1, True),
    ]  # fmt: skip
    assert [one.path for one in made.inputs] == ["data/raw"]
    assert (made.equal_metrics, made.metrics) == (2, ())
    assert made.here == environment.record(versioned.root)
    assert made.tag_object == versioned.run("git", "rev-parse", "lm@v1.0.0").strip()
    assert "lm@v1.0.0: identical: all 2 outputs have the recorded bytes." in said.out
    assert (versioned.root / ".overnight/certificates/v1.0.0.md").read_text().startswith("# Rebuild of lm@v1.0.0: id")
    assert not (versioned.root / WORKTREE).exists()
    assert versioned.run("git", "worktree", "list").count("\n") == 1


def test_what_the_cache_has_lost_of_what_is_identical_is_there_again(versioned: "Versioned") -> None:
    whole = cache(versioned)
    work, measure = (versioned.output(name).md5 for name in ("out/work", "out/measure.json"))
    listing = versioned.cached(work).read_text()
    lost = [measure, json.loads(listing)[0]["md5"]]
    for md5 in lost:
        versioned.cached(md5).unlink()
    # Damaged, as nobody but who reads it sees.
    versioned.cached(work).chmod(0o644)
    versioned.cached(work).write_bytes(b"\xff[")
    said = rebuilt(versioned)
    assert said.code == 0, said.err
    assert "objects that DVC's cache had lost are there again (3)." in said.out
    assert cache(versioned) == whole
    assert not any(versioned.cached(md5).stat().st_mode & 0o222 for md5 in [*lost, work])
    assert "there again" not in rebuilt(versioned).out


def test_a_cache_that_cannot_be_given_anything_back_costs_no_certificate(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flows.restore.heal", full)
    versioned.cached(versioned.output("out/measure.json").md5).unlink()
    said = rebuilt(versioned)
    assert said.code == 0, said.err
    assert "DVC's cache was not given back what it may have lost: [Errno 13] Permission denied" in said.out
    assert certificate(versioned).verdict is Verdict.IDENTICAL


def test_other_bytes_on_the_same_machine_are_no_tolerance(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACHINE", "1.001")
    said = rebuilt(versioned)
    assert said.code == 1
    made = certificate(versioned)
    assert made.verdict is Verdict.DIFFERS
    assert "every recorded fact of the environment is the same" in made.reason
    assert [one.path for one in made.outputs if not one.identical] == ["out/work", "out/measure.json"]
    assert [one.path for one in made.outputs[0].differing] == ["machine.txt"]
    assert [(one.name, one.recorded, one.rebuilt) for one in made.metrics] == [("loss", 2.0, 2.002)]
    # What was rebuilt stays to be looked at, and the next attempt begins anew.
    assert (versioned.root / WORKTREE / "out/work/machine.txt").read_text() == "1.001"
    monkeypatch.delenv("MACHINE")
    assert rebuilt(versioned).code == 0
    # The certificate of before is still there.
    kept = sorted(file.name for file in (versioned.root / ".overnight/certificates").glob("*.json"))
    assert kept == [f"v1.0.0.{made.at:%Y%m%d-%H%M%S}.json", "v1.0.0.json"]


@pytest.mark.parametrize(("machine", "code"), [("1.001", 3), ("1.1", 1)])
def test_on_another_machine_the_metrics_decide(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch, machine: str, code: int
) -> None:
    file = versioned.root / "environment.json"
    facts = json.loads(file.read_text())
    facts["cpu"]["model"] = "another CPU"
    file.write_text(json.dumps(facts))
    versioned.commit("lm@v1.1.0")
    monkeypatch.setenv("MACHINE", machine)
    said = rebuilt(versioned, "v1.1.0")
    assert said.code == code
    assert "environment: cpu.model: another CPU recorded" in said.err
    made = certificate(versioned, "v1.1.0")
    assert made.verdict is (Verdict.TOLERANCE if code == 3 else Verdict.DIFFERS)
    assert [one.fact for one in made.environment] == ["cpu.model"]


def test_the_environment_that_computed_a_stage_counts(versioned: "Versioned", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv("MACHINE", "1.001")
    file = versioned.root / "environment.json"
    facts = json.loads(file.read_text())
    # Published by another process than computed it.
    file.write_text(json.dumps({**facts, "computed": {"work": {"variables.ATEN_CPU_CAPABILITY": "avx2"}}}))
    versioned.commit("lm@v1.1.0")
    said = rebuilt(versioned, "v1.1.0")
    assert said.code == 3
    assert "environment: work: variables.ATEN_CPU_CAPABILITY: avx2 recorded, none here" in said.err
    assert "the environment is another one (work: variables.ATEN_CPU_CAPABILITY)" in said.out
    page = (versioned.root / ".overnight/certificates/v1.1.0.md").read_text()
    assert "| work: variables.ATEN_CPU_CAPABILITY | avx2 | none |" in page

    # That it is not known excuses nothing, and is told.
    file.write_text(json.dumps({**facts, "computed": {"work": None}}))
    versioned.commit("lm@v1.2.0")
    said = rebuilt(versioned, "v1.2.0")
    assert said.code == 1
    assert "environment: it is not known in which work ran" in said.err
    assert "environment is the same; it is not known in which work ran." in said.out
    assert certificate(versioned, "v1.2.0").unknown == ("work",)
    assert "is that of: work." in (versioned.root / ".overnight/certificates/v1.2.0.md").read_text()


def test_a_tampered_record_is_found(versioned: "Versioned") -> None:
    yaml = YAML()
    content = yaml.load(versioned.root / "dvc.lock")
    content["stages"]["measure"]["outs"][0]["md5"] = "0" * 32
    yaml.dump(content, versioned.root / "dvc.lock")
    versioned.commit("lm@v1.1.0")
    assert rebuilt(versioned, "v1.1.0").code == 1
    made = certificate(versioned, "v1.1.0")
    assert [(one.path, one.recorded) for one in made.outputs if not one.identical] == [("out/measure.json", "0" * 32)]
    assert "the recorded metrics are lost" in made.reason
    # None were compared, and so none are equal.
    page = (versioned.root / ".overnight/certificates/v1.1.0.md").read_text()
    assert "They could not be compared: the recorded ones are lost" in page
    assert "values are equal" not in page


def test_a_record_that_lacks_an_output_is_not_identical(versioned: "Versioned") -> None:
    yaml = YAML()
    content = yaml.load(versioned.root / "dvc.lock")
    del content["stages"]["measure"]
    yaml.dump(content, versioned.root / "dvc.lock")
    versioned.commit("lm@v1.1.0")
    with pytest.raises(UserMistake, match=r"v1\.1\.0: its dvc\.lock records no hash of out/measure\.json \(measure\)"):
        rebuilt(versioned, "v1.1.0")
    assert not (versioned.root / ".overnight/certificates/v1.1.0.md").exists()


def test_raw_data_that_is_lost_is_named_and_nothing_is_computed(versioned: "Versioned") -> None:
    listing = json.loads(versioned.cached(versioned.output("data/raw").md5).read_bytes())
    versioned.cached(listing[0]["md5"]).unlink()
    (versioned.root / "data/raw/a.txt").unlink()
    said = rebuilt(versioned)
    assert said.code == 1
    assert "error: data/raw/a.txt: missing in DVC's cache" in said.err
    assert not (versioned.root / ".overnight/certificates").exists()
    assert not (versioned.root / WORKTREE / "out/work").exists()


def test_a_killed_rebuild_leaves_no_process_and_goes_on(
    versioned: "Versioned", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, report = tmp_path / "wait", tmp_path / "report"
    wait.touch()
    running = subprocess.Popen(
        [sys.executable, "-m", "flows", "rebuild", "v1.0.0"], cwd=versioned.root,
        env=versioned.environment(WAIT=str(wait), REPORT=str(report)),
    )  # fmt: skip
    until(lambda: (report.exists() and "measure" in report.read_text()) or running.poll() is not None)
    assert running.poll() is None
    with pytest.raises(TryAgain, match=r"v1\.0\.0 is being rebuilt by another process"):
        rebuilt(versioned)
    running.send_signal(signal.SIGKILL)
    running.wait()
    wait.unlink()
    report.unlink()
    # Its code is the version's, whatever somebody does to it meanwhile.
    (versioned.root / WORKTREE / "stage.py").write_text("raise SystemExit('edited')")
    (versioned.root / WORKTREE / "json.py").write_text("raise SystemExit('added')")
    monkeypatch.setenv("REPORT", str(report))
    # The processes of the killed one end within seconds, and this one waits for them.
    said = rebuilt(versioned)
    assert said.code == 0, said.err
    assert report.read_text().split()[::2] == ["measure"]
    assert certificate(versioned).attempts == 2
    assert not left_within(versioned.root)


def test_what_a_killed_rebuild_has_left_at_work_is_waited_for_and_told(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_SECONDS_UNTOLD", 0.0)
    leave_lock(versioned.root / FOLDER / "v1.0.0", seconds=1.0)
    said = rebuilt(versioned)
    assert (said.code, "what was at work here has ended, " in said.err) == (0, True)


def test_text_that_is_lost_is_named_with_where_it_may_be(versioned: "Versioned", tmp_path: Path) -> None:
    versioned.cached(versioned.output("data/raw").md5).unlink()
    versioned.dvc("remote", "add", "-q", "-d", "shelf", str(tmp_path / "shelf"))
    said = rebuilt(versioned)
    assert (said.code, "data/raw/(the list of its files): missing in DVC's cache" in said.err) == (1, True)
    assert "DVC's remote 'shelf' has nothing at all: look whether it is mounted, and the right one." in said.err
    shelf = tmp_path / "shelf/files/md5/00" / ("0" * 30)
    shelf.parent.mkdir(parents=True)
    shelf.touch()
    assert "`overnight push --verify v1.0.0` on a machine that has them" in rebuilt(versioned).err


def test_a_failing_stage_says_why(versioned: "Versioned") -> None:
    code = (versioned.root / "stage.py").read_text()
    (versioned.root / "stage.py").write_text(code.replace("if stage ==", "sys.exit('error: no luck')\nif stage =="))
    versioned.commit("lm@v1.1.0")
    said = rebuilt(versioned, "v1.1.0")
    assert said.code == 1
    assert "error: work: no luck" in said.err
    assert "The whole log: " in said.err
    assert not (versioned.root / ".overnight/certificates").exists()


def make_wheel(shelf: Path, version: str) -> None:
    """Writes a wheel of the package `tiny`, which lets an environment see what this one has installed, such as DVC."""
    shelf.mkdir(exist_ok=True)
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(shelf / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.pth", "\n".join(path for path in sys.path if path.endswith("site-packages")))
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_its_own_environment_is_made_from_its_lock_file(
    versioned: "Versioned", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path / "shelf", version)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    report = tmp_path / "report"
    monkeypatch.setenv("REPORT", str(report))
    (versioned.root / "requirements.lock").write_text("tiny==3.0\n")
    versioned.commit("lm@v1.1.0")
    # Nobody listens there, as where there is no network.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    cause = r"pip's connection broke: NewConnectionError\('Failed to .*refused'\)\. The whole log: "
    with pytest.raises(TryAgain, match=rf"cannot be installed: .*tiny.*\. {cause}"):
        rebuilt(versioned, "v1.1.0", own_environment=True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    (versioned.root / "requirements.lock").write_text("tiny==1.0\n")
    versioned.commit("lm@v1.2.0")
    # As docs/reproduce.md has it.
    (command,) = [line for line in page.lines("reproduce") if "--environment" in line]
    overnight = f"{sys.executable} -m flows"
    done = subprocess.run(
        command.replace("overnight", overnight).replace("v1.0.0", "v1.2.0"), shell=True, cwd=versioned.root,
        env=versioned.environment(**{name: os.environ[name] for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "REPORT")}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    python = Path(report.read_text().split()[1])
    assert python.is_relative_to(versioned.root / virtual_environment.FOLDER)
    assert (python.parent.parent / "lib/python3.11/site-packages/tiny-1.0.dist-info").is_dir()
    # Made once: the next rebuild finds it.
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    kept, told = os.open(os.devnull, os.O_RDONLY), list[str]()
    assert virtual_environment.build(versioned.root, "lm@v1.2.0", "3.11", kept, told.append) == python
    assert told == []
    os.close(kept)


def test_a_python_that_is_not_installed_is_told() -> None:
    with pytest.raises(UserMistake, match=r"Python 2\.3\.1, and no python2\.3 is in PATH"):
        virtual_environment.find("2.3.1")
