"""The pack's own mask, draw and decode call, beside torch's where it has one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torchtune import training

from gpu_first_parts.documents import Texts, draw_groups, draw_prompts, pack
from gpu_first_parts.probes import measure_call
from gpu_first_parts.sizes import CONFIG
from gpu_first_parts.visit import Visit
from gspo.commands.validate import read_checked
from gspo.config import Settings, build
from gspo.parallel import split
from gspo.policy.mask import block_mask, mask_mod
from gspo.sampling.local import LocalSampler, draw_tokens
from gspo.types import SamplingParams


def read_settings(visit: Visit, *more: str) -> Settings:
    """Return the settings of the shipped config, with the sizes of the visit."""
    return read_checked([CONFIG, *visit.sizes.overrides, *more])


def block_masks(visit: Visit) -> dict[str, Any]:
    """Compare the pack's block mask with torch's, in time, memory and content."""
    cfg = read_settings(visit)
    batch, *_ = pack(cfg, draw_groups(cfg, cfg.docs_per_step))
    shard = split(batch, None)
    device = visit.device
    num_slots = batch.bin_length

    def torchs() -> Any:
        mod = mask_mod(shard, device)
        return create_block_mask(mod, batch.num_bins, None, num_slots, num_slots, device=device)

    ours = measure_call(visit, lambda: block_mask(shard, device))
    theirs = measure_call(visit, torchs)
    is_same = torch.equal(block_mask(shard, device).to_dense(), torchs().to_dense())
    return {
        "slots": num_slots,
        "documents": batch.num_documents,
        "ours": ours,
        "create_block_mask": theirs,
        "is_same": is_same,
        "says": f"{ours['ms']:.1f} ms and {ours['peak_beyond_mib']:.0f} MiB, torch's "
        f"{theirs['ms']:.1f} and {theirs['peak_beyond_mib']:.0f}; the same blocks: {is_same}",
    }


def draw(visit: Visit) -> dict[str, Any]:
    """Time the draw of one token for each row, and its memory for each entry of the logits."""
    num_rows, vocab_size = visit.sizes.decode_rows, visit.sizes.vocab_size
    logits = 3 * torch.randn(num_rows, vocab_size, device=visit.device)
    uniforms = torch.rand(num_rows, dtype=torch.float64, device=visit.device)
    result = measure_call(visit, lambda: draw_tokens(logits, uniforms, 0.6))
    entry_bytes = 4 + result["peak_beyond_mib"] * 2**20 / logits.numel()  # the logits' own are 4
    return result | {
        "bytes_per_entry": entry_bytes,
        "says": f"{result['ms']:.2f} ms, {entry_bytes:.0f} bytes an entry with the logits",
    }


def decode_attention(visit: Visit) -> dict[str, Any]:
    """Return which attention the sampler's decode steps end in, and in how many shapes.

    Two layers of the real width draw a few tokens behind prompts of different lengths.
    """
    cfg = read_settings(visit, "model.num_layers=2")
    with training.set_default_dtype(torch.bfloat16), visit.device:
        decoder = build(cfg, "model")
    sampler = LocalSampler(lambda: decoder, Texts(), stop_token_ids=[])
    prompts = draw_prompts(cfg, 2)
    params = SamplingParams(max_new_tokens=visit.sizes.profiled_steps)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        sampler.sample(prompts, group_size=cfg.group_size, params=params, seeds=[0, 1])
    counts: Counter[str] = Counter()
    shapes: dict[str, set[str]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::_") and "attention" in event.key:
            counts[event.key] += event.count
            shapes.setdefault(event.key, set()).add(str(event.input_shapes[:3]))
    num_shapes = {name: len(of_name) for name, of_name in shapes.items()}
    says = [f"{name} {count} times in {num_shapes[name]} shapes" for name, count in counts.items()]
    return {"calls": dict(counts), "shapes": num_shapes, "says": "; ".join(says)}
