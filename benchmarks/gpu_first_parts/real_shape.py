"""The shipped 1.5B config with random weights: optimizer steps, a whole rollout, and switches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpu_first_parts import compilations
from gpu_first_parts.documents import draw_groups, draw_prompts, mean_tokens, pack
from gpu_first_parts.pack_probes import read_settings
from gpu_first_parts.rig import Rig, the_rig
from gpu_first_parts.visit import (
    MIB,
    Skipped,
    Visit,
    cudnn_attention,
    device_memory,
    peak_flops,
    peak_memory,
    reduced_sums,
    seconds,
)
from gspo.data.layout import group_documents, pack_documents
from gspo.plan.estimate import IN_SAMPLING, Planner
from gspo.plan.machine import DEFAULT_RATES, Machine
from gspo.policy import Microbatch
from gspo.sampling.local import LocalSampler
from gspo.types import Group, GroupBatch, PackedBatch

_NUM_STEPS = 4
_MOST_FLEX = 2  # compilations of FlexAttention: with gradients and without
# One side of a switch: its name, what sets it, and the sampler's options.
_Side = tuple[str, AbstractContextManager[None], dict[str, Any]]


def plan(visit: Visit) -> dict[str, Any]:
    """Return what ``python -m gspo plan`` expects of this device, for documents of these lengths.

    It has to be the first of its process: it makes a process group of its own.
    """
    cfg = read_settings(visit)
    mean = mean_tokens(_batches_of_a_step(cfg))
    rates = DEFAULT_RATES[visit.device.type]
    machine = Machine(memory=device_memory(visit.device), ranks_per_node=8, **rates)
    planned = Planner(cfg, machine, mean).plan(1)
    sums = {}
    for moment, parts in planned["memory"]["moments"].items():
        sums[moment] = sum(parts.values()) / MIB
    sampling_mib = sums.pop(IN_SAMPLING)
    documents = cfg.prompts_per_rollout * cfg.group_size
    shares = documents / cfg.docs_per_step * cfg.ppo_epochs  # of a rollout, that steps take
    rollout_seconds = shares * planned["time"]["sampling"]
    update_mib = max(sums.values())
    num_microbatches = planned["work"]["microbatches"]
    return {
        "mean_document_tokens": mean,
        "moments_mib": sums,
        "update_mib": update_mib,
        "sampling_mib": sampling_mib,
        "microbatch_s": planned["time"]["update"] / num_microbatches,
        "microbatch_operations": planned["work"]["total"] / num_microbatches,
        "rollout_s": rollout_seconds,
        "rates": rates,
        "says": f"update {update_mib:.0f} MiB, sampling {sampling_mib:.0f} MiB and "
        f"{rollout_seconds:.3g} s a rollout",
    }


def _batches_of_a_step(cfg: Any) -> list[PackedBatch]:
    return pack(cfg, draw_groups(cfg, cfg.docs_per_step))


def steps(visit: Visit) -> dict[str, Any]:
    """Take four short optimizer steps on microbatches of different masks; count compilations."""
    compilations.forget()
    rig = the_rig(visit)
    batches = pack(rig.cfg, draw_groups(rig.cfg, visit.sizes.short_documents))
    microbatches = rig.prepare(batches)
    taken = [_timed_step(rig, microbatches) for _ in range(_NUM_STEPS)]
    compiled = compilations.describe()
    num_flex = compiled["flex_attention"]
    is_finite = all(math.isfinite(step["grad_norm"]) for step in taken)
    times = ", ".join(f"{step['seconds']:.2f}" for step in taken)
    return {
        "microbatches": len(microbatches),
        "steps": taken,
        "compiled": compiled,
        "few_flex_compilations": num_flex <= _MOST_FLEX,
        "finite": is_finite,
        "says": f"{times} s; FlexAttention compiled {num_flex} times (at most {_MOST_FLEX}), all "
        f"of it {compiled['seconds']:.0f} s; gradients finite: {is_finite}",
    }


def _timed_step(rig: Rig, microbatches: list[Microbatch]) -> dict[str, float]:
    values: dict[str, float] = {}

    def call() -> None:
        values.update(rig.step(microbatches))

    duration = seconds(call, rig.device)
    return {"seconds": duration, **values}


def split_sums(visit: Visit) -> dict[str, Any]:
    """Compare the sampler's log-probabilities with the trainer's, bf16 sums rounded or not.

    The sampler's products have few rows, which cuBLAS splits; the trainer's have many.
    """
    rig = _synced_rig(visit)
    sides = {}
    for name, is_reduced in (("in float32", False), ("rounded to bf16", True)):
        with reduced_sums(is_reduced):
            sides[name] = _mismatch(rig)
    says = [f"{name}: {_mismatch_in_words(side)}" for name, side in sides.items()]
    return {"sums": sides, "clip_low": rig.cfg.loss["clip_low"], "says": "; ".join(says)}


def _mismatch_in_words(side: dict[str, float]) -> str:
    return (
        f"rms {side['rms']:.1e} nats, max {side['max']:.1e}, of a document's mean "
        f"{side['document_rms']:.1e}"
    )


def _synced_rig(visit: Visit) -> Rig:
    """Return the rig, its sampler with the policy's weights.

    Without an optimizer step, where one has failed: a rollout can be measured all the same.
    """
    rig = the_rig(visit)
    rig.give_weights()
    return rig


def _mismatch(rig: Rig) -> dict[str, float]:
    """Return the differences of sampled tokens' log-probabilities, in nats."""
    cfg = rig.cfg
    prompts = draw_prompts(cfg, 2)
    groups = rig.sample(
        rig.sampler,
        prompts,
        group_size=cfg.group_size,
        new_tokens=rig.visit.sizes.mismatch_tokens,
    )
    rollout = GroupBatch(
        [Group(i, *pair) for i, pair in enumerate(zip(prompts, groups, strict=True))]
    )
    packed = pack_documents(group_documents(rollout), cfg.packing.bin_length)
    microbatch = Microbatch.prepare(packed, rig.device, rig.ranks.context)
    logps = rig.policy.logps(microbatch)
    mask = microbatch.batch.loss_mask
    difference = (logps - microbatch.batch.old_logps)[mask].double()
    documents = microbatch.batch.document_index[mask]
    sums = difference.new_zeros(packed.num_documents).index_add(0, documents, difference)
    means = sums / documents.bincount(minlength=packed.num_documents)
    return {
        "tokens": difference.numel(),
        "mean_logp": float(logps[mask].mean()),
        "mean": float(difference.mean()),
        "rms": float(difference.square().mean().sqrt()),
        "max": float(difference.abs().max()),
        "document_rms": float(means.square().mean().sqrt()),
    }


