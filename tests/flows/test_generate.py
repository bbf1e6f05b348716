"""Generating: what is written, what is told beside it, and what is refused."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from odd import export_over_bytes
from typer.testing import CliRunner

from flows import runs
from flows.cli import app
from flows.generate import Writing, write
from lm.sampling import Sampling
from tasks.errors import BadInput, UserMistake


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose INT8 model is an untrained one over bytes, with a context of 64."""
    root = tmp_path_factory.mktemp("project")
    export_over_bytes(root / "models/int8")
    return root


def said(root: Path, prompt: str, max_new_tokens: int = 4, **sampling: float) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    write(root, prompt, Writing(max_new_tokens, Sampling(**sampling)), out, err)  # type: ignore[arg-type]
    return out.getvalue(), err.getvalue()


def test_a_text_that_fills_the_context_says_so_beside_it(root: Path) -> None:
    out, err = said(root, "a" * 60, 200, temperature=0)
    assert out.startswith("a" * 60)
    assert out.endswith("\n")
    assert err == ("The model's context of 64 tokens is full: the text ends before --max-new-tokens 200.\n")


def test_a_text_of_the_length_that_was_asked_for_says_nothing_more(root: Path) -> None:
    out, err = said(root, "light", 20)
    assert out.startswith("light")
    assert len(out) > len("light\n")
    assert err == ""


def test_a_piece_is_shown_before_the_next_one_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, shown = io.StringIO(), []

    def pieces(*_: object) -> Iterator[str]:
        for piece in (" and", " there", " was"):
            yield piece
            shown.append(out.getvalue())

    monkeypatch.setattr("flows.generate.continue_text", pieces)
    write(root, "light", Writing(4), out, io.StringIO())
    assert shown == ["light and", "light and there", "light and there was"]


def test_a_terminal_of_another_encoding_shows_what_it_can(root: Path) -> None:
    shown = io.BytesIO()
    terminal = io.TextIOWrapper(shown, "ascii")
    write(root, "café", Writing(1, Sampling(0)), terminal, io.StringIO())
    assert shown.getvalue().startswith(b"caf?")


@pytest.mark.parametrize(("command", "place"), [(["generate", "light"], 2), (["chat"], 1)], ids=["generate", "chat"])
def test_the_commands_draw_as_they_are_told(
    command: list[str], place: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        """With all that the command asked for."""

    def note(*asked: object) -> None:
        raise Asked(*asked)

    monkeypatch.setattr("flows.generate.write", note)
    monkeypatch.setattr("flows.chat.chat", note)
    monkeypatch.setattr("flows.project.find", lambda: root)
    how = ["--temperature", "1.5", "--top-k", "7", "--top-p", "0.5", "--repetition-penalty", "1.2", "--seed", "9"]
    found = CliRunner().invoke(app, [*command, *how]).exception
    assert isinstance(found, Asked)
    assert found.args[place].sampling == Sampling(1.5, 7, 0.5, 1.2, 9)


@pytest.mark.parametrize(
    ("command", "others_rest", "spins"),
    [
        ("generate light", True, True),
        ("generate light", False, False),
        ("generate light --spin", False, True),
        ("generate light --no-spin", True, False),
        ("chat", True, True),
        ("chat", False, False),
        ("chat --spin", False, True),
        ("chat --no-spin", True, False),
        # What is served is asked for days: that others rest when it starts says nothing of that.
        ("serve", True, False),
        ("serve --spin", False, True),
    ],
)
def test_the_commands_load_a_model_whose_threads_spin_where_that_is_asked_for_or_others_rest(
    root: Path, command: str, others_rest: bool, spins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):
        """With how it was asked to."""

    def load(folder: Path, *, spin: bool) -> None:
        raise Loaded(folder, spin)

    monkeypatch.setattr("lm.runtime.Generator", load)
    monkeypatch.setattr("flows.project.find", lambda: root)
    monkeypatch.setattr("lm.cores.Others.rest", lambda _: others_rest)
    found = CliRunner().invoke(app, command.split()).exception
    assert isinstance(found, Loaded)
    assert found.args == (root / "models/int8", spins)


@pytest.mark.parametrize("command", [["generate", "light"], ["chat"], ["serve"]], ids=" ".join)
def test_the_commands_take_the_model_of_a_version(
    root: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(Exception):
        """With where from."""

    def load(folder: Path, *_: object) -> None:
        raise Loaded(folder)

    monkeypatch.setattr("flows.model.model_of", lambda root, name, say: root / name)
    for module in ("generate", "chat", "serve.command"):
        monkeypatch.setattr(f"flows.{module}.load", load)
    monkeypatch.setattr("flows.project.find", lambda: root)
    found = CliRunner().invoke(app, [*command, "--version", "v7"]).exception
    assert isinstance(found, Loaded)
    assert found.args == (root / "v7",)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("caf\udce9 noir", {}, "TEXT is not UTF-8: byte 0xe9 after 3 characters. Write it in UTF-8."),
        (
            "a" * 64,
            {},
            "the prompt has 65 tokens, and the model reads at most 64, its answer included; shorten the prompt.",
        ),
        ("a", {"top_p": 0.0}, "--top-p: a share above 0 and up to 1 is needed. 1 leaves nothing out."),
        *(
            (
                *("a", {"repetition_penalty": penalty}),
                "--repetition-penalty: a number from 0.01 to 100 is needed. 1 changes nothing, 1.1 repeats less.",
            )
            for penalty in (0.0, 1e-45, 1e308, float("nan"))
        ),
        (
            "a",
            {"temperature": float("nan")},
            "--temperature: nan is no number. 0 takes the likeliest token, higher values vary more.",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_and_nothing_written(
    root: Path, prompt: str, sampling: dict[str, float], message: str
) -> None:
    out = io.StringIO()
    with pytest.raises(UserMistake) as refused:
        write(root, prompt, Writing(4, Sampling(**sampling)), out, io.StringIO())
    assert (str(refused.value), out.getvalue()) == (message, "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [1e-320, 1e-5, float("inf")])
def test_the_furthest_numbers_write_without_a_warning(root: Path, temperature: float, penalty: float) -> None:
    out, err = said(root, "sea", 8, temperature=temperature, repetition_penalty=penalty)
    assert out.startswith("sea")
    assert err == ""


@pytest.mark.filterwarnings("error")
def test_a_temperature_next_to_zero_takes_the_likeliest(root: Path) -> None:
    assert said(root, "sea", 8, temperature=1e-320) == said(root, "sea", 8, temperature=0)


def test_a_damaged_model_is_named_with_its_cure(root: Path, tmp_path: Path) -> None:
    (tmp_path / "models/int8").mkdir(parents=True)
    for file in (root / "models/int8").iterdir():
        (tmp_path / "models/int8" / file.name).write_bytes(b"damaged")
    with pytest.raises(BadInput, match=r"model\.onnx: damaged, .*\. `overnight run` makes the model anew\.$"):
        said(tmp_path, "a")


def test_a_model_that_the_run_at_work_makes_is_waited_for_and_one_that_a_night_makes_lies_elsewhere(
    tmp_path: Path,
) -> None:
    for night, told in ((False, r"^models/int8: not there yet: run a-run \(pro"), (True, "Run `overnight run` first")):
        with runs.attempt(tmp_path, "a-run", night=night), pytest.raises(BadInput, match=told):
            said(tmp_path, "a")
