"""The assumptions of a plan, in sentences."""

from __future__ import annotations

from gspo.config import Settings
from gspo.plan.layout import Layout, samples_here
from gspo.plan.machine import GIB, RESERVE


def assumptions(cfg: Settings, layout: Layout) -> list[str]:
    """Return the sentences for a config."""
    sentences = [
        f"documents of {layout.prompt_tokens} prompt and {layout.completion_tokens} completion "
        "tokens, all alike: a spread of lengths makes attention dearer. No prompt shared, no "
        "document dropped",
        f"{layout.documents_per_microbatch} documents in a microbatch; every token of a completion "
        "has a coefficient (f = 0), so the head takes 3 products where documents are whole and 4 "
        "where they span ranks",
        "rates are reached, not peaks; the optimizer takes no time",
        "FSDP2's gathers and reductions run behind the layers; gathers of keys and values, and the "
        "sync, do not",
    ]
    if layout.on_gpu:
        sentences.append(
            f"{RESERVE / GIB:.0f} GiB kept for the CUDA context and NCCL; gaps between blocks are "
            "those of one segment that grows; FlexAttention keeps no scores and no dense mask; the "
            "head widens no weights"
        )
    else:
        sentences.append(
            "dense masks where a bin holds several documents; all work and all ranks have the "
            "rates stated"
        )
    if cfg.compiles_layers:
        sentences.append(
            "compiled layers keep as much as others would, where they keep less; norms, rotations "
            "and activations take no time in them"
        )
    else:
        sentences.append("norms, rotations and activations read and write the device's memory")
    if cfg.fsdp_cpu_offload and layout.on_gpu:
        sentences.append(
            "fsdp_cpu_offload: weights, gradients and optimizer state are on the host; copies take "
            "no time"
        )
    sentences.append(_of_sampler(cfg))
    return sentences


def _of_sampler(cfg: Settings) -> str:
    if samples_here(cfg):
        return (
            "sampling: the longest prompts with the longest completions fill the cache; a token "
            "takes at least the reading of weights and cache, and the launches of its kernels"
        )
    return f"sampler {cfg.sampler['_component_']}: what it holds is not counted"
