"""A restored version has the recorded bytes, or says which of its files has not."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny
from ruamel.yaml import YAML

from flows import contents, dvc
from flows import restore as restoring
from flows.project import NotAProject, find
from flows.registry import NoSuchVersion
from flows.restore import Fetched, Source, restore
from flows.store import Store
from tasks.errors import TryAgain, UserMistake

if TYPE_CHECKING:
    from versioned import Said, Versioned

PATH = Path("out/work/text.txt")
ATTRIBUTES = "hidden.py export-ignore\ntold.py export-subst\n*.bat text eol=crlf\n"


def restored(versioned: "Versioned", to: Path | None = None, name: str = "v1.0.0") -> "Said":
    return versioned.call(lambda out, err: restore(name, to, out, err))


def digest(versioned: "Versioned", path: Path = PATH) -> str:
    """The MD5 of a file of version 1."""
    listing = versioned.cached(versioned.output(str(path.parent)).md5).read_bytes()
    return contents.parse_listing(listing)[contents.PurePosixPath(path.name)]


def flip(path: Path) -> None:
    """Changes one bit of a file of the cache, and leaves it as DVC marks what it trusts."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    path.chmod(0o444)


def forget_workspace(versioned: "Versioned") -> None:
    """Changes the project's own copy, which would do as well."""
    (versioned.root / PATH).unlink()


def with_remote(versioned: "Versioned") -> Path:
    shelf = versioned.root.parent / "shelf"
    versioned.dvc("remote", "add", "-q", "-d", "shelf", str(shelf))
    versioned.dvc("push", "-q")
    return shelf


def in_remote(shelf: Path, md5: str) -> Path:
    return shelf / "files/md5" / md5[:2] / md5[2:]


