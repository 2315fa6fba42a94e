"""Memory, operations and expected times of an optimizer step, from a config and a machine.

All are those of one rank. Not here: what the training step itself holds and does, which
:mod:`gspo.plan.dry_run` finds by going through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch

from gspo.config import Settings, build
from gspo.kernels import choose_kernel
from gspo.plan import memory_tracker as labels
from gspo.plan.assumptions import assumptions
from gspo.plan.dry_run import DryRun, Options, dry_run
from gspo.plan.layout import Layout, build_decoder, rows_at_once, samples_here
from gspo.plan.machine import RESERVE, Machine
from gspo.plan.transfers import seconds_by_purpose, step_transfers
from gspo.sampling.kv_cache import COLUMN_BLOCK
from gspo.sampling.local import DRAW_BYTES
from gspo.types import PackedBatch

ATTENTION_BACKWARD = 2.5  # five products where the forward has two

_DECODE_LAUNCHES = 16  # of a layer and token, at most: the sampler's tests count them

SAMPLER_COPY = "the sampler's copy of the weights"
SAMPLER_CACHE = "the sampler's keys and values"
SAMPLER_DRAW = "the sampler's distribution"
REFERENCE = "reference policy, sharded"
SAMPLED = "weights that sampled, for old_logps: recompute, sharded"
GAPS = "gaps between the allocator's blocks"
IN_SAMPLING = "sampling"
ON_HOST = (labels.WEIGHTS, labels.GRADIENTS, labels.OPTIMIZER)  # with fsdp_cpu_offload

Parts = dict[str, int]  # bytes by what they are


class Planner:
    """Plans one config on one machine; no step is gone through twice.

    Args:
        cfg: The settings that the recipe starts with.
        machine: What a rank has and reaches.
        mean_document_tokens: Of prompt and completion; None guesses.
    """

    def __init__(
        self, cfg: Settings, machine: Machine, mean_document_tokens: int | None = None
    ) -> None:
        self.cfg = cfg
        self._machine = machine
        self._mean_document_tokens = mean_document_tokens
        self._dry_runs: dict[str, DryRun] = {}

    def plan(self, world_size: int, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return memory, work, transfers and time of a step, in bytes, operations and seconds.

        Args:
            world_size: Ranks.
            changes: Values by key that differ from the config.

        Raises:
            InputError: The config cannot run on so many ranks, or its documents do not fit its
                bins.
        """
        cfg = self.cfg.changed(changes or {})
        layout = self.layout(world_size, cfg)
        run = self._dry_run(cfg, layout)
        machine = self._machine
        work = _work(cfg, layout, run)
        transfers = step_transfers(cfg, layout, run, machine)
        return {
            "world_size": world_size,
            "device": cfg.device,
            "layout": layout.describe() | {"parameters": run.num_parameters},
            "memory": _memory(cfg, layout, run, machine.memory),
            "work": work,
            "transfers": transfers,
            "time": _time(cfg, layout, work, transfers, machine),
            "machine": asdict(machine),
            "assumptions": assumptions(cfg, layout),
        }

    def layout(self, world_size: int, cfg: Settings | None = None) -> Layout:
        """Return the layout of the config, or of a changed one.

        Raises:
            InputError: See :meth:`plan`.
        """
        return Layout.of(cfg or self.cfg, world_size, self._mean_document_tokens)

    def _dry_run(self, cfg: Settings, layout: Layout) -> DryRun:
        options = _options(cfg, layout)
        facts = (_plain_options(options), layout.describe(), cfg.model, cfg.optimizer)
        key = repr(facts)
        if key not in self._dry_runs:
            self._dry_runs[key] = dry_run(options)
        return self._dry_runs[key]


def _options(cfg: Settings, layout: Layout) -> Options:
    return Options(
        world_size=layout.world_size,
        device_type=cfg.device,
        dtype=layout.dtype,
        microbatch=layout.microbatch,
        build_decoder=partial(build_decoder, cfg),
        build_optimizer=partial(build, cfg, "optimizer"),
        loss=build(cfg, "loss"),
        num_microbatches=layout.num_microbatches,
        chunk_size=layout.chunk_size,
        kernel=choose_kernel(cfg.kernel, cfg.device, layout.vocab_size),
        activation_checkpointing=cfg.enable_activation_checkpointing,
        reshard_after_forward=cfg.fsdp_reshard_after_forward,
        reduce_every_microbatch=cfg.reduce_every_microbatch,
        replicate_size=cfg.data_parallel_replicate_size,
        context_size=cfg.context_parallel_size,
    )


