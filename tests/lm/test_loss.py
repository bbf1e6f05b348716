"""The cross-entropy that goes over the logits piece by piece equals torch's, with its gradient."""

import pytest
import torch
import torch.nn.functional as F

from lm import loss


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_loss_and_gradient_are_torch_s(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    # Pieces that divide the rows and such that do not.
    monkeypatch.setattr(loss, "_LOGITS_AT_A_TIME", 50 * 10)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, 50, generator=generator) * 20).requires_grad_()
    targets = torch.randint(0, 50, (rows,), generator=generator)
    mine = loss.cross_entropy(logits, targets)
    theirs = F.cross_entropy(logits, targets)
    torch.testing.assert_close(mine, theirs)
    (gradient,) = torch.autograd.grad(3 * mine, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * theirs, logits)[0])


def test_halves_are_summed_in_single_precision() -> None:
    logits = torch.randn(512, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(512) % 300
    torch.testing.assert_close(loss.cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets))


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(8, 5)
    before = logits.clone()
    loss.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    assert torch.equal(logits, before)
