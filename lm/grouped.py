"""Grouped-query attention (arXiv 2305.13245) as Llama, Qwen2 and Qwen3 have it, with experts or without.

Shape suffixes: B batch, T tokens, D hidden size, H heads, G key-value heads, W head size.
"""

import torch
from torch import nn

from lm.causal import attend
from lm.config import GroupedShape
from lm.linear import Linear, together
from lm.norm import RMSNorm
from lm.rope import rotate_halves


class GroupedAttention(nn.Module):
    """Causal attention in which several heads share one head of keys and values."""

    def __init__(self, config: GroupedShape) -> None:
        super().__init__()
        self.config = config
        hidden, width, biases = config.hidden_size, config.head_dim, config.has_biases
        self.q_proj = Linear(hidden, config.num_attention_heads * width, biases)
        self.k_proj = Linear(hidden, config.num_key_value_heads * width, biases)
        self.v_proj = Linear(hidden, config.num_key_value_heads * width, biases)
        self.o_proj = Linear(config.num_attention_heads * width, hidden, config.attention_bias)
        if config.norms_heads:
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Returns [B, T, D]; ``cos`` and ``sin`` [T, W / 2] hold the rotations of the T positions."""
        batch, length, _ = x_BTD.shape
        parts = together(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHW, k_BTGW, v_BTGW = (part.view(batch, length, -1, self.config.head_dim) for part in parts)
        if self.config.norms_heads:
            q_BTHW, k_BTGW = self.q_norm(q_BTHW), self.k_norm(k_BTGW)
        q_BHTW, k_BGTW, v_BGTW = (part.transpose(1, 2) for part in (q_BTHW, k_BTGW, v_BTGW))
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        k_BHTW = rotate_halves(k_BGTW, cos, sin).to(v_BGTW.dtype).repeat_interleave(share, dim=1)
        q_BHTW = rotate_halves(q_BHTW, cos, sin).to(v_BGTW.dtype)
        out_BHTW = attend(q_BHTW, k_BHTW, v_BGTW.repeat_interleave(share, dim=1))
        return self.o_proj(out_BHTW.transpose(1, 2).reshape(batch, length, -1))
