import pytest
import torch
import torch.nn.functional as F
from odd import make_model

from lm import causal
from lm.latent import LatentAttention
from lm.model import LanguageModel
from lm.rope import rotate, rotations


def test_no_token_sees_a_later_one(model: LanguageModel, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 100
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


def test_the_flash_path_equals_the_explicit_one(model: LanguageModel, ids: torch.Tensor, monkeypatch: object) -> None:
    with torch.no_grad():
        explicit = model(ids)
        monkeypatch.setattr(causal, "EXPLICIT_ATTENTION_UP_TO", 0)  # type: ignore[attr-defined]
        torch.testing.assert_close(model(ids), explicit, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 29])
def test_blocks_of_rows_change_neither_the_output_nor_a_gradient(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "_ROWS", 8)
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 3, length, 10), (2, 3, length, 10), (2, 3, length, 6)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes)
    mine = causal.attend(q, k, v)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine, theirs)
    towards = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
    # Keys and values gather their gradients in fp32.
    for found, expected in zip(
        torch.autograd.grad(mine, [q, k, v], towards), torch.autograd.grad(theirs, [q, k, v], towards), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotations(40, 6, 10000.0)
    q, k = torch.randn(6), torch.randn(6)
    scores = [rotate(q, cos[i + 5], sin[i + 5]) @ rotate(k, cos[i], sin[i]) for i in range(0, 35, 7)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(5), atol=1e-5, rtol=1e-5)


def test_the_cache_holds_one_latent_and_one_key_a_token() -> None:
    model = make_model()
    layer = next(module for module in model.modules() if isinstance(module, LatentAttention))
    assert layer.kv_a_proj_with_mqa.out_features == model.config.cache_width == 20 + 6
