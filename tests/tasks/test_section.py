"""params.yaml: what is wrong with it is one line, whatever it is."""

from pathlib import Path

import pytest

from tasks.errors import BadParameter
from tasks.params import read

ROOT = Path(__file__).parent.parent.parent
DEFAULT = (ROOT / "params.yaml").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [", "this is not YAML"),
        (b"train: 1\ntrain: 2\n", "this is not YAML"),
        (b"caf\xe9: 1\n", "not YAML in UTF-8"),
        (b"train: \x00\n", "this is not YAML"),
        (b"- a\n", "expected sections"),
        (b"train: {}\n", "collect: missing; add it"),
        (DEFAULT.replace(b"retries: {train: 2", b"retries: {train: -2"), "flow.retries.train: .*greater than or equal"),
        (DEFAULT.replace(b"\nevaluate:", b"\nevalute:"), "evalute: unknown key"),
        (DEFAULT.replace(b"    valid: 0.05", b"    valid: 0.97"), "leave nothing to train on"),
        (DEFAULT.replace(b"  seed: 1 ", b"  seed: 9999999999999999999999 ", 1), "seed: "),
    ],
)
def test_a_faulty_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(BadParameter, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(BadParameter, match="no such file"):
        read(tmp_path / "params.yaml")


def test_the_default_file_is_valid_and_every_knob_has_a_comment() -> None:
    read(ROOT / "params.yaml")
    bare = [
        line
        for line in DEFAULT.decode().splitlines()
        if line.strip() and "#" not in line and not line.rstrip().endswith(":") and 'licence: "text' not in line
    ]
    assert not bare, bare
