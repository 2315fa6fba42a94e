"""Follow the memory, operations and collectives of code that runs on fake tensors.

Every storage is counted under a label that says what it is for. The label comes from the nearest
function on the stack that :class:`CodeLabels` knows; nothing that is run is changed.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gspo.kernels
from gspo.compat import (
    group_size,
    is_process_group,
    sharding_propagation_file,
    torch_code,
    unboxed_group_size,
)
from gspo.plan.arena import Arena
from gspo.policy import Policy, document_mask

aten = torch.ops.aten

# What a tensor is for.
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
_NOT_THERE = "not there: a DTensor's shapes being worked out"

# Moments of an optimizer step.
FORWARD = "the forward"
IN_HEAD = "the loss head"
IN_BACKWARD = "the backward"
IN_UPDATE = "the optimizer's update"
IN_SYNC = "the sync to the sampler"

_COLLECTIVES = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
}
_REDUCTIONS = ("sum", "avg", "max", "min")
_NAMESPACES = ("c10d", "_c10d_functional")  # of the operations that send
_WITH_PURPOSE = (GATHERING, REDUCING, KEYS, SYNC)
_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)


@dataclass(frozen=True, slots=True)
class Transfer:
    """Collectives of one kind on one group; bytes are those of the larger of input and output."""

    purpose: str
    kind: str  # all-gather, reduce-scatter, all-reduce
    group_size: int
    calls: int
    num_bytes: int

    @property
    def key(self) -> tuple[str, str, int]:
        """The facts that two transfers share if they can be added up."""
        return self.purpose, self.kind, self.group_size


@dataclass(frozen=True, slots=True)
class Peak:
    """The bytes that were held when the most were."""

    num_bytes: int
    parts: dict[str, int]  # bytes by label


@dataclass(slots=True)
class _Held:
    """A storage that is there."""

    storage: weakref.ref[torch.UntypedStorage]
    num_bytes: int
    label: str
    stands_for: torch.UntypedStorage | None = None  # what a GPU holds in its place, kept with it
    address: int = 0  # in the arena


class CodeLabels:
    """Labels for what is made in functions of torch and of this pack, by their code objects."""

    def __init__(self) -> None:
        of_torch = torch_code()
        self._labels: dict[CodeType, str | None] = {
            of_torch.all_gather: GATHERING,
            of_torch.reduce_scatter: REDUCING,
            of_torch.recompute: RECOMPUTED,
            of_torch.backward: BACKWARD,
            inspect.unwrap(document_mask).__code__: MASK,
            inspect.unwrap(Policy.full_state_dict).__code__: SYNC,
        }
        for code in of_torch.gathered_weights:
            self._labels[code] = GATHERED
        self._head_folder = str(Path(gspo.kernels.__file__).parent)
        self._shapes_file = sharding_propagation_file()

    def add(self, function: Callable[..., Any], label: str) -> None:
        """Label what is made in a function, or in the call of an object."""
        code = getattr(function, "__code__", None)
        if code is None:
            call = type(function).__call__
            code = call.__code__
        self._labels[code] = label

    def of(self, code: CodeType) -> str | None:
        """Return the label of a code object; None if it says nothing."""
        if code not in self._labels:
            self._labels[code] = self._by_file(code.co_filename)
        return self._labels[code]

    def on_stack(self) -> list[str]:
        """Return the labels of the functions that are running, the innermost first."""
        labels = []
        frame = sys._getframe(1)
        while frame is not None:
            label = self.of(frame.f_code)
            if label is not None:
                labels.append(label)
            frame = frame.f_back  # type: ignore[assignment]
        return labels

    def _by_file(self, file: str) -> str | None:
        if file == self._shapes_file:
            return _NOT_THERE
        folder = str(Path(file).parent)
        if folder == self._head_folder:
            return HEAD
        return None


class MemoryTracker(TorchDispatchMode):
    """Follows every storage from its making to its end, and counts operations and collectives.

    Args:
        shapes: of the whole parameters, by which a gradient is known.
        head_shape: [V, H].
        on_gpu: leaves out what only a CPU does.
    """

    def __init__(self, shapes: set[torch.Size], head_shape: torch.Size, *, on_gpu: bool) -> None:
        super().__init__()
        self.labels = CodeLabels()
        self.phase = FORWARD
        self.layer = ""  # whose backward it is
        self.peaks: dict[str, Peak] = {}
        self.operations: defaultdict[str, float] = defaultdict(float)
        self.moved: defaultdict[str, float] = defaultdict(float)  # bytes, by loops over numbers
        self._shapes = shapes
        self._head_shape = head_shape
        self._on_gpu = on_gpu
        self._held: dict[int, _Held] = {}
        self._live: Counter[str] = Counter()
        self._total = 0
        self._largest_total = 0
        self._arena = Arena()
        # Whether the last thing made was the input of a reduce-scatter: what follows is its output.
        self._copied_in = False
        self._transfers: dict[tuple[str, str, int], Transfer] = {}

    def adopt(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            for plain in _plain_tensors(tensor):
                storage = plain.untyped_storage()
                self._settle(storage, label)

    def take_transfers(self) -> list[Transfer]:
        """Return what has been sent since the last call."""
        transfers = list(self._transfers.values())
        self._transfers.clear()
        return transfers

    def forget_past(self) -> None:
        """Start the counts anew; what is held stays."""
        self.peaks.clear()
        self.operations.clear()
        self.moved.clear()
        self._transfers.clear()

    @property
    def gaps(self) -> int:
        """Bytes that an allocator has reserved beyond the most that was held at once."""
        return self._arena.end - self._largest_total

    def held(self, label: str) -> int:
        """Return the bytes that are held under a label now."""
        return self._live[label]

    def __enter__(self) -> MemoryTracker:
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """Free or fill a storage, as FSDP2 does."""
            resized = resize(storage, size)
            known = self._held.get(storage._cdata)
            if known is not None:
                self._settle(storage, known.label)
                labels = self.labels.on_stack()
                moment = self._moment(labels)
                self._keep_peak(moment)
            return resized

        torch.UntypedStorage.resize_ = resize_  # type: ignore
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if kind not in _PLAIN_TYPES:
                return NotImplemented  # a tensor made of others: these come next
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # a value, which fake tensors do not have
            is_flag = args[0].dtype is torch.bool
            return True if is_flag else 1  # flags are set
        if func is aten.nonzero.default:
            out = _all_rows(args[0])
        else:
            out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        for tensor in _tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._see(func, args, tensor)
        return out

    def _see(self, func: Any, args: Any, tensor: Tensor) -> None:
        """Take note of a new storage."""
        labels = self.labels.on_stack()
        if _NOT_THERE in labels:
            return
        storage = tensor.untyped_storage()
        label = self._label(tensor, labels)
        in_head = labels[:1] == [HEAD]
        if self._on_gpu and in_head and _widens(func, args, tensor):
            # There products of bf16 have a float32 output: the head widens nothing, and holds the
            # operand as it is.
            self._settle(storage, label, stands_for=args[0].untyped_storage())
        else:
            self._settle(storage, label)
        moment = self._moment(labels)
        self._keep_peak(moment)

    def _moment(self, labels: list[str]) -> str:
        if HEAD in labels:
            return IN_HEAD
        if BACKWARD in labels:
            return f"{IN_BACKWARD}{self.layer}"
        return self.phase

    def _label(self, tensor: Tensor, labels: list[str]) -> str:
        label = labels[0] if labels else self._label_of_phase()
        if label == REDUCING:
            return GRADIENTS if self._copied_in else REDUCING
        self._copied_in = False
        if label == HEAD:
            in_backward = BACKWARD in labels
            return self._label_in_head(tensor, in_backward=in_backward)
        if label == BACKWARD and tensor.shape in self._shapes:
            return UNREDUCED
        return label

    def _label_of_phase(self) -> str:
        """Return the label of what no known function makes."""
        if self.phase == IN_UPDATE:
            return UPDATE
        return ACTIVATIONS

    def _label_in_head(self, tensor: Tensor, *, in_backward: bool) -> str:
        if tensor.dim() != 2:
            return HEAD
        if tensor.shape in self._shapes:
            is_gradient = in_backward and tensor.dtype is torch.bfloat16
            return UNREDUCED if is_gradient else HEAD_WEIGHT
        vocab_size, hidden_size = self._head_shape
        num_columns = tensor.shape[1]
        if num_columns >= vocab_size:
            return HEAD_LOGITS
        if num_columns == hidden_size:
            return HEAD_HIDDEN
        return HEAD

    def _settle(
        self,
        storage: torch.UntypedStorage,
        label: str,
        *,
        stands_for: torch.UntypedStorage | None = None,
    ) -> None:
        """Hold a storage under a label, at its size of now; one that stands for another has none.

        The other counts by itself, and for as long as this storage is there.
        """
        key = storage._cdata
        if key in self._held:
            self._forget(key)
        num_bytes = 0
        if stands_for is None:
            num_bytes = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._forget(key))
        address = self._arena.take(num_bytes) if num_bytes else 0
        self._held[key] = _Held(reference, num_bytes, label, stands_for, address)
        self._live[label] += num_bytes
        self._total += num_bytes
        self._largest_total = max(self._largest_total, self._total)

    def _forget(self, key: int) -> None:
        gone = self._held.pop(key)
        if gone.num_bytes:
            self._arena.give(gone.address)
        self._live[gone.label] -= gone.num_bytes
        self._total -= gone.num_bytes

    def _keep_peak(self, moment: str) -> None:
        known = self.peaks.get(moment)
        largest = 0 if known is None else known.num_bytes
        if self._total <= largest:
            return
        parts = {}
        for label, size in self._live.items():
            if size:
                parts[label] = size
        self.peaks[moment] = Peak(self._total, parts)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func is torch.ops.fsdp.chunk_cat.default:
            self._copied_in = True
        if func.namespace in _NAMESPACES:
            self._count_transfer(func, args, out)
        packet = func._overloadpacket
        if "attention" in str(packet):
            return
        labels = self.labels.on_stack()
        part = _part_of_operations(labels)
        if packet in flop_registry:
            count_operations = flop_registry[packet]
            self.operations[part] += count_operations(*args, **kwargs, out_val=out)
        elif packet is aten._grouped_mm:
            self.operations[part] += _grouped_operations(args, kwargs)
        elif func.namespace == "aten" and _is_loop(func) and _NOT_THERE not in labels:
            self.moved[part] += _bytes_moved(func, args, out)

    def _count_transfer(self, func: Any, args: Any, out: Any) -> None:
        kind = _collective_kind(func._opname)
        if kind is None:
            return
        purpose = self._purpose(func, kind)
        sizes = [tensor.nbytes for tensor in _tensors_in((*args, out))]
        transfer = Transfer(purpose, kind, _num_ranks(args), calls=1, num_bytes=max(sizes))
        key = transfer.key
        known = self._transfers.get(key)
        if known is not None:
            transfer = _sum_of(known, transfer)
        self._transfers[key] = transfer

    def _purpose(self, func: Any, kind: str) -> str:
        """Return the label of the function that sends."""
        for label in self.labels.on_stack():
            if label in _WITH_PURPOSE:
                return label
        is_functional = func.namespace == "_c10d_functional"
        if is_functional and kind == "reduce-scatter":
            return KEYS  # the backward of their gathering, which no line of Python calls
        return "other"


def grouped_operands(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both operands of a grouped product, and where each group ends."""
    left, right, *more = args
    offsets = more[0] if more else kwargs["offs"]
    return left, right, offsets


