"""A place that has nothing of what was pushed to it is not the remote that it was."""

import json
import shutil

import pytest
from publishing import Clone

from flows import contents, dvc, publish, push, pushed, registry
from tasks.errors import TryAgain


def test_a_data_remote_that_has_nothing_of_the_last_version_gets_no_other_before_it_has_that(published: Clone) -> None:
    pushed.remember(published.root, None, registry.resolve(published.root, "v1.1.0"))
    # As a place looks where nothing is mounted.
    shutil.rmtree(published.shelf)
    published.shelf.mkdir()
    published.write("c.txt", "And the third.\n")
    published.run()
    told = r"^DVC's remote 'shelf' has nothing of v1\.1\.0, which was pushed to that very place: look"
    with pytest.raises(TryAgain, match=told):
        publish.publish(published.root)
    assert not any(published.shelf.iterdir())
    assert "lm@v1.2.0" not in published.tags()
    push.bring_data(published.root, registry.resolve(published.root, "v1.1.0"), "shelf")
    assert publish.publish(published.root).version.name == "v1.2.0"
    note = (published.root / pushed.FILE).read_text()
    assert json.loads(note)["version"] == "v1.2.0"
    # An address may hold a password.
    assert "shelf" not in note


def test_what_is_brought_to_another_place_is_looked_for_there(published: Clone) -> None:
    other = published.shelf.with_name("other")
    (published.root / ".dvc/config.local").write_text(f"['remote \"shelf\"']\n    url = {other}\n")
    assert publish.publish(published.root).reasons[0] == "nothing new since v1.1.0"
    assert any(other.rglob("*"))
    shutil.rmtree(other)
    published.write("c.txt", "And the third.\n")
    published.run()
    with pytest.raises(TryAgain, match="has nothing of v1"):
        publish.publish(published.root)


def test_a_data_remote_at_another_place_is_a_new_one(published: Clone) -> None:
    pushed.remember(published.root, None, registry.resolve(published.root, "v1.1.0"))
    other = published.shelf.with_name("other")
    (published.root / ".dvc/config.local").write_text(f"['remote \"shelf\"']\n    url = {other}\n")
    published.write("c.txt", "And the third.\n")
    published.run()
    assert publish.publish(published.root).version.name == "v1.2.0"
    assert other.is_dir()


@pytest.mark.parametrize("lost", ["a part", "the note"])
def test_what_a_data_remote_has_lost_of_the_last_version_does_not_hold_up_the_next(lost: str, published: Clone) -> None:
    last = registry.resolve(published.root, "v1.1.0")
    pushed.remember(published.root, None, last)
    if lost == "a part":
        gone = contents.recorded(published.root, last.commit)[-1].md5
        next(published.shelf.rglob(f"{gone[:2]}/{gone[2:]}")).unlink()
        with dvc.store(published.root) as store:
            store.discard({gone})
    else:
        shutil.rmtree(published.shelf)
        (published.root / pushed.FILE).write_text("{}")
    published.write("c.txt", "And the third.\n")
    published.run()
    assert publish.publish(published.root).version.name == "v1.2.0"
