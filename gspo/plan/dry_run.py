"""One optimizer step of the real policy on a machine that is not there.

The model, FSDP2, the loss head, the objective and the optimizer are those of a run. Only the
tensors are fake, and so is the process group: nothing is allocated or sent, and this process is
rank 0 of any number. FSDP2 needs a device that torch was built for, so the tensors say that they
are on the CPU. What a GPU does otherwise is put in its place: attention that keeps no scores and no
dense mask, a head that takes bf16 operands.

Not here: what a run holds beside its training step, which is arithmetic
(:mod:`gspo.plan.estimate`).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from gspo.compat import (
    join_fake_group,
    optimizer_without_arithmetic,
    patch_stochastic_rounding,
    rotary_scaling_without_arithmetic,
)
from gspo.decoder import keep_layers
from gspo.errors import NO_VALUE, InputError
from gspo.kernels import rows
from gspo.losses.inputs import Loss
from gspo.norm import FusedRMSNorm
from gspo.parallel import Ranks, Shard, split
from gspo.plan.memory_tracker import (
    BUFFERS,
    GRADIENTS,
    IN_SYNC,
    IN_UPDATE,
    KEYS,
    MASK,
    OPTIMIZER,
    WEIGHTS,
    MemoryTracker,
    Transfer,
    grouped_operands,
)
from gspo.policy import Microbatch, Policy, document_mask, shard_policy
from gspo.policy.attention import attend, over_ranks
from gspo.policy.mask import mask_mod
from gspo.types import PackedBatch
from gspo.update import accumulate_gradients, clip_gradients, step_if_finite

CPU = torch.device("cpu")

# Parts of an optimizer step that send something.
MICROBATCH = "a microbatch"
LAST_MICROBATCH = "the last microbatch"
UPDATE = "an update"
SYNC = "a sync"

# Layers that are run at most: the first, the last two, whose backwards hold the most, and one
# between.
_MAX_LAYERS = 4
_BLOCK = 128  # slots of a block of FlexAttention's mask


@dataclass(frozen=True, slots=True)
class DryRun:
    """The work of an optimizer step on rank 0, which has the largest shard if they are uneven."""

    always: dict[str, int]  # bytes that are held all the time, by what they are
    peaks: dict[str, dict[str, int]]  # moment -> bytes by what they are, when the sum was largest
    operations: dict[str, float]  # of a microbatch by part; products of matrices, no attention
    moved: dict[str, float]  # bytes of a microbatch by part, by loops over numbers
    transfers: dict[str, list[Transfer]]  # by part of the step, see MICROBATCH
    gaps: int  # bytes that a GPU's allocator has reserved beyond the largest peak
    kept: int = 0  # bytes that the layers keep for the backward without checkpointing
    kept_checkpointed: int = 0  # and with it
    num_parameters: int = 0
    num_labels: int = 0  # labelled tokens of a microbatch


@dataclass(frozen=True, slots=True)
class Options:
    """The part of a config that an optimizer step depends on."""

    world_size: int
    device_type: str
    dtype: torch.dtype
    microbatch: PackedBatch
    build_decoder: Callable[[], Any]
    build_optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: Loss
    num_microbatches: int = 2
    chunk_size: int | None = None
    kernel: str = "auto"
    activation_checkpointing: bool = False
    reshard_after_forward: bool = True
    reduce_every_microbatch: bool = True
    replicate_size: int = 1
    context_size: int = 1

    @property
    def on_gpu(self) -> bool:
        """Whether the step is one on a GPU."""
        return self.device_type != "cpu"


def dry_run(options: Options) -> DryRun:
    """Go through an optimizer step; one microbatch stands for all, or two where they differ.

    Layers are alike, and everything grows evenly with their number: more than four are worked out
    from three and four.

    Raises:
        InputError: The mesh does not fit the number of ranks, or the model does what depends on its
            tokens.
    """
    with _fake_step(options.world_size), _without_values():
        num_layers, are_alike = _layers(options)
        if num_layers <= _MAX_LAYERS or not are_alike:
            return _run(options, num_layers)
        fewer = _run(options, _MAX_LAYERS - 1)
        more = _run(options, _MAX_LAYERS)
        return _extrapolate(fewer, more, num_layers - _MAX_LAYERS)


def num_data_ranks(world_size: int, *, replicate_size: int, context_size: int) -> int:
    """Return the number of ranks that draw different prompts.

    Raises:
        InputError: The mesh does not fit the number of ranks.
    """
    with _fake_ranks(world_size):
        ranks = Ranks.of(CPU, replicate=replicate_size, context=context_size)
        return ranks.num_data_ranks


@contextlib.contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    join_fake_group(world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _fake_step(world_size: int) -> Iterator[None]:
    """Prepare this process for a step that no one runs."""
    quiet = warnings.catch_warnings(action="ignore")  # torch's remarks on it
    with _fake_ranks(world_size), quiet, rotary_scaling_without_arithmetic():
        yield


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Refuse a model whose operations depend on values, which fake tensors do not have."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        operation = error.func._overloadpacket
        must = f"cannot be planned: it does {operation}, which needs the values of tokens"
        remedy = "measure a short run in its place"
        raise InputError("model", NO_VALUE, must, remedy) from error


def _layers(options: Options) -> tuple[int, bool]:
    """Return the number of the model's layers, and whether they have the same shapes."""
    shapes = set()
    with FakeTensorMode():
        decoder = options.build_decoder()
        for layer in decoder.layers:
            of_layer = tuple(parameter.shape for parameter in layer.parameters())
            shapes.add(of_layer)
    num_layers = len(decoder.layers)
    are_alike = len(shapes) == 1
    return num_layers, are_alike


