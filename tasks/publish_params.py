"""The section ``publish`` of ``params.yaml``."""

from typing import Annotated

from pydantic import Field

from tasks.section import Section


class PublishParams(Section):
    """Where versions go. No part of a version's identity."""

    # The branch of scheduled runs; by hand a version goes onto the branch that is checked out.
    branch: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] = "nightly"
    git_remote: str | None = None
    data_remote: str | None = None
    promote: bool = True
    # Attempts after the first when a remote does not answer; each waits twice as long as the one before.
    retries: Annotated[int, Field(ge=0, le=20)] = 4
    # How long the data remote may move nothing before the attempt counts as failed.
    stall_minutes: Annotated[float, Field(gt=0, le=1440)] = 10.0
