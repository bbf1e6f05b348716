"""What the replicas of a training exchange, and how often: the keys ``compression`` and ``diloco`` of ``train``."""

from typing import Literal

from pydantic import Field

from tasks.section import Section

Compression = Literal["none", "powersgd", "int8"]


class DilocoParams(Section):
    """Local steps between exchanges (DiLoCo, arXiv 2311.08105)."""

    # 0: the replicas exchange gradients in each step.
    inner_steps: int = Field(default=0, ge=0)
    outer_learning_rate: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)


class ExchangeParams(Section):
    """Both, as a training reads them."""

    compression: Compression = "none"
    rank: int = 4
    diloco: DilocoParams = DilocoParams()
