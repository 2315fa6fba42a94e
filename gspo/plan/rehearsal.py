"""One optimizer step of the real policy on a machine that is not there: what is allocated, computed and sent.

The model, FSDP2, the loss head, the objective and the optimizer are those of a run. Only the tensors are fake, and so
is the process group: nothing is allocated or sent, and this process is rank 0 of any number. FSDP2 needs a device that
torch was built for, so the tensors say that they are on the CPU. What a GPU does otherwise is put in its place:
attention that keeps no scores and no dense mask, a head that takes bf16 operands.

Not here: what a run holds beside its training step, which is arithmetic (:mod:`gspo.plan.memory`).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  the collectives on fake tensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchao.optim import adam
from torchtune.modules import TransformerDecoder

from gspo.context import ContextAxis, Shard, split
from gspo.kernels import rows
from gspo.optim import mend_stochastic_rounding
from gspo.parallel import build_mesh, data_parallel_rank, fsdp_mesh
from gspo.policy import Microbatch, Policy, accumulate_gradients, document_mask, shard_policy
from gspo.types import PackedBatch

CPU = torch.device("cpu")
_FEW = 4  # layers: the first, the last two, whose backwards hold the most, and one between
aten = torch.ops.aten

# Where a tensor is made says what it is; the nearest of these on the stack counts.
WEIGHTS = "weights, sharded"
GRADIENTS = "gradients, sharded"
OPTIMIZER = "optimizer state, sharded"
BUFFERS = "rotary tables"
GATHERED = "gathered weights"
GATHERING = "buffers of all-gathers"
UNREDUCED = "gradients not yet reduced"
REDUCING = "buffers of reduce-scatters"
KEYS = "gathered keys and values"
HEAD = "head: other"
HEAD_LOGITS = "head: logits of a chunk"
HEAD_WEIGHT = "head: gradient of its weight"
HEAD_HIDDEN = "head: gradient of hidden states"
MASK = "attention mask"
ACTIVATIONS = "activations kept for the backward"
RECOMPUTED = "activations of the layer in its backward"
BACKWARD = "gradients of activations"
UPDATE = "temporaries of the optimizer"
SYNC = "one full parameter"
_SHADOW = "not there: a DTensor's shapes being worked out"

_SITES = {  # (file, function) of torch, of torchtune or of this pack
    ("_fsdp_collectives.py", "foreach_all_gather"): GATHERING,
    ("_fsdp_param.py", "init_all_gather_outputs"): GATHERED,
    ("_fsdp_param.py", "alloc_all_gather_outputs"): GATHERED,
    ("_fsdp_collectives.py", "foreach_reduce"): REDUCING,
    ("context.py", "attend_to_all"): KEYS,
    ("policy.py", "document_mask"): MASK,
    ("policy.py", "full_state_dict"): SYNC,
    ("checkpoint.py", "recompute_fn"): RECOMPUTED,
    ("graph.py", "_engine_run_backward"): BACKWARD,
}
FORWARD = "the forward"
IN_HEAD = "the loss head"
IN_BACKWARD = "the backward"
IN_UPDATE = "the optimizer's update"
IN_SYNC = "the sync to the sampler"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Collectives of one kind on one group: how often, and the bytes of the larger of input and output in sum."""

    purpose: str
    kind: str  # all-gather, reduce-scatter, all-reduce
    group_size: int
    calls: int
    num_bytes: int


@dataclass(slots=True)
class Rehearsal:
    """What one optimizer step does on rank 0, which has the largest shard where they are uneven."""

    always: dict[str, int]  # bytes that are held all the time, by what they are
    peaks: dict[str, dict[str, int]]  # moment -> bytes by what they are, when their sum was largest
    operations: dict[str, float]  # of one microbatch, by part; products of matrices without attention
    transfers: dict[str, list[Transfer]]  # of "a microbatch", "the last microbatch", "an update", "a sync"
    kept: int = 0  # bytes that the layers keep for the backward without checkpointing
    kept_checkpointed: int = 0  # and with it
    num_parameters: int = 0
    num_labels: int = 0  # labelled tokens of a microbatch


