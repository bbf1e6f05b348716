"""The section ``card`` of ``params.yaml``."""

from pydantic import Field

from tasks.section import Section


class CardParams(Section):
    """What only people know about the model."""

    name: str = Field(min_length=1)
    licence: str = Field(min_length=1)
    language: list[str] = Field(min_length=1)
    intended_use: str = Field(min_length=1)
    out_of_scope: str = Field(min_length=1)
    contact: str | None = None