def cudnn(visit: Visit) -> dict[str, Any]:
    """Time decode steps with cuDNN's attention off, as the pack has it, and on."""
    rig = _synced_rig(visit)
    sides: list[_Side] = []
    for name, is_on in (("off", False), ("on", True)):
        sides.append((name, cudnn_attention(is_on), {}))
    return _compare_decodes(rig, "cudnn", sides)


def cuda_graphs(visit: Visit) -> dict[str, Any]:
    """Time decode steps launched one by one, and as CUDA graphs."""
    if not visit.on_cuda:
        raise Skipped("CUDA graphs need a CUDA device")
    rig = _synced_rig(visit)
    sides: list[_Side] = []
    for name, is_on in (("off", False), ("on", True)):
        sides.append((name, nullcontext(), {"cuda_graphs": is_on}))
    return _compare_decodes(rig, "cuda_graphs", sides)


def _compare_decodes(rig: Rig, name: str, sides: Iterable[_Side]) -> dict[str, Any]:
    """Time the same draw under each side, the second time too: what it prepares is done then."""
    timed = {}
    for side, switch, options in sides:
        with switch:
            sampler = rig.make_sampler(**options)
            first = _decode_seconds(rig, sampler)
            timed[side] = {"first_s": first, "s": _decode_seconds(rig, sampler)}
        rig.visit.note(name, **{side: timed[side]})
    says = []
    for side, times in timed.items():
        says.append(f"{side}: {times['first_s']:.2f} s, again {times['s']:.2f}")
    num_tokens = rig.visit.sizes.switch_tokens
    return {"tokens": num_tokens, "sides": timed, "says": "; ".join(says)}