@cache
def _site(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    if path.parts[-3:-1] == ("gspo", "kernels"):
        return HEAD
    if path.name == "_sharding_prop.py":
        return _SHADOW
    return _SITES.get((path.name, code.co_name))


def _sites() -> list[str]:
    """What of :data:`_SITES` is on the stack, the innermost first."""
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        if (site := _site(frame.f_code)) is not None:
            found.append(site)
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Ledger(TorchDispatchMode):
    """Follows every storage from its making to its end, and counts operations and collectives on the way.

    Args:
        shapes: of the whole parameters, by which a gradient is known.
        head_shape: [V, H].
        on_gpu: leaves out what only a CPU does.
    """

    def __init__(self, shapes: set[torch.Size], head_shape: torch.Size, *, on_gpu: bool) -> None:
        super().__init__()
        self._shapes, self._head_shape, self._on_gpu = shapes, head_shape, on_gpu
        self._held: dict[int, tuple[weakref.ref, int, str]] = {}
        self._live: Counter[str] = Counter()
        self._total = 0
        self._copied_in = False  # the last thing made was the input of a reduce-scatter: what follows is its output
        self.phase = FORWARD
        self.layer = ""  # whose backward it is
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self.operations: defaultdict[str, float] = defaultdict(float)
        self.transfers: defaultdict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])

    def adopt(self, tensors: Iterable[Tensor], label: str) -> None:
        """Counts tensors that were there before."""
        for tensor in tensors:
            for plain in _plain(tensor):
                self._settle(plain.untyped_storage(), label)

    def take_transfers(self) -> list[Transfer]:
        """What has been sent since the last call."""
        found = [Transfer(*key, *counts) for key, counts in self.transfers.items()]
        self.transfers.clear()
        return found

    def of(self, label: str) -> int:
        """Bytes that are held under a label now."""
        return self._live[label]

    def __enter__(self) -> Ledger:
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:  # FSDP2's way to free
            found = resize(storage, size)
            if storage._cdata in self._held:
                self._settle(storage, self._held[storage._cdata][2])
                self._compare(self._moment(_sites()))
            return found

        torch.UntypedStorage.resize_ = resize_  # type: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t not in (Tensor, nn.Parameter, FakeTensor) for t in types):
            return NotImplemented  # a tensor made of others: these come next
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # a value, which fake tensors do not have: flags are set
            return True if args[0].dtype is torch.bool else 1
        if func is aten.nonzero.default:  # every row has a coefficient: f is 0
            out = torch.arange(args[0].numel(), device=args[0].device)[:, None]
        else:
            out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self._see(func, args, tensor)
        return out

    def _see(self, func: Any, args: Any, tensor: Tensor) -> None:
        sites = _sites()
        if _SHADOW in sites:
            return
        widened = func is aten._to_copy.default and args[0].dtype is torch.bfloat16 and tensor.dtype is torch.float32
        # On a GPU products of bf16 have a float32 output, and the head widens nothing.
        not_there = self._on_gpu and widened and bool(sites) and sites[0] == HEAD
        self._settle(tensor.untyped_storage(), self._label(tensor, sites), counted=not not_there)
        self._compare(self._moment(sites))

    def _moment(self, sites: list[str]) -> str:
        if HEAD in sites:
            return IN_HEAD
        return f"{IN_BACKWARD}{self.layer}" if BACKWARD in sites else self.phase

    def _label(self, tensor: Tensor, sites: list[str]) -> str:
        label = sites[0] if sites else UPDATE if self.phase == IN_UPDATE else ACTIVATIONS
        if label == REDUCING:
            return GRADIENTS if self._copied_in else REDUCING
        self._copied_in = False
        if label == HEAD:
            return self._part_of_head(tensor, in_backward=BACKWARD in sites)
        return UNREDUCED if label == BACKWARD and tensor.shape in self._shapes else label

    def _part_of_head(self, tensor: Tensor, *, in_backward: bool) -> str:
        if tensor.dim() != 2:
            return HEAD
        if tensor.shape in self._shapes:
            return UNREDUCED if in_backward and tensor.dtype is torch.bfloat16 else HEAD_WEIGHT
        vocab_size, hidden_size = self._head_shape
        if tensor.shape[1] >= vocab_size:
            return HEAD_LOGITS
        return HEAD_HIDDEN if tensor.shape[1] == hidden_size else HEAD

    def _settle(self, storage: torch.UntypedStorage, label: str, *, counted: bool = True) -> None:
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._held:
            self._forget(key)
        self._held[key] = weakref.ref(storage, lambda _: self._forget(key)), size, label
        self._live[label] += size
        self._total += size

    def _forget(self, key: int) -> None:
        _, size, label = self._held.pop(key)
        self._live[label] -= size
        self._total -= size

    def _compare(self, moment: str) -> None:
        if self._total > self.peaks.get(moment, (0,))[0]:
            self.peaks[moment] = self._total, {label: size for label, size in self._live.items() if size}

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is torch.ops.fsdp.chunk_cat.default:
            self._copied_in = True
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_transfer(func, args, out)
        packet = func._overloadpacket
        if packet in flop_registry and "attention" not in str(packet):
            sites = _sites()
            part = next((site for site in (HEAD, RECOMPUTED, BACKWARD) if site in sites), FORWARD)
            self.operations[part] += flop_registry[packet](*args, **kwargs, out_val=out)

    def _count_transfer(self, func: Any, args: Any, out: Any) -> None:
        name = func._opname
        kind = next((k for word, k in _KINDS.items() if word in name), None)
        if kind is None:
            return
        group: Any = next((a for a in args if isinstance(a, str) and a not in _REDUCTIONS), None)
        tensors = [t for a in (*args, out) for t in (a if isinstance(a, list | tuple) else (a,))]
        num_bytes = max(t.nbytes for t in tensors if isinstance(t, Tensor))
        if group is None:
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            size = dist.ProcessGroup.unbox(boxed).size()
        else:
            size = torch._C._distributed_c10d._resolve_process_group(group).size()
        sites = _sites()
        purpose = next((s for s in sites if s in (GATHERING, REDUCING, KEYS, SYNC)), None)
        if purpose is None and func.namespace == "_c10d_functional" and kind == "reduce-scatter":
            purpose = KEYS  # the backward of their gathering, which no line of Python calls
        entry = self.transfers[purpose or "other", kind, size]
        entry[0] += 1
        entry[1] += num_bytes