def _extrapolate(fewer: DryRun, more: DryRun, num_layers: int) -> DryRun:
    """Return what ``num_layers`` more layers than ``more`` has would do; ``fewer`` has one less."""
    line = _Line(num_layers)
    peaks = {}
    for moment, parts in more.peaks.items():
        if moment in fewer.peaks:
            peaks[moment] = line.numbers(fewer.peaks[moment], parts)
    transfers = {}
    for part, of_part in more.transfers.items():
        transfers[part] = line.transfers(fewer.transfers[part], of_part)
    return replace(
        more,
        always=line.numbers(fewer.always, more.always),
        peaks=peaks,
        operations=line.numbers(fewer.operations, more.operations),
        moved=line.numbers(fewer.moved, more.moved),
        gaps=max(fewer.gaps, more.gaps),  # they do not grow with the layers
        transfers=transfers,
        kept=line.number(fewer.kept, more.kept),
        kept_checkpointed=line.number(fewer.kept_checkpointed, more.kept_checkpointed),
        num_parameters=line.number(fewer.num_parameters, more.num_parameters),
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """Goes on from two values that are a layer apart."""

    num_layers: int  # after the second value

    def number(self, first: Any, second: Any) -> Any:
        of_a_layer = second - first
        return second + self.num_layers * of_a_layer

    def numbers(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Go on from each value; one that the first lacks was 0."""
        extended = {}
        for key, value in second.items():
            before = first.get(key, 0)
            extended[key] = self.number(before, value)
        return extended

    def transfers(self, first: list[Transfer], second: list[Transfer]) -> list[Transfer]:
        """Go on from each transfer; both lists have the same in the same order."""
        extended = []
        for before, transfer in zip(first, second, strict=True):
            calls = self.number(before.calls, transfer.calls)
            num_bytes = self.number(before.num_bytes, transfer.num_bytes)
            extended.append(replace(transfer, calls=calls, num_bytes=num_bytes))
        return extended


@dataclass(frozen=True, slots=True)
class _RealShard:
    """A rank's part of the microbatch, with what is read from its values before they are fake."""

    shard: Shard
    num_labels: int
    label_counts: list[int]

    @classmethod
    def of(cls, options: Options, ranks: Ranks) -> _RealShard:
        shard = split(options.microbatch, ranks.context)
        num_labels = int(shard.part.loss_mask.sum())
        label_counts = shard.whole.label_counts.tolist()
        return cls(shard, num_labels, label_counts)


def _run(options: Options, num_layers: int) -> DryRun:
    """Go through the step of a model with its first ``num_layers`` layers alone."""
    ranks = Ranks.of(CPU, replicate=options.replicate_size, context=options.context_size)
    mesh = ranks.fsdp_mesh
    real = _RealShard.of(options, ranks)
    with FakeTensorMode() as fake, _GroupedProducts(), _without_compiled_loops():
        policy = _build_policy(options, ranks, num_layers)
        decoder = policy.decoder
        num_parameters = policy.num_parameters
        tracker = _make_tracker(policy, options, ranks)
        with tracker:
            windows = getattr(decoder, "windows", (None,))
            microbatch = _fake_microbatch(real, fake, windows, on_gpu=options.on_gpu)
        kept = _kept_by_a_layer(policy, microbatch) * num_layers
        shard_policy(
            policy,
            mesh,
            activation_checkpointing=options.activation_checkpointing,
            reshard_after_forward=options.reshard_after_forward,
        )
        _follow_layers(decoder, tracker)
        step = _Step(policy, microbatch, options, tracker)
        result = step.run()
    hidden_bytes = decoder.tok_embeddings.weight.shape[1] * options.dtype.itemsize
    num_slots = microbatch.batch.tokens.numel()
    return replace(
        result,
        kept=kept,
        kept_checkpointed=num_layers * num_slots * hidden_bytes,
        num_parameters=num_parameters,
        num_labels=real.num_labels,
    )


def _build_policy(options: Options, ranks: Ranks, num_layers: int) -> Policy:
    decoder = options.build_decoder()
    keep_layers(decoder, num_layers)
    policy = Policy(
        decoder,
        options.loss,
        chunk_size=options.chunk_size,
        kernel="reference" if options.kernel == "reference" else "compile",
        context=ranks.context,
        attention=_attend_as_on_gpu if options.on_gpu else attend,
    )
    if options.on_gpu:
        for module in policy.modules():
            if isinstance(module, FusedRMSNorm):
                norm = partial(_NormAsOnGPU.apply, module.scale)
                module.forward = norm  # type: ignore[method-assign]
    return policy


def _make_tracker(policy: Policy, options: Options, ranks: Ranks) -> MemoryTracker:
    decoder = policy.decoder
    shapes = {parameter.shape for parameter in decoder.parameters()}
    head_shape = decoder.tok_embeddings.weight.shape
    tracker = MemoryTracker(shapes, head_shape, on_gpu=options.on_gpu)
    tracker.labels.add(_block_mask, MASK)
    tracker.labels.add(over_ranks(attend, ranks.context), KEYS)
    return tracker


def _follow_layers(decoder: Any, tracker: MemoryTracker) -> None:
    """Let the tracker know whose backward it is."""
    last = len(decoder.layers) - 1
    names = {
        1: " of the second layer",
        last - 1: " of the last layer but one",
        0: " of the first layer",
    }
    names[last] = " of the last layer"

    def follow(layer: nn.Module, args: Any, output: Tensor, name: str) -> None:
        def begin(_: Tensor) -> None:
            tracker.layer = name

        output.register_hook(begin)

    for i, layer in enumerate(decoder.layers):
        name = names.get(i, f" of layer {i}")
        hook = partial(follow, name=name)
        layer.register_forward_hook(hook)


class _Step:
    """An optimizer step, and the sync after it, under a tracker."""

    def __init__(
        self, policy: Policy, microbatch: Microbatch, options: Options, tracker: MemoryTracker
    ) -> None:
        self._policy = policy
        self._microbatch = microbatch
        self._options = options
        self._tracker = tracker
        self._optimizer = _make_optimizer(policy, options)
        self._transfers: dict[str, list[Transfer]] = {}

    def run(self) -> DryRun:
        """Go through it, as from the second step on."""
        tracker = self._tracker
        tracker.adopt(self._policy.parameters(), WEIGHTS)
        tracker.adopt(self._policy.buffers(), BUFFERS)
        with tracker:
            self._make_state()
            self._make_earlier_gradients()
            tracker.forget_past()
            operations, moved = self._accumulate()
            labels = (WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS)
            always = {label: tracker.held(label) for label in labels}
            self._update()
            self._sync()
        peaks = {}
        for moment, peak in tracker.peaks.items():
            peaks[moment] = peak.parts
        return DryRun(always, peaks, operations, moved, self._transfers, tracker.gaps)

    def _make_state(self) -> None:
        """Let the optimizer make its state."""
        optimizer = self._optimizer
        for parameter in self._policy.trained_parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tensors = []
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    tensors.append(value)
        self._tracker.adopt(tensors, OPTIMIZER)

    def _make_earlier_gradients(self) -> None:
        """Make the gradients that earlier microbatches have left, if they have."""
        options = self._options
        are_there = options.num_microbatches > 1 and options.reduce_every_microbatch
        if not are_there:
            return
        gradients = []
        for parameter in self._policy.trained_parameters():
            parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._tracker.adopt(gradients, GRADIENTS)

    def _accumulate(self) -> tuple[dict[str, float], dict[str, float]]:
        """Go through the backwards; return the operations, and the bytes moved, of the first."""
        options = self._options
        tracker = self._tracker
        names = [LAST_MICROBATCH]
        earlier_differ = options.num_microbatches > 1 and not options.reduce_every_microbatch
        if earlier_differ:
            names = [MICROBATCH, LAST_MICROBATCH]
        backwards = accumulate_gradients(
            self._policy,
            [self._microbatch] * len(names),
            1.0,
            reduce_every_microbatch=options.reduce_every_microbatch,
        )
        operations: dict[str, float] = {}
        moved: dict[str, float] = {}
        for name in names:
            tracker.layer = ""
            next(backwards)
            if not operations:
                operations = dict(tracker.operations)
                moved = dict(tracker.moved)
            self._transfers[name] = tracker.take_transfers()
        return operations, moved

    def _update(self) -> None:
        self._tracker.phase = IN_UPDATE
        grad_norm = clip_gradients(self._policy, math.inf)
        step_if_finite(self._optimizer, grad_norm)
        self._transfers[UPDATE] = self._tracker.take_transfers()

    def _sync(self) -> None:
        self._tracker.phase = IN_SYNC
        for _ in self._policy.full_state_dict():
            pass
        self._transfers[SYNC] = self._tracker.take_transfers()


class _GroupedProducts(TorchDispatchMode):
    """Products of experts by their shapes, in every dtype: fake tensors have them in bf16 alone.

    The shapes do not depend on which expert a token goes to.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **kwargs)
        left, right, offsets = grouped_operands(args, kwargs)
        shape = [left.shape[-2], right.shape[-1]]
        if left.dim() == right.dim():  # the gradient of weights: [H, T] and [T, F], of each expert
            shape = [offsets.numel(), *shape]
        return left.new_empty(shape)


def _make_optimizer(policy: Policy, options: Options) -> torch.optim.Optimizer:
    patch_stochastic_rounding()
    optimizer = options.build_optimizer(policy.trained_parameters())
    if options.on_gpu:
        for group in optimizer.param_groups:
            leaves_choice = group.get("foreach", False) is None
            if leaves_choice and not group.get("fused"):
                group["foreach"] = True  # torch's own choice on a GPU
    return optimizer


@contextlib.contextmanager
def _without_compiled_loops() -> Iterator[None]:
    """Replace what a run compiles to one loop, which holds nothing: parts of head and optimizer."""
    compiled = rows.compiled

    def statistics(
        logits: Tensor, labels: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows = logits.shape[0]
        of_rows = logits.new_empty(3, num_rows)
        return of_rows[0], of_rows[1], of_rows[2]

    def gradient(*args: Any) -> Tensor:
        return rows.gradient(*args, overwrite=lambda *_: None)

    kernels = replace(rows.PLAIN, statistics=statistics, gradient=gradient)
    rows.compiled = lambda: kernels  # type: ignore[assignment]
    try:
        with optimizer_without_arithmetic(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        rows.compiled = compiled


def _attend_as_on_gpu(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attend without a mask, which keeps for the backward what FlexAttention keeps.

    These are queries, keys, values, the output, and one number per row and head.
    """
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=is_grouped)


class _NormAsOnGPU(torch.autograd.Function):
    """A norm in one pass, which keeps its input and one number per row for the backward."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, x: Tensor) -> Tensor:
        row_numbers = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(scale, x, row_numbers)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        scale, x, _ = ctx.saved_tensors
        return torch.empty_like(scale), gradient * x


def _fake_microbatch(
    real: _RealShard, fake: FakeTensorMode, windows: Sequence[int | None], *, on_gpu: bool
) -> Microbatch:
    """Make what :meth:`Microbatch.prepare` does."""

    def to_fake(_: str, tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor)

    whole = real.shard.whole.map(to_fake)
    part = real.shard.part.map(to_fake)
    slots = fake.from_tensor(real.shard.slots)
    shard = replace(real.shard, whole=whole, part=part, slots=slots)
    label_rows = torch.zeros(real.num_labels, dtype=torch.int64)
    mask: Any = _block_mask(shard) if on_gpu else document_mask(shard, CPU)
    return Microbatch(
        shard=shard,
        batch=shard.part,
        label_rows=label_rows,
        label_counts=real.label_counts,
        counted=shard.counted,
        masks=dict.fromkeys(windows, mask),
    )


def _block_mask(shard: Shard) -> BlockMask:
    """Make a block mask of the sizes that a GPU has, with the slots and documents it looks up."""
    num_ranks, num_bins, length = shard.slots.shape
    num_queries = math.ceil(length / _BLOCK)
    whole_length = length * num_ranks
    num_keys = math.ceil(whole_length / _BLOCK)
    counts = torch.zeros(num_bins, 1, num_queries, dtype=torch.int32)
    indices = torch.zeros(num_bins, 1, num_queries, num_keys, dtype=torch.int32)
    looked_up = mask_mod(shard, CPU)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        mask_mod=looked_up,
        seq_lengths=(length, whole_length),
    )


def _kept_by_a_layer(policy: Policy, microbatch: Microbatch) -> int:
    """Return the bytes that a layer keeps for its backward, without parameters and masks."""
    decoder = policy.decoder
    layer = decoder.layers[0]
    shared = [*layer.parameters(), *decoder.buffers()]
    for mask in microbatch.masks.values():
        if isinstance(mask, Tensor):
            shared.append(mask)
    known = set()
    for tensor in shared:
        known.add(tensor.untyped_storage()._cdata)
    kept: dict[int, torch.UntypedStorage] = {}  # each storage once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with contextlib.ExitStack() as saving:  # it ends with the layer, or with what the layer raises
        begin = layer.register_forward_pre_hook(lambda *_: saving.enter_context(hooks))
        end = layer.register_forward_hook(lambda *_: saving.close())
        policy.hidden_states(microbatch)
    begin.remove()
    end.remove()
    return sum(storage.nbytes() for storage in kept.values())