def _plain_options(options: Options) -> dict[str, Any]:
    """Return the options that a text tells apart."""
    plain = {}
    for field in fields(options):
        value = getattr(options, field.name)
        is_plain = not callable(value) and not isinstance(value, PackedBatch)
        if is_plain:
            plain[field.name] = value
    return plain


@dataclass(frozen=True, slots=True)
class _Beside:
    """The bytes that a run holds beside its training step."""

    always: Parts
    sampling: Parts  # while the in-process sampler draws

    @classmethod
    def of(cls, cfg: Settings, layout: Layout, run: DryRun) -> _Beside:
        always: Parts = {}
        sampling: Parts = {}
        if cfg.reference_checkpointer is not None:
            always[REFERENCE] = run.always[labels.WEIGHTS]
        if cfg.keeps_sampled_weights:
            always[SAMPLED] = run.always[labels.WEIGHTS]
        if samples_here(cfg):
            always[SAMPLER_COPY] = _sampler_copy(layout, run)
            sampling = _sampling(cfg, layout)
        return cls(always, sampling)


def _memory(cfg: Settings, layout: Layout, run: DryRun, limit: int) -> dict[str, Any]:
    """Return bytes by moment and part, and whether the largest moment fits."""
    beside = _Beside.of(cfg, layout, run)
    moments = _moments(cfg, layout, run, beside)
    sums = {}
    for moment, parts in moments.items():
        sums[moment] = sum(parts.values())
    peak = max(sums, key=sums.__getitem__)
    num_bytes = sums[peak]
    reserve = RESERVE if layout.on_gpu else 0
    return {
        "always": run.always | beside.always,
        "moments": moments,
        "peak": {"moment": peak, "bytes": num_bytes, "parts": moments[peak]},
        "activations": {
            "checkpointing": cfg.enable_activation_checkpointing,
            "kept_without_checkpointing": run.kept,
            "kept_with_checkpointing": run.kept_checkpointed,
        },
        "reserve": reserve,
        "limit": limit,
        "fits": num_bytes + reserve <= limit,
    }


def _moments(cfg: Settings, layout: Layout, run: DryRun, beside: _Beside) -> dict[str, Parts]:
    # With prefetch, sampling goes on in a thread, at any moment.
    meanwhile = beside.sampling if cfg.prefetch else {}
    moments = {}
    for moment, parts in run.peaks.items():
        moments[moment] = parts | beside.always | meanwhile
        if layout.on_gpu:
            moments[moment][GAPS] = run.gaps
    if beside.sampling:
        resting = {}
        for label in (labels.WEIGHTS, labels.OPTIMIZER, labels.BUFFERS):
            resting[label] = run.always[label]
        moments[IN_SAMPLING] = resting | beside.always | beside.sampling
    if cfg.fsdp_cpu_offload and layout.on_gpu:
        for parts in moments.values():
            for label in ON_HOST:
                parts.pop(label, None)
    return moments


def _sampler_copy(layout: Layout, run: DryRun) -> int:
    """Return bytes of weights, packed ones too, and of two rotary tables, one the model's."""
    table = layout.max_seq_len * 2 * layout.head_dim * 4
    weights = layout.weight_bytes + layout.packed_bytes
    return weights + run.always[labels.BUFFERS] + table


