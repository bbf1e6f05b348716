"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shape suffixes: B batch, T tokens, D hidden size, H heads, C latent rank, N head size without position, R rotary head
size, V value head size.
"""

import torch
from torch import nn

from lm.causal import attend
from lm.config import LatentConfig
from lm.linear import Linear, together
from lm.norm import RMSNorm
from lm.rope import rotate

# Of the latents' norms: DeepSeek's code has it there whatever the configuration's rms_norm_eps.
_EPS = 1e-6


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are expanded from one latent a token."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, _EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size)

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns [B, T, D]; ``cos`` and ``sin`` [T, R / 2] hold the rotations of the T positions."""
        config = self.config
        batch, length, _ = x_BTD.shape
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim

        if config.q_lora_rank is None:
            q, compressed = together(x_BTD, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q, compressed = together(x_BTD, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_BHTN, q_BHTR = q.view(batch, length, -1, nope + rope).transpose(1, 2).split([nope, rope], dim=-1)

        latent_BTC, k_BTR = compressed.split([config.kv_lora_rank, rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_BTC))
        widths = [nope, config.v_head_dim]
        k_BHTN, v_BHTV = kv.view(batch, length, -1, sum(widths)).transpose(1, 2).split(widths, dim=-1)

        # One rotary key serves all heads.
        k_BHTR = rotate(k_BTR, cos, sin).unsqueeze(1).expand(-1, k_BHTN.shape[1], -1, -1)
        q_BHTQ = torch.cat([q_BHTN, rotate(q_BHTR, cos, sin).to(q_BHTN.dtype)], dim=-1)
        k_BHTQ = torch.cat([k_BHTN, k_BHTR.to(k_BHTN.dtype)], dim=-1)
        if config.rope_scaling is not None:
            q_BHTQ = q_BHTQ * config.rope_scaling.score_scale
        out_BHTV = attend(q_BHTQ, k_BHTQ, v_BHTV)
        return self.o_proj(out_BHTV.transpose(1, 2).reshape(batch, length, -1))
