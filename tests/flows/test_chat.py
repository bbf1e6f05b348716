"""Conversing: what is answered, remembered and read again, and how a conversation ends, in a pipe and in a terminal."""

import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny
from odd import export_over_bytes, export_to_chat
from serving import lay_out_project

from flows.chat import Conversation, Settings, chat
from lm.chat_template import ChatTemplate, Message
from lm.runtime import Generator
from lm.sampling import Sampling
from lm.text import Request
from tasks.errors import BadInput, UserMistake

GREEDY = Settings(8, Sampling(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = lay_out_project(tmp_path_factory.mktemp("project"))
    export_to_chat(root / "models/int8")
    return root


@pytest.fixture
def model(root: Path) -> Generator:
    return Generator(root / "models/int8")


@pytest.fixture
def template(root: Path, model: Generator) -> ChatTemplate:
    found = ChatTemplate.read(root / "models/int8", model.tokenizer)
    assert found is not None
    return found


def said(root: Path, lines: str, settings: Settings = GREEDY) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = chat(root, settings, io.StringIO(lines), out, err)
    return code, out.getvalue(), err.getvalue()


def test_each_line_is_answered_after_all_that_was_said(root: Path, model: Generator, template: ChatTemplate) -> None:
    messages = [Message("system", "Be short.")]
    expected = ""
    for turn, text in enumerate(("sea", "and the land?")):
        messages.append(Message("user", text))
        sampling = Sampling(1.3, seed=5 + len(messages) - 1)
        answer = "".join(model.generate(Request(tuple(template.encode(messages)), 8, sampling, ("e",))))
        messages.append(Message("assistant", answer))
        expected += f"{answer}\n"
        assert len(messages) == 2 * turn + 3
    settings = Settings(8, Sampling(1.3, seed=5), ("e",), system="Be short.")
    assert said(root, "sea\n\n  \nand the land?\n", settings) == (0, expected, "")


def test_what_was_read_is_not_read_again(
    model: Generator, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda ids, *more, **how: lengths.append(ids.shape[1]) or run(ids, *more, **how))
    conversation = Conversation(model, template, GREEDY)
    first = "".join(conversation.answer("sea"))
    asked = len("1user\nsea2\n1assistant\n")
    assert lengths == [asked, *[1] * 7]
    lengths.clear()
    list(conversation.answer("land"))
    # Of the answer that comes back it may read some anew: an untrained model writes halves of characters.
    whole = template.encode([Message("user", "sea"), Message("assistant", first), Message("user", "land")])
    assert lengths[0] <= len(whole) - asked


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(model: Generator, template: ChatTemplate) -> None:
    conversation = Conversation(model, template, GREEDY)
    pieces = conversation.answer("sea")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages == (Message("user", "sea"), Message("assistant", begun))
    fresh = Conversation(model, template, GREEDY)
    fresh.messages = conversation.messages
    assert "".join(conversation.answer("land")) == "".join(fresh.answer("land"))


def test_a_conversation_that_outgrows_the_context_is_told_and_not_cut(model: Generator, template: ChatTemplate) -> None:
    conversation = Conversation(model, template, GREEDY)
    list(conversation.answer("a" * 100))
    before = conversation.messages
    with pytest.raises(BadInput, match=r"^the conversation has \d{3} tokens with this message, and the model reads at"):
        list(conversation.answer("b" * 150))
    assert conversation.messages == before
    assert list(conversation.answer("sea"))


def test_an_answer_that_fills_the_context_says_so_beside_it(root: Path) -> None:
    settings = Settings(1000, Sampling(1.0, seed=1))
    code, out, err = said(root, "a" * 200 + "\n", settings)
    assert code == 0
    assert len(out) > 1
    assert err == (
        "The model's context of 256 tokens is full: the answer ends here. Begin another conversation with "
        "`overnight chat`.\n"
    )


@pytest.mark.parametrize(
    ("settings", "lines", "message"),
    [
        (GREEDY, "caf\udce9\n", "the message is not UTF-8: byte 0xe9 after 3 characters. Write it in UTF-8."),
        (GREEDY, "a" * 300, "the conversation has 319 tokens with this message, and the model reads at most 256, "),
        (Settings(8, system="\udce9"), "", "--system is not UTF-8: byte 0xe9 after 0 characters."),
        (Settings(8, Sampling(top_p=0)), "", "--top-p: a share above 0 and up to 1 is needed."),
    ],
)
def test_what_cannot_be_answered_ends_a_conversation_in_a_pipe(
    root: Path, settings: Settings, lines: str, message: str
) -> None:
    with pytest.raises(UserMistake) as refused:
        said(root, lines, settings)
    assert str(refused.value).startswith(message)


def test_a_template_that_refuses_is_told_in_one_line(model: Generator) -> None:
    strict = ChatTemplate("{{ raise_exception('no system role') }}", {}, model.tokenizer, "t")
    with pytest.raises(BadInput, match=r"^the model's chat template refuses this conversation: no system role\.$"):
        list(Conversation(model, strict, GREEDY).answer("sea"))


def test_a_model_without_a_template_is_refused_with_what_to_do(tmp_path: Path) -> None:
    export_over_bytes(lay_out_project(tmp_path) / "models/int8")
    done = run(tmp_path, b"sea\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"error: {tmp_path}/models/int8: no chat_template.jinja, so this model ")
    assert "Use `overnight generate TEXT`, or a model that was started from one with a chat template.\n" in (
        done.stderr.decode()
    )


def run(root: Path, lines: bytes, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "flows", "chat", *arguments]
    return subprocess.run(command, cwd=root, env=environment(), input=lines, capture_output=True, check=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tiny.ROOT), "COLUMNS": "300", "TERM": "dumb"}


def test_the_command_reads_a_pipe(root: Path) -> None:
    done = run(root, b"sea\nland\n", "--temperature", "0", "--max-new-tokens", "8")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == said(root, "sea\nland\n")[1]
    wrong = run(root, b"sea\ncaf\xe9\nland\n", "--temperature", "0", "--max-new-tokens", "8")
    assert (wrong.returncode, wrong.stdout.decode()) == (2, said(root, "sea\n")[1])
    assert wrong.stderr == b"error: the message is not UTF-8: byte 0xe9 after 3 characters. Write it in UTF-8.\n"


def _take_terminal() -> None:
    # Ctrl-C is a signal to whose terminal it is. Whoever runs the tests in the background has it ignored.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """``overnight chat`` in a terminal of its own; ``shown`` is what stands there."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self._here, there = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows", "chat", *arguments],
            cwd=root,
            env=environment(),
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(there)
        os.set_blocking(self._here, False)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._here, keys.encode())

    def until(self, text: str, times: int = 1) -> None:
        self._wait(lambda: self.shown.count(text) >= times)

    def more(self) -> None:
        length = len(self.shown)
        self._wait(lambda: len(self.shown) > length)

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        self._read()
        os.close(self._here)
        return code

    def _wait(self, come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not come():
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.02)
            self._read()

    def _read(self) -> None:
        # At its end a terminal says that there is nothing there (EIO).
        with suppress(OSError):
            self.shown += os.read(self._here, 1 << 16).decode(errors="replace")


@contextmanager
def terminal(root: Path, *arguments: str) -> Iterator[Terminal]:
    shown = Terminal(root, *arguments)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(tmp_path: Path) -> None:
    export_to_chat(lay_out_project(tmp_path) / "models/int8", context=32_000)
    # No token ends an answer.
    config = json.loads((tmp_path / "models/int8/config.json").read_text())
    ends = {"bos_token_id": 9999, "eos_token_id": 9999}
    (tmp_path / "models/int8/config.json").write_text(json.dumps({**config, **ends}))
    (tmp_path / "models/int8/generation_config.json").write_text(json.dumps(ends))
    refusing = "{% if messages[-1].content == 'no' %}{{ raise_exception('We do not say no') }}{% endif %}"
    (tmp_path / "models/int8/chat_template.jinja").write_text(refusing + tiny.CHATML)
    with terminal(tmp_path, "--max-new-tokens", "30000", "--temperature", "0") as shown:
        shown.until("\r\n> ")
        shown.type("\x03")
        shown.until("\r\n> ", 2)
        shown.type("sea\n")
        shown.until("sea\r\n")
        shown.more()
        shown.type("\x03")
        shown.until("\r\n> ", 3)
        # It was far from its end.
        assert len(shown.shown) < 10_000
        shown.type("no\n")
        shown.until("error: the model's chat template refuses this conversation: We do not say no.\r\n> ")
        shown.type("\x04")
        assert shown.end() == 0
    assert "Traceback" not in shown.shown
    assert shown.shown.startswith("Ctrl-C stops an answer, Ctrl-D ends the conversation.\r\n")