def _sampling(cfg: Settings, layout: Layout) -> Parts:
    """Return what the in-process sampler holds: the longest prompts with longest completions."""
    num_rows = rows_at_once(cfg, layout)
    longest_prompt = cfg.prompts.get("max_prompt_tokens") or layout.prompt_tokens
    block = COLUMN_BLOCK["cuda"] if layout.on_gpu else 1
    num_columns = -(-(longest_prompt + cfg.sampling.max_new_tokens) // block) * block
    slot_bytes = layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
    num_tables = 2 * layout.num_layers + 1  # and one while it is copied to grow
    cache = num_tables * num_rows * num_columns * slot_bytes
    draw = num_rows * layout.vocab_size * DRAW_BYTES
    is_widened = not layout.on_gpu and layout.dtype is not torch.float32
    if is_widened:
        draw += layout.vocab_size * layout.hidden_size * 4  # the head's weight
    return {SAMPLER_CACHE: cache, SAMPLER_DRAW: draw}


def _work(cfg: Settings, layout: Layout, run: DryRun) -> dict[str, Any]:
    """Return operations of a step on a rank, and the bytes that loops over numbers move.

    A product of n numbers with n others is 2 n. Layers that are not compiled have a loop for each
    norm, rotation and activation of theirs, with its input and output in the device's memory.
    """
    pairs = 4.0 * _attended_pairs(layout) * layout.num_layers * layout.num_heads
    attention = pairs * layout.head_dim / layout.context_size
    num_passes = 1 + ATTENTION_BACKWARD + bool(cfg.enable_activation_checkpointing)
    products = run.operations
    head = products.get(labels.HEAD, 0.0)
    of_microbatch = {
        "decoder forward": products.get(labels.FORWARD, 0.0),
        "decoder forward again, checkpointed": products.get(labels.RECOMPUTED, 0.0),
        "decoder backward": products.get(labels.BACKWARD, 0.0),
        "loss head": head,
        "attention": num_passes * attention,
    }
    of_step = {}
    for name, count in of_microbatch.items():
        of_step[name] = count * layout.num_microbatches
    moved = 0.0
    if not cfg.compiles_layers:
        for part in (labels.FORWARD, labels.RECOMPUTED, labels.BACKWARD):
            moved += run.moved.get(part, 0.0) * layout.num_microbatches
    head_product = 2.0 * run.num_labels * layout.hidden_size * layout.vocab_size
    return {
        "microbatches": layout.num_microbatches,
        "operations": of_step,
        "total": sum(of_step.values()),
        "moved": moved,
        "head_units": head / head_product,
    }


def _attended_pairs(layout: Layout) -> float:
    """Return queries times keys of a microbatch.

    A dense mask has the whole square of a bin, a block mask half of each document's.
    """
    if not layout.on_gpu:
        microbatch = layout.microbatch
        pairs_of_bin = microbatch.bin_length**2
        return float(microbatch.num_bins * pairs_of_bin)
    num_slots = layout.prompt_tokens + layout.completion_tokens - 1
    return layout.documents_per_microbatch * num_slots**2 / 2


def _time(
    cfg: Settings,
    layout: Layout,
    work: Mapping[str, Any],
    transfers: list[dict[str, Any]],
    machine: Machine,
) -> dict[str, Any]:
    """Return expected seconds of a step. FSDP2 sends while layers compute; the rest waits."""
    seconds = seconds_by_purpose(transfers)
    products = work["total"] / (machine.tflops * 1e12)
    loops = work["moved"] / (machine.memory_gbytes * 1e9)
    compute = products + loops
    fsdp = seconds["weights of layers and head"] + seconds["gradients"]
    keys_and_values = seconds["keys and values"]
    rest = keys_and_values + seconds["counts and norms"]
    expected = {
        "products": products,
        "loops": loops,
        "fsdp": fsdp,
        "keys_and_values": keys_and_values,
        "update": max(compute, fsdp) + rest,
        "update_without_overlap": compute + fsdp + rest,
        "sync": seconds["weights for the sampler"],
    }
    if samples_here(cfg):
        expected["sampling"] = _sampling_seconds(cfg, layout, machine)
    return expected


def _sampling_seconds(cfg: Settings, layout: Layout, machine: Machine) -> float:
    """Return the least time of a step's share of a rollout.

    A token reads weights and cache, and takes no less than its kernels' launches.
    """
    num_rows = rows_at_once(cfg, layout)
    num_batches = -(-layout.rollout_documents // num_rows)
    max_new_tokens = cfg.sampling.max_new_tokens
    num_columns = layout.prompt_tokens + max_new_tokens / 2
    head_bytes = layout.head_dim * layout.dtype.itemsize
    token_bytes = 2 * layout.num_layers * layout.num_kv_heads * head_bytes
    cache_bytes = num_rows * num_columns * token_bytes
    read = layout.weight_bytes + cache_bytes
    num_tokens = num_batches * max_new_tokens
    reading = read / (machine.memory_gbytes * 1e9)
    launching = layout.num_layers * _DECODE_LAUNCHES * machine.launch_us * 1e-6
    if cfg.sampler.get("cuda_graphs"):
        launching = 0.0
    rollout = num_tokens * max(reading, launching)
    documents = cfg.prompts_per_rollout * cfg.group_size
    of_step = rollout * cfg.docs_per_step / documents
    return of_step / cfg.ppo_epochs