_KINDS = {"allgather": "all-gather", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter"} | {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
}
_REDUCTIONS = ("sum", "avg", "max", "min")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            yield from _plain(part) if isinstance(part, Tensor) else ()  # a DTensor names its mesh too
    else:
        yield tensor


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
    return build_mesh(CPU, data_parallel_replicate_size=replicate_size, context_parallel_size=context_size)


def _extended(fewer: Rehearsal, more: Rehearsal, num_layers: int) -> Rehearsal:
    """What ``num_layers`` more layers than ``more`` has would do; ``fewer`` has one less."""

    def extend(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {key: extend(a.get(key, 0), value) for key, value in b.items() if key in a or b is not more.peaks}
        if isinstance(b, list):
            return [extend(x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(b, Transfer):
            return replace(b, calls=extend(a.calls, b.calls), num_bytes=extend(a.num_bytes, b.num_bytes))
        return b + num_layers * (b - a)

    return Rehearsal(**{f.name: extend(getattr(fewer, f.name), getattr(more, f.name)) for f in fields(Rehearsal)})


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
        policy = Policy(decoder, options.loss, chunk_size=options.chunk_size, kernel=kernel, context=context)
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
        kept_checkpointed = num_layers * microbatch.batch.tokens.numel() * head_shape[1] * options.dtype.itemsize
        found = _step(policy, microbatch, options, ledger)
    return replace(
        found, kept=kept, kept_checkpointed=kept_checkpointed, num_parameters=num_parameters, num_labels=num_rows
    )


def _follow_layers(decoder: TransformerDecoder, ledger: Ledger) -> None:
    """Lets the ledger know whose backward it is."""
    last = len(decoder.layers) - 1
    names = {1: " of the second layer", last - 1: " of the last layer but one", 0: " of the first layer"}
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
        names = ["a microbatch"] * (several and not options.reduce_every_microbatch) + ["the last microbatch"]
        steps = accumulate_gradients(
            policy, [microbatch] * len(names), 1.0, reduce_every_microbatch=options.reduce_every_microbatch
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
    ledger.adopt((t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)), OPTIMIZER)


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

    def statistics(logits: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Any, dropout_p: float, is_causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    for layer in decoder.layers:
        layer.attn._attention_call = attend


def _fake_microbatch(
    real: Shard, num_rows: int, label_counts: list[int], fake: FakeTensorMode, *, on_gpu: bool
) -> Microbatch:
    """As :meth:`Microbatch.prepare` makes it."""

    def faked(batch: PackedBatch) -> PackedBatch:
        tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
        changed: dict[str, Any] = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
        return replace(batch, **changed)

    shard = replace(real, whole=faked(real.whole), part=faked(real.part), places=fake.from_tensor(real.places))
    if on_gpu:
        num_ranks, num_bins, share = shard.places.shape
        blocks = torch.zeros(num_bins, 1, -(-share // 128), dtype=torch.int32)
        indices = blocks[..., None].expand(*blocks.shape, -(-share * num_ranks // 128))
        mask: Any = BlockMask.from_kv_blocks(blocks, indices, seq_lengths=(share, share * num_ranks))
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
