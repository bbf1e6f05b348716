"""Notices: what they say, that they get through to a real receiver, and that no failure of theirs shows the address."""

import json
from collections.abc import Iterator

import pytest
from receiver import Receiver, receiving

from flows import notice
from flows.notice import Notice
from tasks.notice_params import NoticeParams

PARAMS = NoticeParams(webhook_env="HOOK")
FAILURE = Notice(
    kind="failure",
    project="bible",
    run="20260101-020000",
    message="the process was killed (signal 9)",
    stage="train",
    last_lines=tuple(f"step {index}" for index in range(40)),
    command="overnight rerun",
)


@pytest.fixture
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(notice, "_SECONDS_BEFORE_RETRY", (0.01, 0.01))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with receiving(getattr(request, "param", [])) as one:
        monkeypatch.setenv("HOOK", one.url)
        yield one


def test_a_failure_says_the_stage_its_last_lines_and_how_to_go_on(receiver: Receiver) -> None:
    assert notice.tell(FAILURE, PARAMS) == "sent"
    [(content_type, body)] = receiver.received
    assert content_type == "application/json"
    sent = json.loads(body)
    lines = sent["text"].splitlines()
    assert lines[0] == "bible: failed at train"
    assert "the process was killed (signal 9)" in lines[1]
    assert lines[-2:] == ["    step 39", "Go on with: overnight rerun"]
    assert "step 24" not in sent["text"]
    fields = sent["overnight"]
    assert (fields["kind"], fields["stage"], fields["command"]) == ("failure", "train", "overnight rerun")
    assert fields["last_lines"] == [f"step {index}" for index in range(25, 40)]


def test_a_refusal_by_the_gate_names_the_version_and_the_reason(receiver: Receiver) -> None:
    told = Notice("refused", "bible", "r", "against_champion: +1.20% at most; the limit is +1.00%", version="v1.3.0")
    notice.tell(told, PARAMS)
    text = json.loads(receiver.received[0][1])["text"]
    assert text.splitlines()[0] == "bible: the gate refused the new model (v1.3.0)"
    assert "against_champion: +1.20% at most" in text


@pytest.mark.parametrize("receiver", [[503, 429]], indirect=True)
def test_a_receiver_that_is_away_for_a_moment_is_asked_again(receiver: Receiver) -> None:
    assert notice.tell(FAILURE, PARAMS) == "sent"
    assert len(receiver.received) == 3


@pytest.mark.parametrize(
    ("receiver", "attempts", "told"),
    [([404], 1, "the receiver answered 404"), ([500, 500, 500], 3, "the receiver answered 500, 3 times")],
    indirect=["receiver"],
)
def test_a_receiver_that_refuses_is_told_and_nothing_is_raised(receiver: Receiver, attempts: int, told: str) -> None:
    assert notice.tell(FAILURE, PARAMS) == f"not sent: {told}"
    assert len(receiver.received) == attempts


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/SECRET", "https://SECRET.invalid/", "SECRET", "http://[SECRET"]
)
def test_an_address_that_leads_nowhere_is_told_without_showing_it(
    address: str, monkeypatch: pytest.MonkeyPatch, receiver: Receiver
) -> None:
    monkeypatch.setenv("HOOK", address)
    told = notice.tell(FAILURE, PARAMS)
    assert told.startswith("not sent: the ")
    assert "SECRET" not in told


def test_what_nobody_wants_to_hear_is_not_sent(receiver: Receiver) -> None:
    quiet = Notice("unchanged", "bible", "r", "nothing new at the sources")
    assert "notice.kinds leaves out 'unchanged'" in notice.tell(quiet, PARAMS)
    assert not receiver.received


def test_without_an_address_nothing_is_sent_and_the_variable_is_named(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOOK")
    assert notice.tell(FAILURE, PARAMS) == "not sent: the environment variable HOOK is not set"
