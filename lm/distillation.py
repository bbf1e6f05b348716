"""Fine-tuning towards a float model's own predictions instead of the text (arXiv 1503.02531; of language models in few
bits: LLM-QAT, arXiv 2305.17888).

The text says one token, the float model how likely each is: more to learn from each window, and nothing to unlearn.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lm.loss import over_learned, projected_cross_entropy
from lm.model import LanguageModel


def teach(student: LanguageModel, teacher: LanguageModel) -> None:
    """Makes ``student.loss`` in training the divergence of its predictions from ``teacher``'s, in place.

    That is the mean over all positions of KL(teacher || student) in nats, in fp32; in evaluation the loss stays that of
    the text. ``teacher`` has to be on the device of ``student``; it is frozen, and no part of it: copies of ``student``
    have the same one.
    """
    teacher.requires_grad_(False).eval()
    student.taught = Taught(teacher)


class Taught:
    """The loss of a student that has this ``teacher``."""

    def __init__(self, teacher: LanguageModel) -> None:
        self.teacher = teacher

    def __deepcopy__(self, _: dict[int, Any]) -> "Taught":
        return self

    def __call__(self, student: LanguageModel, windows: torch.Tensor) -> torch.Tensor:
        windows, learned = (windows, None) if windows.dim() == 2 else windows.unbind(1)
        ids = windows[:, :-1]
        with torch.no_grad():
            theirs = self.teacher.model(ids)

        def projected(x_BTD: torch.Tensor, theirs_BTD: torch.Tensor) -> torch.Tensor:
            x_ND, theirs_ND = x_BTD.flatten(0, 1), theirs_BTD.flatten(0, 1)
            return projected_cross_entropy(
                student.lm_head, x_ND, theirs_ND, student.config.vocab_size, self._divergence
            )

        return over_learned(projected, student.model(ids), theirs, None if learned is None else learned[:, 1:])

    def _divergence(self, logits_NV: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted_NV = F.log_softmax(self.teacher.lm_head(theirs_ND).float(), dim=-1)
        return F.kl_div(F.log_softmax(logits_NV.float(), dim=-1), wanted_NV, reduction="batchmean", log_target=True)
