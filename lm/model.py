"""A decoder of any family.

Its state has the names of Hugging Face's layout, but for the stacked experts and the layers of multi-token prediction.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from lm.config import GroupedConfig, GroupedMixtureConfig, LatentConfig, ModelConfig
from lm.feed_forward import Experts, MixtureOfExperts, Router, SwiGLU
from lm.grouped import GroupedAttention
from lm.latent import LatentAttention
from lm.linear import Embedding, Linear
from lm.loss import Measure, cross_entropy, over_learned, projected_cross_entropy
from lm.norm import RMSNorm
from lm.rope import rotations_of


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if isinstance(config, LatentConfig) else GroupedAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SwiGLU | MixtureOfExperts
        if isinstance(config, GroupedMixtureConfig) or (
            isinstance(config, LatentConfig) and layer >= config.first_k_dense_replace
        ):
            self.mlp = MixtureOfExperts(config)
        else:
            biases = isinstance(config, GroupedConfig) and config.mlp_bias
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, biases)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: ids [B, T] to hidden states [B, T, D]."""

    rotations: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("rotations", rotations_of(config), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.rotations[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class FurtherToken(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3 report, arXiv 2412.19437, section 2.2), for training alone.

    From what is known at a position and the token that comes next, a block of its own makes what the shared head turns
    into the token after that.
    """

    def __init__(self, config: LatentConfig, depth: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, embedded: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns from ``x`` [B, T, D] and the embeddings of the tokens that come next the hidden states [B, T, D] that
        the next depth goes on from, and those that the head reads.
        """
        both = torch.cat([self.enorm(embedded), self.hnorm(x)], dim=-1)
        x = self.block(self.eh_proj(both).to(both.dtype), cos, sin)
        return x, self.norm(x)


class LanguageModel(nn.Module):
    """The decoder and its head.

    In training the gradients of ``loss`` are those of its sum with that of multi-token prediction, the mean over its
    depths times ``mtp_loss_weight``; its value stays that of the next token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.measure: Measure = cross_entropy
        self.mtp = nn.ModuleList()
        if isinstance(config, LatentConfig):
            self.mtp.extend(FurtherToken(config, depth) for depth in range(config.num_nextn_predict_layers))
        self.mtp_loss_weight = 0.3
        self.taught: Callable[[LanguageModel, torch.Tensor], torch.Tensor] | None = None
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, T, vocabulary] for ``ids`` [B, T]."""
        return self.lm_head(self.model(ids))

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy in nats of predicting ``windows`` [B, T + 1] from their first T tokens.

        Of ``windows`` [B, 2, T + 1] the second row says with 1 which tokens count; the others add 0 to the same mean.
        In training it is what ``taught`` says instead, where :mod:`lm.distillation` has set that.
        """
        if self.training and self.taught is not None:
            return self.taught(self, windows)
        ids = windows if windows.dim() == 2 else windows[:, 0]
        return self.loss_from(self.model(ids[:, :-1]), windows)

    def loss_from(self, x_BTD: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Returns :meth:`loss` from what the decoder makes of ``windows``, of which the first token is not read."""
        windows, learned = (windows, None) if windows.dim() == 2 else windows.unbind(1)
        loss = self._loss_ahead(1, x_BTD, windows, learned)
        if self.training and len(self.mtp):
            further = self.mtp_loss_weight * self._further_loss(x_BTD, windows, learned)
            loss = loss + (further - further.detach())
        return loss

    def _further_loss(self, x_BTD: torch.Tensor, windows: torch.Tensor, learned: torch.Tensor | None) -> torch.Tensor:
        total = x_BTD.new_zeros((), dtype=torch.float32)
        for depth, further in enumerate(self.mtp, start=1):
            # The last position has no token that far ahead.
            x_BTD = x_BTD[:, :-1]
            cos, sin = self.model.rotations[:, : x_BTD.shape[1]]
            x_BTD, read_BTD = further(x_BTD, self.embedded_again(windows[:, depth:-1]), cos, sin)
            total = total + self._loss_ahead(depth + 1, read_BTD, windows, learned)
        return total / len(self.mtp)

    def _loss_ahead(
        self, ahead: int, x_BTD: torch.Tensor, windows: torch.Tensor, learned: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the mean cross-entropy of predicting the token so many ahead of each position."""
        counting = None if learned is None else learned[:, ahead:]
        return over_learned(self.loss_of, x_BTD, windows[:, ahead:], counting)

    def embedded_again(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings [B, T, D] of ``ids`` [B, T], for multi-token prediction, behind the decoder."""
        return self.model.embed_tokens(ids)

    def loss_of(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy in nats of predicting the targets from the decoder's hidden states."""
        return projected_cross_entropy(
            self.lm_head, x_BTD.flatten(0, 1), targets_BT.flatten(), self.config.vocab_size, self.measure
        )

    def initialize(self, seed: int) -> None:
        """Draws every matrix from N(0, initializer_range), by ``seed`` alone; norms are 1, biases 0."""
        with torch.no_grad():
            for name, value in self.drawn(seed):
                self.get_parameter(name).copy_(value)

    def drawn(self, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what :meth:`initialize` gives to each parameter, on the CPU, wherever those of this model are."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, device="cpu")
            if value.dim() > 1:
                value.normal_(std=self.config.initializer_range, generator=generator)
            yield name, value

    def blocks(self) -> list[nn.Module]:
        """Returns the decoder's blocks, and those of multi-token prediction."""
        return [*self.model.layers, *(further.get_submodule("block") for further in self.mtp)]

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def layers_with_experts(self) -> tuple[int, ...]:
        """Returns the numbers of the layers that route, from 0."""
        return tuple(index for index, layer in enumerate(self.model.layers) if isinstance(layer.mlp, MixtureOfExperts))

    def parameter_counts(self) -> tuple[int, int]:
        """Returns how many parameters there are, and how many of them work on one token.

        Without multi-token prediction, which training alone has a use for.
        """
        total, active = self._counts(self)
        further, active_further = self._counts(self.mtp)
        return total - further, active - active_further

    def active_in_mtp(self) -> int:
        """Returns how many parameters multiply a token for multi-token prediction; each depth takes the head again."""
        return self._counts(self.mtp)[1] + len(self.mtp) * self.lm_head.weight.numel()

    def _counts(self, part: nn.Module) -> tuple[int, int]:
        total = sum(parameter.numel() for parameter in part.parameters())
        if isinstance(self.config, GroupedConfig):
            return total, total
        experts = [module for module in part.modules() if isinstance(module, Experts)]
        routed = sum(parameter.numel() for module in experts for parameter in module.parameters())
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        return total, total - routed + round(routed * share)