def _decode_seconds(rig: Rig, sampler: LocalSampler, new_tokens: int | None = None) -> float:
    """Return the seconds of a rollout of so many tokens; None: of a switch's."""
    cfg = rig.cfg
    prompts = draw_prompts(cfg, cfg.prompts_per_rollout)
    num_tokens = new_tokens or rig.visit.sizes.switch_tokens

    def call() -> None:
        rig.sample(sampler, prompts, group_size=cfg.group_size, new_tokens=num_tokens)

    return seconds(call, rig.device)


def rollout(visit: Visit) -> dict[str, Any]:
    """Draw a whole rollout, every completion as long as can be, and compare it with the plan."""
    rig = _synced_rig(visit)
    cfg = rig.cfg
    new_tokens = cfg.sampling.max_new_tokens
    with peak_memory(visit.device) as peak:
        duration = _decode_seconds(rig, rig.sampler, new_tokens)
    num_tokens = cfg.prompts_per_rollout * cfg.group_size * new_tokens
    tokens_per_s = num_tokens / duration
    planned = visit.earlier("plan")
    against = {}
    if planned is not None:
        against["memory"] = peak.allocated / planned["sampling_mib"]
        against["seconds"] = duration / planned["rollout_s"]
    return peak.describe() | {
        "seconds": duration,
        "tokens_per_s": tokens_per_s,
        "optimizer_has_state": rig.num_steps > 0,  # the plan counts it
        "measured_to_planned": against,
        "says": f"{duration:.1f} s, {tokens_per_s:,.0f} tokens/s, peak {peak.allocated:.0f} MiB, "
        f"{peak.reserved:.0f} reserved{_against_in_words(against)}",
    }


def _against_in_words(against: dict[str, float]) -> str:
    ratios = [f"{name} {ratio:.2f}" for name, ratio in against.items()]
    return f"; of the plan's: {', '.join(ratios)}" if ratios else "; there is no plan"


def update_compiled(visit: Visit) -> dict[str, Any]:
    """Take whole updates with compiled layers."""
    return _updates(visit, compiles=True)


def update_eager(visit: Visit) -> dict[str, Any]:
    """Take whole updates with layers as they are."""
    return _updates(visit, compiles=False)


def _updates(visit: Visit, *, compiles: bool) -> dict[str, Any]:
    """Take two optimizer steps over all documents, the second of which is measured."""
    compilations.forget()
    rig = the_rig(visit, compiles=compiles)
    batches = _batches_of_a_step(rig.cfg)
    microbatches = rig.prepare(batches)
    first = seconds(lambda: rig.step(microbatches), visit.device)
    with peak_memory(visit.device) as peak:
        duration = seconds(lambda: rig.step(microbatches), visit.device)
    num_slots = sum(batch.tokens.numel() for batch in batches)
    num_parameters = sum(parameter.numel() for parameter in rig.policy.parameters())
    peak_rate = peak_flops(visit.device)
    mfu = 6 * num_parameters * num_slots / duration / peak_rate if peak_rate else None
    against = _against_plan(visit, peak.allocated, duration / len(microbatches))
    return peak.describe() | {
        "allocated_before_rig_mib": rig.before_mib,
        "microbatches": len(microbatches),
        "slots": num_slots,
        "first_s": first,
        "seconds": duration,
        "tokens_per_s": num_slots / duration,
        "mfu": mfu,
        "compiled": compilations.describe(),
        "measured_to_planned": against,
        "says": f"{duration:.2f} s after {first:.2f}, {num_slots / duration:,.0f} tokens/s, MFU "
        f"{mfu or math.nan:.3f}, peak {peak.allocated:.0f} MiB{_against_in_words(against)}",
    }


def _against_plan(visit: Visit, mib: float, microbatch_seconds: float) -> dict[str, float]:
    planned = visit.earlier("plan")
    if planned is None:
        return {}
    return {
        "memory": mib / planned["update_mib"],
        "seconds": microbatch_seconds / planned["microbatch_s"],
    }
