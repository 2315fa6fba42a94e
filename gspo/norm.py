"""RMS norms in one kernel, for the trainer's decoder and the sampler's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import RMSNorm


class FusedRMSNorm(RMSNorm):
    """torchtune's ``RMSNorm`` without the copies to float32 and back.

    torch has one CUDA kernel for it, which computes in float32, but only where input and weight
    have the same dtype. torchtune's float32 copy of a bfloat16 input has another dtype than the
    weight: it takes eight kernels, conversions included.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input in its own dtype."""
        scale = self.scale
        if x.dtype != scale.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, weight=scale, eps=self.eps)


def fuse_norms(decoder: nn.Module) -> None:
    """Make every torchtune ``RMSNorm`` in a module a :class:`FusedRMSNorm`, in place.

    Parameters, their names and hooks stay. In float32 the numbers are the same; in bfloat16 they
    are within one rounding.
    """
    for module in decoder.modules():
        if type(module) is RMSNorm:
            module.__class__ = FusedRMSNorm
