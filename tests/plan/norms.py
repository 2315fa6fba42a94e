"""A decoder whose norms are torchtune's own, for what the fused ones save."""

from torchtune.modules import RMSNorm

from gspo.tiny import tiny_qwen2


class WideNorm(RMSNorm):
    """A subclass is left alone."""


def wide_norms():
    decoder = tiny_qwen2()
    for module in decoder.modules():
        if type(module) is RMSNorm:
            module.__class__ = WideNorm
    return decoder
