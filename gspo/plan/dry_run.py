"""One optimizer step of the real policy on a machine that is not there: what is allocated, computed and sent.

The model, FSDP2, the loss head, the objective and the optimizer are those of a run. Only the tensors are fake, and so
is the process group: nothing is allocated or sent, and this process is rank 0 of any number. FSDP2 needs a device that
torch was built for, so the tensors say that they are on the CPU. What a GPU does otherwise is put in its place:
attention that keeps no scores and no dense mask, a head that takes bf16 operands.

Not here: what a run holds beside its training step, which is arithmetic (:mod:`gspo.plan.estimate`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  the collectives on fake tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.optim import adam
from torchtune.modules import TransformerDecoder

from gspo.compat import mend_stochastic_rounding
from gspo.kernels import rows
from gspo.parallel.context import ContextAxis, Shard, split
from gspo.parallel.mesh import build_mesh, data_parallel_rank, fsdp_mesh
from gspo.plan.memory_tracker import (
    BUFFERS,
    GRADIENTS,
    IN_SYNC,
    IN_UPDATE,
    OPTIMIZER,
    WEIGHTS,
    Ledger,
    Transfer,
)
from gspo.policy.attention import document_mask
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.policy.sharding import shard_policy
from gspo.types import PackedBatch
from gspo.update import accumulate_gradients

CPU = torch.device("cpu")


_FEW = 4  # layers: the first, the last two, whose backwards hold the most, and one between


@dataclass(slots=True)
class Rehearsal:
    """What one optimizer step does on rank 0, which has the largest shard where they are uneven."""

    always: dict[str, int]  # bytes that are held all the time, by what they are
    peaks: dict[str, dict[str, int]]  # moment -> bytes by what they are, when their sum was largest
    operations: dict[
        str, float
    ]  # of one microbatch, by part; products of matrices without attention
    transfers: dict[
        str, list[Transfer]
    ]  # of "a microbatch", "the last microbatch", "an update", "a sync"
    kept: int = 0  # bytes that the layers keep for the backward without checkpointing
    kept_checkpointed: int = 0  # and with it
    num_parameters: int = 0
    num_labels: int = 0  # labelled tokens of a microbatch


@dataclass(frozen=True, slots=True)
class Options:
    """Of a run, as the recipe takes them from its config."""

    world_size: int
    device_type: str
    dtype: torch.dtype
    microbatch: PackedBatch
    build_decoder: Callable[[], TransformerDecoder]
    build_optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: nn.Module
    num_microbatches: int = 2
    chunk_size: int | None = None
    kernel: str = "auto"
    activation_checkpointing: bool = False
    reshard_after_forward: bool = True
    reduce_every_microbatch: bool = True
    replicate_size: int = 1
    context_size: int = 1


def rehearse(options: Options) -> Rehearsal:
    """One optimizer step, of which one microbatch stands for all, or two where they differ.

    Layers are alike, and everything grows evenly with their number: more than four are worked out from three and four.

    Raises:
        InputError: the mesh does not fit the number of ranks.
    """
    with _fake_ranks(options.world_size), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on a step that no one runs
        with FakeTensorMode():
            layers = options.build_decoder().layers
            shapes = {tuple(p.shape for p in layer.parameters()) for layer in layers}
        if len(layers) <= _FEW or len(shapes) > 1:
            return _rehearse(options, len(layers))
        return _extended(_rehearse(options, _FEW - 1), _rehearse(options, _FEW), len(layers) - _FEW)


def num_data_ranks(world_size: int, *, replicate_size: int, context_size: int) -> int:
    """Ranks that draw different prompts.

    Raises:
        InputError: the mesh does not fit the number of ranks.
    """
    with _fake_ranks(world_size):
        return data_parallel_rank(_mesh(replicate_size, context_size))[1]


def _mesh(replicate_size: int, context_size: int) -> DeviceMesh:
    return build_mesh(
        CPU, data_parallel_replicate_size=replicate_size, context_parallel_size=context_size
    )


def _extended(fewer: Rehearsal, more: Rehearsal, num_layers: int) -> Rehearsal:
    """What ``num_layers`` more layers than ``more`` has would do; ``fewer`` has one less."""

    def extend(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {
                key: extend(a.get(key, 0), value)
                for key, value in b.items()
                if key in a or b is not more.peaks
            }
        if isinstance(b, list):
            return [extend(x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(b, Transfer):
            return replace(
                b, calls=extend(a.calls, b.calls), num_bytes=extend(a.num_bytes, b.num_bytes)
            )
        return b + num_layers * (b - a)

    return Rehearsal(
        **{f.name: extend(getattr(fewer, f.name), getattr(more, f.name)) for f in fields(Rehearsal)}
    )


def _rehearse(options: Options, num_layers: int) -> Rehearsal:
    on_gpu = options.device_type != "cpu"
    mesh = _mesh(options.replicate_size, options.context_size)
    context, shards = ContextAxis.of(mesh), fsdp_mesh(mesh)
    shard = split(options.microbatch, context)
    num_rows, label_counts = int(shard.part.loss_mask.sum()), shard.whole.label_counts.tolist()
    with FakeTensorMode() as fake, _compiled_for_nothing():
        decoder = options.build_decoder()
        decoder.layers = decoder.layers[:num_layers]
        if on_gpu:
            _attend_as_on_gpu(decoder)
        kernel = "reference" if options.kernel == "reference" else "compile"
        policy = Policy(
            decoder, options.loss, chunk_size=options.chunk_size, kernel=kernel, context=context
        )
        num_parameters = sum(p.numel() for p in decoder.parameters())
        head_shape = decoder.tok_embeddings.weight.shape
        ledger = Ledger({p.shape for p in decoder.parameters()}, head_shape, on_gpu=on_gpu)
        with ledger:
            microbatch = _fake_microbatch(shard, num_rows, label_counts, fake, on_gpu=on_gpu)
        kept = _kept_by_a_layer(decoder, microbatch) * num_layers
        shard_policy(
            policy,
            shards,
            activation_checkpointing=options.activation_checkpointing,
            reshard_after_forward=options.reshard_after_forward,
        )
        _follow_layers(decoder, ledger)
        kept_checkpointed = (
            num_layers * microbatch.batch.tokens.numel() * head_shape[1] * options.dtype.itemsize
        )
        found = _step(policy, microbatch, options, ledger)
    return replace(
        found,
        kept=kept,
        kept_checkpointed=kept_checkpointed,
        num_parameters=num_parameters,
        num_labels=num_rows,
    )


def _follow_layers(decoder: TransformerDecoder, ledger: Ledger) -> None:
    """Lets the ledger know whose backward it is."""
    last = len(decoder.layers) - 1
    names = {
        1: " of the second layer",
        last - 1: " of the last layer but one",
        0: " of the first layer",
    }
    names[last] = " of the last layer"

    def hook(layer: nn.Module, args: Any, output: Tensor, name: str) -> None:
        output.register_hook(lambda _: setattr(ledger, "layer", name))

    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(partial(hook, name=names.get(i, f" of layer {i}")))


def _step(policy: Policy, microbatch: Microbatch, options: Options, ledger: Ledger) -> Rehearsal:
    optimizer = _make_optimizer(policy, options)
    ledger.adopt(policy.parameters(), WEIGHTS)
    ledger.adopt(policy.buffers(), BUFFERS)
    several = options.num_microbatches > 1
    with ledger:
        _make_state(policy, optimizer, ledger)
        if several and options.reduce_every_microbatch:  # of earlier microbatches
            for parameter in policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ledger.adopt((p.grad for p in policy.parameters() if p.grad is not None), GRADIENTS)
        for kept in (ledger.peaks, ledger.operations, ledger.transfers):
            kept.clear()
        names = ["a microbatch"] * (several and not options.reduce_every_microbatch) + [
            "the last microbatch"
        ]
        steps = accumulate_gradients(
            policy,
            [microbatch] * len(names),
            1.0,
            reduce_every_microbatch=options.reduce_every_microbatch,
        )
        operations: dict[str, float] = {}
        transfers: dict[str, list[Transfer]] = {}
        for name in names:
            ledger.layer = ""
            next(steps)
            operations = operations or dict(ledger.operations)
            transfers[name] = ledger.take_transfers()
        del steps
        always = {label: ledger.of(label) for label in (WEIGHTS, GRADIENTS, OPTIMIZER, BUFFERS)}
        ledger.phase = IN_UPDATE
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        transfers["an update"] = ledger.take_transfers()
        ledger.phase = IN_SYNC
        for _ in policy.full_state_dict():
            pass
        transfers["a sync"] = ledger.take_transfers()
    peaks = {moment: parts for moment, (_, parts) in ledger.peaks.items()}
    return Rehearsal(always, peaks, operations, transfers)


def _make_optimizer(policy: Policy, options: Options) -> torch.optim.Optimizer:
    mend_stochastic_rounding()
    optimizer = options.build_optimizer(policy.parameters())
    for group in optimizer.param_groups if options.device_type != "cpu" else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True  # torch's own choice on a GPU
    return optimizer


def _make_state(policy: Policy, optimizer: torch.optim.Optimizer, ledger: Ledger) -> None:
    """The optimizer's state, as from the second step on."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ledger.adopt(
        (t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)),
        OPTIMIZER,
    )


