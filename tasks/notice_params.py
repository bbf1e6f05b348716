"""The section ``notice`` of ``params.yaml``."""

from typing import Literal

from pydantic import Field

from tasks.section import Section

Kind = Literal["success", "unchanged", "refused", "skipped", "failure", "died"]


class NoticeParams(Section):
    """Who is told what about a night. No part of a version's identity."""

    # The environment variable that holds the webhook's address; the address itself is a secret.
    webhook_env: str = Field(default="OVERNIGHT_WEBHOOK", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    kinds: list[Kind] = ["success", "refused", "skipped", "failure", "died"]
