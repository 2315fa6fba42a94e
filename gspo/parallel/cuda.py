"""Settings of torch that a run on GPUs needs, made once at its start."""

from __future__ import annotations

import os

import torch

from gspo.compat import set_allocator

# Attention, the head and an optimizer are compiled anew for some shapes each. Beyond torch's 8 it
# would go on uncompiled, and FlexAttention then holds all scores: 12 GiB at 16,384 slots.
RECOMPILE_LIMIT = 64
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_device(device: torch.device) -> None:
    """Prepare this process for a device, before anything is on it; nothing for a CPU.

    What the environment says of the allocator stands.
    """
    if device.type != "cuda":
        return
    # cuDNN plans attention anew for every length of the keys, which grow token by token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Sums of bf16 products stay in float32: the sampler's products, of few rows, are those that
    # cuBLAS splits, so that its log-probabilities alone would be rounded more.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    torch.set_float32_matmul_precision("highest")  # TF32 would turn rotary tables by 1e-3
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        # Blocks that grow: keys and values do, and a fixed block is of no use to the next size.
        set_allocator("expandable_segments:True")
