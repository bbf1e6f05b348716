"""A chat that takes webhooks, on loopback."""

import contextlib
import http.server
import threading
from collections.abc import Iterator, Sequence


class Receiver:
    """Keeps the content type and body of each message. ``answers`` are its next status codes, before it says 200."""

    def __init__(self, answers: Sequence[int] = ()) -> None:
        received: list[tuple[str, bytes]] = []
        next_answers = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.headers["Content-Type"], body))
                self.send_response(next_answers.pop(0) if next_answers else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.received = received
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # What follows the host is the secret of a webhook.
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/services/SECRET"


@contextlib.contextmanager
def receiving(answers: Sequence[int] = ()) -> Iterator[Receiver]:
    """Yields a receiver that listens."""
    one = Receiver(answers)
    threading.Thread(target=one.http.serve_forever, args=(0.01,), daemon=True).start()
    yield one
    one.http.shutdown()
    one.http.server_close()
