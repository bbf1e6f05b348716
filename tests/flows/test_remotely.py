"""What DVC's remote has lost or cut off is told or mended, and one that says nothing is not waited for."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from publishing import Clone

from flows import contents, dvc, objects, publish, registry, remotely
from tasks.errors import TryAgain, UserMistake


def emptied(publisher: Clone, file: Path) -> Path:
    """Empties what DVC's cache has of ``file``, as a machine leaves it that went down before the disk had all of it."""
    with dvc.store(publisher.root) as store:
        cached = store.path(contents.md5_of(file))
    cached.chmod(0o644)
    cached.write_bytes(b"")
    cached.chmod(0o444)
    return cached


def test_what_is_damaged_in_the_cache_is_mended_before_it_is_pushed(publisher: Clone) -> None:
    model = publisher.root / "models/int8/model.onnx"
    cached = emptied(publisher, model)
    with dvc.store(publisher.root) as store:
        publish.publish(publisher.root)
        fetched = publisher.root / ".overnight/fetched"
        assert store.download(contents.md5_of(model), fetched)
    assert fetched.read_bytes() == cached.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("damaged", ["files", "listings"])
def test_what_is_cut_off_at_the_remote_is_pushed_anew(publisher: Clone, damaged: str) -> None:
    # DVC passes over what is there, and stumbles over a listing.
    publish.publish(publisher.root)
    for held in publisher.shelf.rglob("*"):
        if held.is_file() and (held.suffix == ".dir") == (damaged == "listings"):
            held.chmod(0o644)
            held.write_bytes(b"")
    publisher.write("b.txt", "And then.\n")
    publisher.run()
    publish.publish(publisher.root)
    with dvc.store(publisher.root) as store:
        for output in contents.present(publisher.root):
            assert store.compare(objects.needed(store, [output], {})) == (set(), set()), output


def test_what_the_remote_alone_has_whole_is_mended_here(publisher: Clone) -> None:
    model = publisher.root / "models/int8/model.onnx"
    publish.publish(publisher.root)
    good, cached = model.read_bytes(), emptied(publisher, model)
    model.unlink()
    with dvc.store(publisher.root) as store:
        remotely.check(publisher.root, "shelf", publisher.root / ".overnight/log", 1.0)
        assert cached.read_bytes() == good
        assert store.download(cached.parent.name + cached.name, publisher.root / ".overnight/fetched")
    assert (publisher.root / ".overnight/fetched").read_bytes() == good


def test_what_is_damaged_everywhere_is_not_pushed(publisher: Clone) -> None:
    model = publisher.root / "models/int8/model.onnx"
    cached = emptied(publisher, model)
    model.unlink()
    with pytest.raises(UserMistake, match=r"^models/int8/model.onnx: damaged in DVC's cache \(removed\), and no good"):
        remotely.check(publisher.root, "shelf", publisher.root / ".overnight/log", 1.0)
    assert not cached.exists()


def test_what_did_not_reach_the_data_remote_is_brought_there_or_gets_no_tag(
    publisher: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publisher.root / "models/int8/model.onnx"
    model = contents.md5_of(file)
    with dvc.store(publisher.root) as store:
        copies = (store.path(model), file)

    def lose(*_: object) -> None:
        for copy in copies:
            copy.rename(copy.with_name("away"))

    with monkeypatch.context() as patch:
        # DVC's push passes over what its cache has lost meanwhile, and ends well.
        patch.setattr(publish, "_dvc", lose)
        with pytest.raises(UserMistake, match=rf"DVC's remote 'shelf' lacks 1 of the version's objects \({model}\)"):
            publish.publish(publisher.root)
    assert publisher.tags() == []
    assert registry.versions(publisher.root) == ()
    for copy in copies:
        copy.with_name("away").rename(copy)
    # It passes over what it believes to be there, too.
    monkeypatch.setattr(publish, "_dvc", lambda to, command: None)
    assert publish.publish(publisher.root).promoted
    publisher.check_remote()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/store"


def test_a_data_remote_that_says_nothing_is_not_waited_for(publisher: Clone, silent: str) -> None:
    publisher.set("publish", "stall_minutes", 0.03)
    publisher.set("publish", "retries", 1)
    publisher.set("flow", "retry_delay_seconds", 0.1)
    publisher.commit()
    here = publisher.root / ".dvc/config.local"
    told: list[str] = []

    here.write_text(f"['remote \"shelf\"']\n    url = {silent}\n")
    with pytest.raises(TryAgain, match="nothing was read or written for 2 s"):
        publish.publish(publisher.root, told.append)
    assert publisher.tags() == []
    assert told == ["DVC's remote: nothing was read or written for 2 s, so it was ended. Trying again in 0 s."]
    here.unlink()
    assert publish.publish(publisher.root).promoted
    publisher.check_remote()

    # A night without news asks it as well.
    here.write_text(f"['remote \"shelf\"']\n    url = {silent}\n")
    with pytest.raises(TryAgain, match=r"DVC's remote: nothing was read or written for 2 s, so it was ended. What was"):
        publish.publish(publisher.root)
