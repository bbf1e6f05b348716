"""Everything that runs Git: one function that does, and the few questions that several modules ask."""

import contextlib
import io
import os
import re
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tasks.errors import UserMistake

# A prompt would wait for ever at night, and messages are parsed nowhere but shown to people: one language.
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_EDITOR": "true"}
# A key may ask for its passphrase.
_SIGNATURES = ("commit.gpgSign", "tag.gpgSign", "tag.forceSignAnnotated", "push.gpgSign")
_UNSIGNED = [part for name in _SIGNATURES for part in ("-c", f"{name}=false")]
# A commit's own bytes, which a user's settings must not turn into lines that end otherwise.
AS_COMMITTED = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.autocrlf", "GIT_CONFIG_VALUE_0": "false"}
_SETTING = re.compile(r"(GIT_CONFIG_(?:KEY|VALUE)_)(\d+)")
# Neither a question nor a dead connection is waited for.
_SSH = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
_ASK_A_REMOTE = ("fetch", "ls-remote", "push")
_SECONDS_FOR_A_REMOTE = 600.0
_SECONDS_TO_END = 5.0
_MOST_SAID = 3
# What a hook of the remote says, and Git of a branch or tag that the remote does not take.
_REFUSED = re.compile(r"^(?:remote: +(?P<said>\S.*)| ! \[.+\] +(?P<refused>\S.*))$", re.MULTILINE)
# What repeats, unlike what a race brings: a hook, a protected branch, and GitHub's word for that.
_FOR_GOOD = re.compile(r"hook declined|protected branch|GH006", re.IGNORECASE)


class GitFailed(UserMistake):
    """A Git command failed. The message is one line: the command and Git's last complaint."""


class Declined(GitFailed):
    """A remote has a rule against what was pushed: it would refuse it again."""


def git(root: Path, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
    """Returns what ``git ARGUMENTS`` in ``root`` prints, without the last newline.

    Raises :class:`GitFailed` when the command fails and ``check`` is set. ``environment`` is added to the process's.
    """
    return _run(root, arguments, check, environment).decode(errors="surrogateescape").removesuffix("\n")


def commit_of(root: Path, revision: str) -> str:
    """Returns the full hash of the commit that ``revision`` names. Raises :class:`GitFailed` when there is none."""
    found = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False)
    if not found:
        if revision == "HEAD":
            raise GitFailed(f"{root}: there is no commit yet. `git add --all` and `git commit` make the first.")
        raise GitFailed(f"{root}: Git knows no commit '{revision}'. `git log --oneline` and `git tag` list them.")
    return found


def show(root: Path, revision: str, path: Path | str) -> bytes | None:
    """Returns the file at ``path`` (relative to ``root``) as it is in ``revision``, or None where it is not there."""
    try:
        return _run(root, ["show", f"{revision}:./{path}"], check=True)
    except GitFailed:
        return None


def archive(root: Path, revision: str) -> bytes:
    """Returns the files of ``revision`` at and below ``root`` as a tar archive, with paths relative to ``root``.

    Git's own archive leaves out, and fills in, what attributes of the commit ask for.
    """
    tree = git(root, "rev-parse", "--verify", "--end-of-options", f"{revision}:./")
    with tempfile.TemporaryDirectory() as scratch:
        files, packed = Path(scratch) / "files", io.BytesIO()
        files.mkdir()
        own = {
            "GIT_DIR": git(root, "rev-parse", "--absolute-git-dir"),
            "GIT_WORK_TREE": str(files),
            "GIT_INDEX_FILE": str(Path(scratch) / "index"),
        }
        take = ("read-tree", "--reset", "-u", "--no-sparse-checkout", "--no-recurse-submodules", tree)
        git(files, *take, environment={**AS_COMMITTED, **own})
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for file in sorted(files.rglob("*")):
                tar.add(file, file.relative_to(files), recursive=False)
    return packed.getvalue()


