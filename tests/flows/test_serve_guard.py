"""Whom the server lets in: by its key, by the name that it is asked at, and by where it listens."""

import os
from pathlib import Path

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from serving import GREEDY, HERE, Server

from flows.serve.app import make_app
from lm.runtime import Generator


def test_without_a_key_a_name_that_leads_here_is_not_answered(root: Path) -> None:
    def status(host: str, key: str | None = None, path: str = "/v1/models") -> int:
        app = TestClient(make_app(Generator(root / "models/int8"), None, "m", key), HERE)
        return app.get(path, headers={"Host": host, "Authorization": f"Bearer {key}"}).status_code

    assert [status(host) for host in ("127.0.0.1:80", "localhost", "[::1]:8080")] == [200] * 3
    assert [status(host) for host in ("pages.example", "localhost.example:80", "10.0.0.1")] == [403] * 3
    # No hosts, but browsers ask for some of them.
    malformed = ("a{b.pages.example:80", "a`b.pages.example", "pages.example:", "pages.example:99999", "[pages", "")
    assert [status(host) for host in malformed] == [403] * 6
    assert status("pages.example", path="/health") == 200
    assert status("pages.example", "key") == 200


def test_a_key_may_have_any_characters(root: Path) -> None:
    def status(key: str, sent: str, scheme: str = "Bearer") -> int:
        app = make_app(Generator(root / "models/int8"), None, "m", key)
        headers = {b"Authorization": f"{scheme} {sent}".encode()}
        return TestClient(app, HERE).get("/v1/models", headers=headers).status_code

    assert [status("gehörig", sent) for sent in ("gehörig", "gehorig", "")] == [200, 401, 401]
    # As an environment has it whose bytes are no text.
    assert status(os.fsdecode(b"\xff"), "x") == 401
    assert [status("key", "key", scheme) for scheme in ("bearer", "BEARER", "Basic", "")] == [200, 200, 401, 401]


def test_an_address_that_others_reach_needs_a_key_and_asks_for_it(root: Path) -> None:
    refused = Server(root, "--host", "0.0.0.0")
    assert refused.process.wait(timeout=20) == 2
    assert "error: --host 0.0.0.0: others can reach that, so set OVERNIGHT_API_KEY" in refused.said
    server = Server(root, OVERNIGHT_API_KEY="secret")
    try:
        assert httpx.post(f"{server.url}/completions", json=GREEDY).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key="guess", max_retries=0).models.list()
        known = openai.OpenAI(base_url=server.url, api_key="secret", max_retries=0)
        assert known.completions.create(model=root.name, **GREEDY).choices[0].text
        assert httpx.get(server.url.replace("/v1", "/health")).json() == {"status": "ok"}
    finally:
        code, output = server.stop()
    assert code == 130
    assert "secret" not in output


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.org"])
def test_a_host_that_no_machine_can_be_called_is_one_line(root: Path, host: str) -> None:
    server = Server(root, "--host", host, OVERNIGHT_API_KEY="x")
    assert server.process.wait(timeout=20) == 2
    assert server.said == f"error: --host {host}: no name that a machine can have. Serve on 127.0.0.1, or on 0.0.0.0.\n"
