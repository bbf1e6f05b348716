"""What people are told about a run when it has ended: by webhook, and as a Prefect event that automations can act on.

Telling never fails a run and never shows the webhook's address, which is a secret: it comes from the environment
variable that ``params.yaml`` names under ``notice.webhook_env``.
"""

import contextlib
import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from datetime import datetime
from typing import Any

from tasks.notice_params import Kind, NoticeParams

# Automations match these: overnight.night.failure and so on.
EVENT_PREFIX = "overnight.night."
_SECONDS_TO_ANSWER = 5.0
_SECONDS_BEFORE_RETRY = (1.0, 3.0)
# Too many requests, and what a gateway says of a receiver that is away for a moment.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_LAST_LINES = 15


@dataclasses.dataclass(frozen=True)
class Notice:
    """How a run ended.

    ``stage``, ``last_lines`` (of its log) and ``command`` (what goes on from there) belong to a failure or a death;
    ``version`` to a success or a refusal by the gate; ``message`` is one line that says what came out, or why not.
    """

    kind: Kind
    project: str
    run: str
    message: str
    stage: str | None = None
    last_lines: tuple[str, ...] = ()
    command: str | None = None
    version: str | None = None
    flow_run: str | None = None

    def text(self) -> str:
        """Returns the notice as a few lines of plain text."""
        what = _WORDS[self.kind] + (f" at {self.stage}" if self.stage else "")
        version = f" ({self.version})" if self.version else ""
        lines = [f"{self.project}: {what}{version}", f"run {self.run}: {self.message}"]
        lines += [f"    {line}" for line in self.last_lines[-_LAST_LINES:]]
        if self.command:
            lines.append(f"Go on with: {self.command}")
        return "\n".join(lines)

    def fields(self) -> dict[str, Any]:
        """Returns the notice as plain values, for programs."""
        last_lines = list(self.last_lines[-_LAST_LINES:])
        return {**dataclasses.asdict(self), "last_lines": last_lines, "at": datetime.now().astimezone().isoformat()}


_WORDS: dict[Kind, str] = {
    "success": "a new model",
    "unchanged": "nothing new",
    "refused": "the gate refused the new model",
    "skipped": "the night was skipped",
    "failure": "failed",
    "died": "died without a word",
}


def tell(notice: Notice, params: NoticeParams) -> str:
    """Tells ``notice`` to whom it concerns and returns in one line whether it got through."""
    # A server that is gone must not turn a night that has ended into one that failed.
    with contextlib.suppress(Exception):
        _emit(notice)
    if notice.kind not in params.kinds:
        return f"not sent: params.yaml's notice.kinds leaves out '{notice.kind}'"
    url = os.environ.get(params.webhook_env, "")
    if not url:
        return f"not sent: the environment variable {params.webhook_env} is not set"
    body = json.dumps({"text": notice.text(), "overnight": notice.fields()}).encode()
    complaint = _post(url, body)
    return f"not sent: {complaint}" if complaint else "sent"


def _post(url: str, body: bytes) -> str | None:
    """Returns None when the receiver took ``body``, else why not, without a word of ``url``."""
    if not url.startswith(("https://", "http://")):
        return "the address does not begin with https://"
    complaint = ""
    for seconds in (0.0, *_SECONDS_BEFORE_RETRY):
        time.sleep(seconds)
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER):
                return None
        except urllib.error.HTTPError as error:
            complaint = f"the receiver answered {error.code}"
            if error.code not in _PASSING:
                return complaint
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Messages of these may quote the address; the class says enough (refused, timed out, no such host).
            reason = getattr(error, "reason", error)
            complaint = f"the receiver cannot be reached ({type(reason).__name__})"
    return f"{complaint}, {1 + len(_SECONDS_BEFORE_RETRY)} times"


def _emit(notice: Notice) -> None:
    """Sends the notice to the Prefect server as an event, unless there is none."""
    if not os.environ.get("PREFECT_API_URL"):
        return
    from prefect.events import emit_event

    related = []
    if notice.flow_run:
        # So that the event stands on the flow run's page, and automations can act on the run.
        related.append(
            {"prefect.resource.id": f"prefect.flow-run.{notice.flow_run}", "prefect.resource.role": "flow-run"}
        )
    emit_event(
        event=f"{EVENT_PREFIX}{notice.kind}",
        resource={
            "prefect.resource.id": f"overnight.run.{notice.run}",
            "prefect.resource.name": notice.run,
            "overnight.project": notice.project,
            "overnight.text": notice.text(),
        },
        related=related,
        payload=notice.fields(),
    )
