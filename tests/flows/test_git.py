"""No Git command waits for ever: neither for a remote nor for somebody who would answer a question."""

import os
from pathlib import Path

import psutil
import pytest

from flows import git as module
from flows import registry
from flows.git import AS_COMMITTED, Declined, GitFailed, commit_of, git
from flows.land import QUIET


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    root = tmp_path / "here"
    root.mkdir()
    git(root, "init", "-q")
    return root


def test_a_remote_that_never_answers_is_given_up(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "ext")
    monkeypatch.setattr(module, "_SECONDS_FOR_A_REMOTE", 0.5)
    waiting = ["sleep", str(1000 + os.getpid())]
    (repository / "connect").write_text(f"{' '.join(waiting)} & wait\n")
    git(repository, "remote", "add", "origin", f"ext::sh {repository / 'connect'}")
    with pytest.raises(GitFailed, match=r"^git ls-remote origin in .* has not ended within") as caught:
        git(repository, "ls-remote", "origin")
    assert "\n" not in str(caught.value)
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == waiting]
    # A killed process stays for the moment that the kernel needs.
    assert not psutil.wait_procs(left, timeout=10)[1]


def test_before_the_first_commit_that_is_told(repository: Path) -> None:
    with pytest.raises(GitFailed, match=rf"^{repository}: there is no commit yet\. `git add --all` and `git commit`"):
        commit_of(repository, "HEAD")


def test_settings_that_the_environment_brings_hold_beside_our_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"safe.directory": "*", "url.https://token@there/.insteadOf": "https://there/"}
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(theirs)))
    for number, (name, value) in enumerate(theirs.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", name)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)
    for ours in (QUIET, AS_COMMITTED):
        for name, value in {**theirs, ours["GIT_CONFIG_KEY_0"]: ours["GIT_CONFIG_VALUE_0"]}.items():
            assert git(repository, "config", name, environment=ours) == value


def test_ssh_asks_nobody_unless_the_user_has_a_command_of_their_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ssh", "theirs"):
        (repository / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {repository}/said\nexit 1\n')
        (repository / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{repository}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("GIT_SSH_COMMAND", raising=False)
    git(repository, "ls-remote", "ssh://host/place", check=False)
    git(repository, "config", "core.sshCommand", str(repository / "theirs"))
    git(repository, "ls-remote", "ssh://host/place", check=False)
    ours, *others = (repository / "said").read_text().splitlines()
    assert "BatchMode=yes" in ours
    assert others
    assert not [line for line in others if "BatchMode" in line]


def test_commits_and_tags_are_not_signed(repository: Path) -> None:
    for name, value in (("commit.gpgSign", "true"), ("tag.gpgSign", "true"), ("gpg.program", "false")):
        git(repository, "config", name, value)
    git(repository, "commit", "-q", "--allow-empty", "-m", "-", environment=registry.author(repository))
    assert registry.register(repository, commit_of(repository, "HEAD"), "-").name == "v1.0.0"


def test_what_a_remote_says_when_it_refuses_is_told(repository: Path, tmp_path: Path) -> None:
    git(repository, "init", "-q", "--bare", str(tmp_path / "there"))
    hook = tmp_path / "there/hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'this branch is protected' >&2\nexit 1\n")
    hook.chmod(0o755)
    git(repository, "commit", "-q", "--allow-empty", "-m", "-", environment=registry.author(repository))
    with pytest.raises(Declined, match=r"declined\); this branch is protected\)\. It will refuse it again: ") as caught:
        git(repository, "push", "--quiet", str(tmp_path / "there"), "HEAD:refs/heads/main")
    assert "\n" not in str(caught.value)