def author(root: Path) -> dict[str, str]:
    """Returns the environment in which commits and tags have an author: empty where the user has said who that is.

    A machine that runs at night often knows no name, and Git then refuses to commit.
    """
    found = {}
    for role in ("AUTHOR", "COMMITTER"):
        for what, stand_in in (("name", "overnight"), ("email", "overnight@localhost")):
            variable = f"GIT_{role}_{what.upper()}"
            if variable not in os.environ and not git(root, "config", f"user.{what}", check=False):
                found[variable] = stand_in
    return found


def branch(root: Path) -> str | None:
    """Returns the branch that is checked out, or None when a commit is (a detached HEAD)."""
    return git(root, "symbolic-ref", "--quiet", "--short", "HEAD", check=False) or None


def is_ancestor(root: Path, older: str, newer: str) -> bool:
    """Whether every change of the commit ``older`` is in ``newer``."""
    done = subprocess.run(
        ["git", "merge-base", "--is-ancestor", older, newer], cwd=root, capture_output=True, check=False
    )
    return done.returncode == 0


def _run(
    root: Path,
    arguments: "list[str] | tuple[str, ...]",
    check: bool,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    variables = {**os.environ, **_QUIET, **_behind_theirs(environment or {})}
    command = ["git", *_UNSIGNED, *arguments]
    try:
        if arguments[0] in _ASK_A_REMOTE:
            done = _ask(root, command, variables)
        else:
            done = subprocess.run(
                command, cwd=root, env=variables, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
    except FileNotFoundError:
        raise GitFailed("git is not installed, or not in PATH. Install it and run this again.") from None
    except subprocess.TimeoutExpired:
        limit = f"{_SECONDS_FOR_A_REMOTE / 60:.0f} minutes"
        raise GitFailed(f"git {' '.join(arguments[:2])} in {root} has not ended within {limit}.") from None
    if check and done.returncode:
        complaints = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        told = next((line for line in complaints if line.startswith(("fatal:", "error:"))), (complaints or [""])[-1])
        kind = GitFailed
        if arguments[0] == "push" and (why := _refusal(complaints)):
            told += f" ({why})"
            if _FOR_GOOD.search(why):
                kind = Declined
                told += ". It will refuse it again: whoever looks after that remote can let it in."
        if told.endswith(".lock': File exists."):
            told += " Another Git command is at work there, or died: if none is, remove that file."
        raise kind(f"git {' '.join(arguments[:2])} failed in {root}: {told or f'exit code {done.returncode}'}")
    return done.stdout


def _behind_theirs(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns ``environment`` with its settings of Git numbered behind those that this process was given.

    A container says so which project is safe, and others how a remote is asked.
    """
    given = os.environ.get("GIT_CONFIG_COUNT", "")
    theirs = int(given) if given.isdecimal() else 0
    found = {}
    for name, value in environment.items():
        if name == "GIT_CONFIG_COUNT":
            found[name] = str(theirs + int(value))
        elif setting := _SETTING.fullmatch(name):
            found[f"{setting[1]}{theirs + int(setting[2])}"] = value
        else:
            found[name] = value
    return found


def _refusal(complaints: list[str]) -> str:
    """Returns why a remote has refused what was pushed, in its own words; the last line of Git's is that it has."""
    found = [match for line in complaints if (match := _REFUSED.match(line))]
    refused = [match["refused"] for match in found if match["refused"]]
    said = [match["said"].strip() for match in found if match["said"]]
    return "; ".join([*refused[:1], *said[:_MOST_SAID]]) if refused else ""


def _ask(root: Path, command: list[str], variables: dict[str, str]) -> "subprocess.CompletedProcess[bytes]":
    """Runs a command that asks a remote; ends it, and what it has started, when that takes too long."""
    theirs = {"GIT_SSH", "GIT_SSH_COMMAND"} & variables.keys() or git(root, "config", "core.sshCommand", check=False)
    if not theirs:
        variables = {**variables, "GIT_SSH_COMMAND": _SSH}
    with subprocess.Popen(
        command, cwd=root, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=_SECONDS_FOR_A_REMOTE)
        except BaseException:
            _end(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end(process: "subprocess.Popen[bytes]") -> None:
    # Git removes its locks when it is asked to end.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
