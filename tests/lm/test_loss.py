"""The cross-entropy that goes over the logits piece by piece equals torch's, with its gradient."""

import odd
import pytest
import torch
import torch.nn.functional as F

from lm import loss
from lm.linear import Linear


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_loss_and_gradient_are_torch_s(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    # Pieces that divide the rows and such that do not.
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", 50 * 10)
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


class _Seen(Linear):
    # Notes how many logits it makes at once.
    most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        self.most = max(self.most, logits.numel())
        return logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_pieces_has_the_loss_and_the_gradients_of_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, bias: bool, autocast: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = _Seen(24, 50, bias=bias)
    x = torch.randn(37, 24, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (37,), generator=generator)
    found = []
    for held in (2**26, 50 * 8):
        monkeypatch.setattr(loss, "LOGITS_HELD", held)
        head.most = 0
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss.projected_cross_entropy(head, x, targets, 50)
        found.append((value, *torch.autograd.grad(3 * value, [x, *head.parameters()])))
        assert head.most <= held
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if autocast else {}
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, **tolerance)


def test_a_model_s_loss_is_the_same_in_pieces_with_a_tied_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd.make_grouped(tie_word_embeddings=True)
    ids = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for held in (2**26, 101 * 10):
        monkeypatch.setattr(loss, "LOGITS_HELD", held)
        gradients.append(torch.autograd.grad(model.loss(ids), list(model.parameters())))
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole)
    with torch.no_grad():
        assert not model.loss(ids).requires_grad