def _grouped_operations(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """Count the operations of a grouped product: each row is in one group."""
    left, right, _ = grouped_operands(args, kwargs)
    num_rows, num_inner = left.shape[-2:]
    return 2.0 * num_rows * num_inner * right.shape[-1]


def _sum_of(first: Transfer, second: Transfer) -> Transfer:
    """Return two transfers with the same key as one."""
    calls = first.calls + second.calls
    num_bytes = first.num_bytes + second.num_bytes
    return Transfer(*first.key, calls, num_bytes)


def _all_rows(flags: Tensor) -> Tensor:  # [N] -> [N, 1]
    """Return what ``nonzero`` does where every row has a coefficient (f = 0)."""
    count = flags.numel()
    numbers = torch.arange(count, device=flags.device)
    return numbers[:, None]


def _is_loop(func: Any) -> bool:
    """Whether an operation goes through numbers: it is no view, and does not only make room."""
    return not func.is_view and "empty" not in func._opname


def _bytes_moved(func: Any, args: Any, out: Any) -> int:
    """Return the bytes that a loop reads and writes."""
    written = sum(tensor.nbytes for tensor in _tensors_in(out))
    looks_up = "embedding" in func._opname or "index" in func._opname
    if looks_up:  # a few rows of a large table
        return 2 * written
    return written + sum(tensor.nbytes for tensor in _tensors_in(args))


def _widens(func: Any, args: Any, tensor: Tensor) -> bool:
    """Whether an operation has copied bf16 to float32."""
    if func is not aten._to_copy.default:
        return False
    source = args[0]
    return source.dtype is torch.bfloat16 and tensor.dtype is torch.float32


def _part_of_operations(labels: list[str]) -> str:
    """Return the part of a microbatch that operations belong to."""
    for part in (HEAD, RECOMPUTED, BACKWARD):
        if part in labels:
            return part
    return FORWARD


def _collective_kind(operation: str) -> str | None:
    for word, kind in _COLLECTIVES.items():
        if word in operation:
            return kind
    return None


def _num_ranks(args: Iterable[Any]) -> int:
    """Return the size of the group that a collective's arguments name."""
    for argument in args:
        if isinstance(argument, str) and argument not in _REDUCTIONS:
            return group_size(argument)
    for argument in args:
        if is_process_group(argument):
            return unboxed_group_size(argument)
    raise AssertionError("a collective without a group")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an argument or a result, which may be a list of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors_in(element)


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that a tensor is made of; a DTensor names its mesh among them."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            yield from _plain_tensors(inner)
    elif isinstance(tensor, Tensor):
        yield tensor
