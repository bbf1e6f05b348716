"""Fine-tuning towards a float model's predictions, against its definition."""

import copy

import pytest
import torch
from odd import make_grouped, make_model

from lm import loss
from lm.distillation import Taught, teach
from lm.model import LanguageModel
from lm.quantization import PLANS, prepare


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 100, (3, 14), generator=torch.Generator().manual_seed(5))


def _pair() -> tuple[LanguageModel, LanguageModel]:
    """A float model, and another one rounded to 4 bits."""
    teacher = make_model()
    return prepare(copy.deepcopy(teacher), PLANS["blockwise-4"]).train(), teacher


def _divergences(student: LanguageModel, teacher: LanguageModel, windows: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats at each position [B, T], in fp64."""
    ours, theirs = (model(windows[:, :-1]).double().softmax(dim=-1) for model in (student, teacher))
    return (theirs * (theirs.log() - ours.log())).sum(dim=-1)


def test_the_loss_is_the_divergence_from_the_teacher(windows: torch.Tensor) -> None:
    student, teacher = _pair()
    expected = _divergences(student, teacher, windows).mean()
    of_text = student.eval().loss(windows)
    teach(student.train(), teacher)
    found = student.loss(windows)
    assert expected > 0.001
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    found.backward()
    assert all(value.grad is not None for value in student.parameters() if value.dim() > 1)
    assert all(value.grad is None for value in teacher.parameters())
    # What is reported on held-out text stays comparable.
    torch.testing.assert_close(student.eval().loss(windows), of_text)


def test_it_is_zero_for_equal_models(windows: torch.Tensor) -> None:
    model = make_grouped().train()
    teach(model, make_grouped())
    model.loss(windows).backward()
    assert all(value.grad is not None and value.grad.abs().max() < 1e-6 for value in model.parameters())


def test_only_what_is_to_be_learned_counts(windows: torch.Tensor) -> None:
    student, teacher = _pair()
    learned = torch.zeros_like(windows)
    learned[0, 4:9] = learned[2, 13] = 1
    expected = (_divergences(student, teacher, windows) * learned[:, 1:]).mean()
    teach(student, teacher)
    assert student.loss(torch.stack([windows, learned], dim=1)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_logits_come_in_pieces_where_they_are_many(windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for held in (2**26, 7 * 101):
        monkeypatch.setattr(loss, "LOGITS_HELD", held)
        student, teacher = _pair()
        teach(student, teacher)
        value = student.loss(windows)
        found.append([value.detach(), *torch.autograd.grad(value, list(student.parameters()))])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-4)


def test_the_teacher_is_no_part_of_what_is_trained_nor_copied_with_it() -> None:
    student, teacher = _pair()
    names = list(student.state_dict())
    teach(student, teacher)
    assert list(student.state_dict()) == names
    copied = copy.deepcopy(student).taught
    assert isinstance(copied, Taught)
    assert copied.teacher is teacher
    assert not any(value.requires_grad for value in teacher.parameters())
