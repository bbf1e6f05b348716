"""Root mean square normalization (arXiv 1910.07467), in fp32 whatever the precision around it."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last axis; [..., D] of any float type to [..., D] in the weight's type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
