"""The section ``publish`` of ``params.yaml``."""

import re
from typing import Annotated

from pydantic import Field, field_validator

from tasks.section import Section

# Of what Git allows, names of letters, digits and . _ - / (git-check-ref-format).
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class PublishParams(Section):
    """Where versions go. No part of a version's identity."""

    # The branch of scheduled runs; by hand a version goes onto the branch that is checked out.
    branch: str = "nightly"
    git_remote: str | None = None
    data_remote: str | None = None
    promote: bool = True
    # Attempts after the first when a remote does not answer; each waits twice as long as the one before.
    retries: Annotated[int, Field(ge=0, le=20)] = 4
    # How long the data remote may move nothing before the attempt counts as failed.
    stall_minutes: Annotated[float, Field(gt=0, le=1440)] = 10.0

    @field_validator("branch")
    @classmethod
    def _is_a_branch(cls, name: str) -> str:
        parts = name.split("/")
        sound = (_PART.fullmatch(one) and ".." not in one and not one.endswith((".", ".lock")) for one in parts)
        if name == "HEAD" or not all(sound):
            raise ValueError(
                f"{name!r} is no name for a branch of Git; take letters, digits and . - _ /, as in nightly"
            )
        return name