def test_in_what_was_restored_no_command_takes_it_for_a_project(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    restored(versioned)
    monkeypatch.chdir(versioned.root / ".overnight/versions/v1.0.0")
    with pytest.raises(NotAProject, match=r"v1\.0\.0: a restored version, and no project: .* with --version"):
        find()


def test_every_file_of_the_version_comes_back(versioned: "Versioned", tmp_path: Path) -> None:
    before = tiny.files_of(versioned.root / "out") | tiny.files_of(versioned.root / "data/raw")
    code = (versioned.root / "stage.py").read_bytes()
    (versioned.root / "stage.py").write_text("another")
    (versioned.root / PATH).write_text("another")
    (versioned.root / "data/raw/new.txt").write_text("new")
    said = restored(versioned)
    place = versioned.root / ".overnight/versions/v1.0.0"
    assert said.code == 0, said.err
    assert tiny.files_of(place / "out") | tiny.files_of(place / "data/raw") == before
    assert (place / "stage.py").read_bytes() == code
    assert ".overnight/versions/v1.0.0: 5 of 5 files verified" in said.out
    # Nothing of the checkout was touched.
    assert (versioned.root / "stage.py").read_text() == (versioned.root / PATH).read_text() == "another"

    assert restored(versioned, tmp_path / "elsewhere", "latest").code == 0
    assert (tmp_path / "elsewhere/data/raw/deep/b.txt").read_text() == "And there was light.\n"


def test_code_comes_back_as_it_was_committed_whatever_line_ends_the_user_likes(versioned: "Versioned") -> None:
    code = (versioned.root / "stage.py").read_bytes()
    versioned.run("git", "config", "core.autocrlf", "true")
    assert restored(versioned).code == 0
    assert (versioned.root / ".overnight/versions/v1.0.0/stage.py").read_bytes() == code


def test_code_comes_back_whole_whatever_attributes_ask_of_an_archive(versioned: "Versioned") -> None:
    written = {"hidden.py": "1", "told.py": "$Format:%H$", "lines.bat": "a\r\n", ".gitattributes": ATTRIBUTES}
    for name, text in written.items():
        (versioned.root / name).write_text(text, newline="")
    (versioned.root / "run.sh").symlink_to("told.py")
    (versioned.root / "told.py").chmod(0o755)
    versioned.commit("lm@v1.1.0")
    # What is checked out now asks for other things, and has fewer files.
    (versioned.root / ".gitattributes").write_text("*.py text eol=crlf\n")
    versioned.run("git", "config", "core.sparseCheckout", "true")
    (versioned.root / ".git/info/sparse-checkout").write_text("/dvc.lock\n")
    staged = (versioned.root / ".git/index").read_bytes()
    assert restored(versioned, name="v1.1.0").code == 0
    place = versioned.root / ".overnight/versions/v1.1.0"
    assert {name: (place / name).read_bytes().decode() for name in written} == written
    assert (place / "run.sh").is_symlink()
    assert (place / "told.py").stat().st_mode & 0o111
    assert (place / "stage.py").read_bytes() == (versioned.root / "stage.py").read_bytes()
    assert (versioned.root / ".git/index").read_bytes() == staged


def test_the_recorded_hash_of_a_folder_is_that_of_its_files(versioned: "Versioned") -> None:
    for path in ("data/raw", "out/work"):
        assert contents.listing_md5(contents.files_of(versioned.root / path)) == versioned.output(path).md5


def test_a_damaged_file_without_another_copy_is_named(versioned: "Versioned") -> None:
    damaged = versioned.cached(digest(versioned))
    flip(damaged)
    forget_workspace(versioned)
    said = restored(versioned)
    assert said.code == 1
    assert said.err.count("error:") == 1
    assert f"{PATH}: damaged in DVC's cache (removed), and there is no remote to fetch it from" in said.err
    assert "v1.0.0 is not whole in .overnight/versions/v1.0.0: 4 of 5 files verified" in said.out
    place = versioned.root / ".overnight/versions/v1.0.0"
    assert not (place / PATH).exists()
    assert (place / "out/work/machine.txt").exists()
    # DVC, which does not look, would take it for good.
    assert not damaged.exists()


def test_a_damaged_cache_entry_is_fetched_again(versioned: "Versioned") -> None:
    with_remote(versioned)
    damaged = versioned.cached(digest(versioned))
    good = damaged.read_bytes()
    flip(damaged)
    forget_workspace(versioned)
    said = restored(versioned)
    assert said.code == 0
    assert f"{PATH}: was damaged in DVC's cache; mended from the remote" in said.err
    assert (versioned.root / ".overnight/versions/v1.0.0" / PATH).read_bytes() == damaged.read_bytes() == good
    assert damaged.stat().st_mode & 0o777 == 0o444


def test_an_empty_cache_is_filled_from_the_remote(versioned: "Versioned") -> None:
    with_remote(versioned)
    before = tiny.files_of(versioned.root / "out")
    for folder in (".dvc/cache", "out", "data/raw"):
        shutil.rmtree(versioned.root / folder)
    said = restored(versioned)
    assert said.code == 0
    assert "5 of 5 files verified, 5 of them fetched from the remote" in said.out
    assert tiny.files_of(versioned.root / ".overnight/versions/v1.0.0/out") == before


def test_a_file_damaged_everywhere_is_named_with_the_remote(versioned: "Versioned") -> None:
    shelf = with_remote(versioned)
    md5 = digest(versioned)
    for path in (versioned.cached(md5), in_remote(shelf, md5)):
        flip(path)
    forget_workspace(versioned)
    said = restored(versioned)
    assert said.code == 1
    assert f"{PATH}: damaged in DVC's cache (removed), and no good copy in the remote 'shelf'" in said.err
    assert "`overnight push --verify v1.0.0` on a machine that has them brings them to the remote." in said.err


def test_bytes_that_another_thread_finds_under_another_name_are_not_lost(
    versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = restoring._fetch
    looked: list[Path] = []

    def too_early(store: Store, path: Path, *rest: Any) -> Fetched:
        looked.append(path)
        return Fetched(path, Source.NOWHERE) if looked == [path] else fetch(store, path, *rest)

    outputs = [output for output in contents.recorded(versioned.root, "lm@v1.0.0") if not output.is_folder]
    monkeypatch.setattr(restoring, "_fetch", too_early)
    with dvc.store(versioned.root) as store:
        place = versioned.root / ".overnight/versions/v1.0.0"
        (fetched,) = restoring.place(store, outputs, place, versioned.root, lambda done, total: None)
    assert (fetched.source, looked) == (Source.CACHE, [outputs[0].path] * 2)


def test_a_lost_listing_costs_its_folder_alone(versioned: "Versioned") -> None:
    versioned.cached(versioned.output("out/work").md5).unlink()
    said = restored(versioned)
    assert said.code == 1
    assert "out/work/(the list of its files): missing in DVC's cache" in said.err
    assert "3 of 4 files verified" in said.out


def test_the_project_s_own_copy_mends_the_cache(versioned: "Versioned") -> None:
    damaged = versioned.cached(digest(versioned))
    flip(damaged)
    said = restored(versioned)
    assert said.code == 0
    assert "mended from the project's own folder" in said.err
    assert contents.md5_of(damaged) == digest(versioned)


def test_a_remote_that_does_not_answer_is_no_lost_file(versioned: "Versioned") -> None:
    versioned.cached(digest(versioned)).unlink()
    forget_workspace(versioned)
    versioned.dvc("remote", "add", "-q", "-d", "shelf", "http://127.0.0.1:9/")
    with pytest.raises(TryAgain, match="remote 'shelf' does not answer"):
        restored(versioned)


def test_what_is_whole_in_the_cache_is_restored_without_writing_there(versioned: "Versioned", tmp_path: Path) -> None:
    with dvc.store(versioned.root) as store:
        cache = store.folder
    folders = [folder for folder in cache.rglob("*") if folder.is_dir()]
    before = {folder: folder.stat().st_mtime_ns for folder in folders}
    assert restored(versioned, tmp_path / "theirs").code == 0
    assert {folder: folder.stat().st_mtime_ns for folder in folders} == before


def test_a_remote_that_has_nothing_at_all_may_be_the_wrong_one(versioned: "Versioned", tmp_path: Path) -> None:
    versioned.cached(digest(versioned)).unlink()
    forget_workspace(versioned)
    versioned.dvc("remote", "add", "-q", "-d", "shelf", str(tmp_path / "not mounted"))
    said = restored(versioned)
    assert said.code == 1
    told = "DVC's remote 'shelf' has nothing at all: look whether it is mounted, and the right one."
    assert told in said.err
    assert "push --verify" not in said.err


def test_restoring_again_mends_what_was_changed(versioned: "Versioned") -> None:
    assert restored(versioned).code == 0
    place = versioned.root / ".overnight/versions/v1.0.0"
    (place / PATH).write_text("changed")
    (place / "out/measure.json").unlink()
    assert restored(versioned).code == 0
    assert tiny.files_of(place / "out") == tiny.files_of(versioned.root / "out")


def test_what_is_not_the_version_s_is_named_when_a_folder_is_verified_again(versioned: "Versioned") -> None:
    assert "none of the version's" not in restored(versioned).err
    place = versioned.root / ".overnight/versions/v1.0.0"
    (place / "out/work/added.txt").write_text("added")
    (place / "json.py").write_text("another module")
    (place / "__pycache__").mkdir()
    (place / "__pycache__/stage.cpython-311.pyc").write_bytes(b"")
    said = restored(versioned)
    assert "2 files there are none of the version's, and stay: json.py, out/work/added.txt\n" in said.err


def test_no_folder_with_other_content_is_written_to(versioned: "Versioned", tmp_path: Path) -> None:
    full, file, other = tmp_path / "full", tmp_path / "file", tmp_path / "other"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("")
    (other / ".overnight").mkdir(parents=True)
    (other / ".overnight/restored").write_text("0" * 40)
    for place, complaint in (
        (full, "is not empty"),
        (file, "is a file"),
        (other, "another version"),
        (versioned.root, "is a Git checkout"),
    ):
        with pytest.raises(UserMistake, match=complaint):
            restored(versioned, place)
    assert tiny.files_of(full) == {"mine": b"mine"}


@pytest.mark.parametrize("filters", [True, False])
def test_a_link_that_leaves_the_folder_is_not_followed(
    filters: bool, versioned: "Versioned", monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        # Debian 12's Python.
        monkeypatch.delattr("tarfile.data_filter", raising=False)
    restored(versioned)
    (versioned.root / "link").symlink_to("/etc")
    versioned.commit("lm@v1.1.0")
    with pytest.raises(UserMistake, match="would lie outside"):
        restored(versioned, name="v1.1.0")


def test_a_link_by_way_of_another_is_not_followed_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tarfile.data_filter", raising=False)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, leads_to in (("s", "."), ("t", "s/s/s/../../..")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, leads_to
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("t/evil.txt"))
    target = tmp_path / "a/b/target"
    target.mkdir(parents=True)
    with pytest.raises(UserMistake, match=r"would lie outside \(t\)"):
        restoring._unpack(packed.getvalue(), target)
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_hash_that_leads_out_of_the_cache_is_refused(versioned: "Versioned", tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = "/".join([".."] * len(versioned.root.parts))
    lock, md5 = versioned.root / "dvc.lock", versioned.output("out/measure.json").md5
    lock.write_text(lock.read_text().replace(md5, f"ab/{out}/../../..{victim}"))
    versioned.commit("lm@v1.1.0")
    with pytest.raises(UserMistake, match=r"out/measure\.json is recorded without an MD5"):
        restored(versioned, name="v1.1.0")
    assert victim.read_text() == "mine"
    with pytest.raises(ValueError, match="no MD5"):
        contents.parse_listing(b'[{"md5": "ab/../x", "relpath": "text.txt"}]')


def test_a_folder_that_cannot_be_made_is_told(versioned: "Versioned") -> None:
    with pytest.raises(UserMistake, match=r"--to: .*cannot be written to"):
        restored(versioned, Path("/proc/nowhere"))


def test_an_unknown_version_is_told_with_those_there_are(versioned: "Versioned") -> None:
    with pytest.raises(NoSuchVersion, match=r"v2\.0\.0.*v1\.0\.0"):
        restored(versioned, name="v2.0.0")


def test_a_version_that_git_s_remote_alone_knows_is_found(versioned: "Versioned", tmp_path: Path) -> None:
    versioned.run("git", "clone", "-q", "--bare", ".", str(tmp_path / "git"))
    versioned.run("git", "remote", "add", "origin", str(tmp_path / "git"))
    yaml = YAML()
    params = yaml.load(versioned.root / "params.yaml")
    params["publish"]["git_remote"] = "origin"
    yaml.dump(params, versioned.root / "params.yaml")
    versioned.run("git", "tag", "-d", "lm@v1.0.0")
    assert restored(versioned).code == 0

    # One that does not answer is no reason not to restore what is known.
    shutil.rmtree(tmp_path / "git")
    said = restored(versioned)
    assert said.code == 0
    assert "What is known here is taken." in said.err


def test_a_commit_without_a_pipeline_is_no_version(versioned: "Versioned") -> None:
    (versioned.root / "dvc.lock").unlink()
    versioned.commit("lm@v1.1.0")
    with pytest.raises(UserMistake, match=r"no dvc\.lock"):
        restored(versioned, name="v1.1.0")


@pytest.mark.parametrize("name", [str(PATH), "stage.py", "out/work", "out"])
def test_what_lies_in_the_way_of_a_file_or_folder_is_told(versioned: "Versioned", name: str) -> None:
    restored(versioned)
    place = versioned.root / ".overnight/versions/v1.0.0" / name
    if place.is_dir():
        shutil.rmtree(place)
        place.write_text("somebody's")
        told = "a file lies where a folder"
    else:
        place.unlink()
        place.mkdir()
        (place / "theirs").touch()
        told = "a folder lies where a file"
    with pytest.raises(UserMistake, match=rf"v1\.0\.0/{name}: {told} of the version belongs\. Move it away\.$"):
        restored(versioned)
    assert place.is_file() or (place / "theirs").is_file()