@contextlib.contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _compiled_for_nothing() -> Iterator[None]:
    """What a run compiles to one loop holds nothing here: the head's kernels and torchao's updates."""
    compiled, update = rows.compiled, adam.single_param_adam

    def statistics(
        logits: Tensor, labels: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_rows = logits.new_empty(3, logits.shape[0])
        return of_rows[0], of_rows[1], of_rows[2]

    def gradient(*args: Any) -> Tensor:
        return rows.gradient(*args, overwrite=lambda *_: None)

    kernels = replace(rows.PLAIN, statistics=statistics, gradient=gradient)
    rows.compiled = lambda: kernels  # type: ignore[assignment]
    adam.single_param_adam = lambda *_: None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        rows.compiled, adam.single_param_adam = compiled, update


def _attend_as_on_gpu(decoder: TransformerDecoder) -> None:
    """Attention that keeps queries, keys, values, its output and one number per row and head, as FlexAttention does."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Any, dropout_p: float, is_causal: bool
    ) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    for layer in decoder.layers:
        layer.attn._attention_call = attend


def _fake_microbatch(
    real: Shard, num_rows: int, label_counts: list[int], fake: FakeTensorMode, *, on_gpu: bool
) -> Microbatch:
    """As :meth:`Microbatch.prepare` makes it."""

    def faked(batch: PackedBatch) -> PackedBatch:
        tensors = {
            f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)
        }
        changed: dict[str, Any] = {
            name: fake.from_tensor(tensor) for name, tensor in tensors.items()
        }
        return replace(batch, **changed)

    shard = replace(
        real, whole=faked(real.whole), part=faked(real.part), places=fake.from_tensor(real.places)
    )
    if on_gpu:
        num_ranks, num_bins, share = shard.places.shape
        blocks = torch.zeros(num_bins, 1, -(-share // 128), dtype=torch.int32)
        indices = blocks[..., None].expand(*blocks.shape, -(-share * num_ranks // 128))
        mask: Any = BlockMask.from_kv_blocks(
            blocks, indices, seq_lengths=(share, share * num_ranks)
        )
    else:
        mask = document_mask(shard, CPU)
    return Microbatch(
        shard=shard,
        batch=shard.part,
        label_rows=torch.zeros(num_rows, dtype=torch.int64),
        label_counts=label_counts,
        counted=shard.counted,
        attention_mask=mask,
    )


def _kept_by_a_layer(decoder: TransformerDecoder, microbatch: Microbatch) -> int:
    """Bytes of what one layer keeps for its backward, each storage once, without parameters and the mask."""
    layer, batch = decoder.layers[0], microbatch.batch
    shared = [*layer.parameters(), *decoder.buffers()]
    if isinstance(microbatch.attention_mask, Tensor):
        shared.append(microbatch.attention_mask)
    known = {t.untyped_storage()._cdata for t in shared}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    hidden_size = decoder.tok_embeddings.weight.shape[1]
    weight = next(layer.parameters())
    x = weight.new_empty(batch.num_bins, batch.bin_length, hidden_size).requires_grad_()
    positions = batch.positions.view(batch.num_bins, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, mask=microbatch.attention_mask, input_pos=positions)
    return sum(storage.nbytes() for storage in kept.values())
