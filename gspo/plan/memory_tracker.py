"""What fake tensors would take: every storage by what it is for, operations, and collectives, while real code runs.

A tensor is named after the nearest function on the stack that :data:`_SITES` knows; nothing that is run is changed.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    ("attention.py", "attend_to_all"): KEYS,
    ("attention.py", "document_mask"): MASK,
    ("model.py", "full_state_dict"): SYNC,
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

        def resize_(
            storage: torch.UntypedStorage, size: int
        ) -> torch.UntypedStorage:  # FSDP2's way to free
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
        if (
            func is aten._local_scalar_dense.default
        ):  # a value, which fake tensors do not have: flags are set
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
        widened = (
            func is aten._to_copy.default
            and args[0].dtype is torch.bfloat16
            and tensor.dtype is torch.float32
        )
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
            self.peaks[moment] = (
                self._total,
                {label: size for label, size in self._live.items() if size},
            )

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
            boxed = next(
                a
                for a in args
                if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            )
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


_KINDS = {
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
} | {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
}


_REDUCTIONS = ("sum", "avg", "max", "min")


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            yield from (
                _plain(part) if isinstance(part, Tensor) else ()
            )  # a DTensor names its mesh too
    else:
        yield tensor
