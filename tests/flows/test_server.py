"""Which Prefect server lets us in, and one line for each that does not."""

import base64
import http.server
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import automations, server
from tasks.errors import TryAgain, UserMistake

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API of a server with a password, of which only the health is told to everybody, as Prefect's is."""
    wanted = f"Basic {base64.b64encode(b'somebody:secret').decode()}"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            let_in = self.path == "/api/health" or self.headers["Authorization"] == wanted
            self.send_response(200 if let_in else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}/api"
        served.shutdown()


def test_a_missing_or_wrong_password_is_one_line_that_names_the_variable(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserMistake, match=r"PREFECT_API_AUTH_STRING is not set, .* Set it to USER:PASSWORD"):
        server.check(guarded)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "somebody:else")
    with pytest.raises(
        UserMistake, match="PREFECT_API_AUTH_STRING is not the password of the Prefect server"
    ) as caught:
        server.check(guarded)
    assert "somebody:else" not in str(caught.value)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "somebody:secret")
    server.check(guarded)


def test_a_password_in_the_address_is_refused_and_not_printed() -> None:
    with pytest.raises(UserMistake, match=r"PREFECT_API_URL holds a password.* Set PREFECT_API_AUTH_STRING") as caught:
        server.check("http://bob:s3cret@127.0.0.1:1/api")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("pages", [0, 1, 4])
def test_a_damaged_database_is_named_where_the_server_does_not_come_up(tmp_path: Path, pages: int) -> None:
    database = tmp_path / server.DATABASE
    with sqlite3.connect(database) as connection:
        connection.execute("create table nights (name text)")
        connection.executemany("insert into nights values (?)", [("x" * 1000,)] * 100)
    with database.open("r+b") as file:
        # The last, too: where the header is whole, no opening tells.
        file.seek(0 if pages > 1 else 4096)
        file.write(os.urandom(4096 * pages))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    expected = UserMistake if pages else TryAgain
    damaged = rf"{database}: Prefect's database is damaged \([^*]+\)\. Move it away"
    told = damaged if pages else "Prefect's server did not start"
    with pytest.raises(expected, match=told):
        server.Server(port, None, tmp_path / "server.log").wait()


def test_origins_that_the_user_lets_in_do_not_keep_the_server_s_own_pages_out(monkeypatch: pytest.MonkeyPatch) -> None:
    name, own = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "http://127.0.0.1:7,http://localhost:7"
    monkeypatch.delenv(name, raising=False)
    assert server._own_origins(7) == {name: own}
    monkeypatch.setenv(name, "https://nights.example")
    assert server._own_origins(7) == {name: f"https://nights.example,{own}"}


def test_automations_are_installed_from_a_project_on_a_server_that_was_named(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> str:
        assert automations.main() == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert refused().startswith(f"error: {tmp_path}: no dvc.yaml here.")
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    for name in (".git", ".dvc"):
        (tmp_path / name).mkdir()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert refused().startswith("error: PREFECT_API_URL is not set.")
    with temporary_settings({PREFECT_API_URL: guarded}):
        assert refused().startswith("error: PREFECT_API_AUTH_STRING is not set")
