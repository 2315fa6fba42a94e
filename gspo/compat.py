"""The private and versioned names of other libraries that this pack uses, in this one place.

Each says in which version it was seen. What is imported where a name is used only once a command
needs it stays inside its function, so that this module is cheap to import.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torchtune.config._errors import InstantiationError
from torchtune.config._parse import TuneRecipeArgumentParser
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args

__all__ = [
    "InstantiationError",
    "TuneRecipeArgumentParser",
    "all_gather_with_gradient",
    "component_from_path",
    "merge_overrides",
    "patch_stochastic_rounding",
    "with_output_dir",
]

# torch 2.13 has it by the first name, 2.11 by the second. Differentiable, known to torch.compile.
all_gather_with_gradient: Callable[..., Tensor] = (
    getattr(collectives, "all_gather_single_autograd", None)
    or collectives.all_gather_tensor_autograd
)


def component_from_path(path: str) -> Any:
    """Import the object that a dotted path names (torchtune 0.6.1, ``config._utils``).

    Raises:
        InstantiationError: The import fails; its cause says why.
    """
    return _get_component_from_path(path)


def merge_overrides(from_file: Namespace, overrides: Sequence[str]) -> DictConfig:
    """Merge ``key=value`` and ``~key`` into a config (torchtune 0.6.1, ``config._utils``)."""
    return _merge_yaml_and_cli_args(from_file, list(overrides))


def with_output_dir(checkpointer: Any, folder: Path) -> Any:
    """Return a copy of a checkpointer that saves in another folder (torchtune 0.6.1)."""
    other = copy.copy(checkpointer)
    other._output_dir = folder
    return other


def set_allocator(settings: str) -> None:
    """Set options of the GPU memory's allocator, as in ``PYTORCH_ALLOC_CONF`` (torch 2.13)."""
    torch._C._accelerator_setAllocatorSettings(settings)


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of a group waits for the other ranks (torch 2.13)."""
    distributed_c10d._set_pg_timeout(timeout, group)


def run_tune() -> None:
    """Run torchtune's command line on ``sys.argv`` (torchtune 0.6.1, ``_cli.tune``)."""
    from torchtune._cli.tune import main

    main()


def patch_stochastic_rounding() -> None:
    """Let torchao's ``bf16_stochastic_round`` take FSDP2's parameters; twice is as once.

    torchao 0.13 to 0.15 draws the random bits as a plain tensor, which a DTensor cannot be compared
    with (github.com/pytorch/ao/issues/2296). With this, each rank rounds its own shard.
    """
    from torchao.optim import adam

    round_plain = adam._fp32_to_bf16_sr
    if round_plain.__module__ == __name__:
        return

    def round_shard(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return round_plain(x)
        rounded = round_plain(x.to_local())
        return DTensor.from_local(
            rounded,
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,  # given because shards can be uneven
            stride=x.stride(),
        )

    adam._fp32_to_bf16_sr = round_shard


# for the planner
class TorchCode(NamedTuple):
    """The code of torch's functions by which the planner knows what a tensor is for.

    Seen in torch 2.13: ``fsdp._fully_shard``, ``utils.checkpoint``, ``autograd.graph``.
    """

    all_gather: CodeType  # copies shards into the buffers of an all-gather
    gathered_weights: tuple[CodeType, ...]  # make room for its output
    reduce_scatter: CodeType
    recompute: CodeType  # a checkpointed layer's forward, again
    backward: CodeType


def torch_code() -> TorchCode:
    """Return the code of the functions."""
    from torch.autograd import graph
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param
    from torch.utils import checkpoint

    parameter = _fsdp_param.FSDPParam
    # The first two are decorated with no_grad.
    all_gather = inspect.unwrap(_fsdp_collectives.foreach_all_gather)
    reduce_scatter = inspect.unwrap(_fsdp_collectives.foreach_reduce)
    return TorchCode(
        all_gather=all_gather.__code__,
        gathered_weights=(
            parameter.init_all_gather_outputs.__code__,
            parameter.alloc_all_gather_outputs.__code__,
        ),
        reduce_scatter=reduce_scatter.__code__,
        recompute=_code_within(checkpoint, "recompute_fn"),
        backward=graph._engine_run_backward.__code__,
    )


def _code_within(module: ModuleType, name: str) -> CodeType:
    """Return the code of a function that is defined in another one of a module.

    Which one it stands in differs: torch 2.14 has moved it.
    """
    for outer in vars(module).values():
        code = getattr(inspect.unwrap(outer), "__code__", None) if callable(outer) else None
        for constant in getattr(code, "co_consts", ()):
            if isinstance(constant, CodeType) and constant.co_name == name:
                return constant
    raise AttributeError(f"{module.__name__} defines no {name} in this version of torch")


def sharding_propagation_file() -> str:
    """Return the file in which a DTensor's shapes are worked out, on tensors that are not there."""
    from torch.distributed.tensor import _sharding_prop

    return _sharding_prop.__file__


def join_fake_group(world_size: int) -> None:
    """Make this process rank 0 of a process group whose other ranks are not there (torch 2.13)."""
    from torch.distributed._tools import fake_collectives  # noqa: F401  they take fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def group_size(name: str) -> int:
    """Return the number of ranks in a process group, by the name that collectives pass on."""
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    return resolve(name).size()


def unboxed_group_size(boxed: torch.ScriptObject) -> int:
    """Return the number of ranks in a process group that an operation got as an object."""
    return dist.ProcessGroup.unbox(boxed).size()


def is_process_group(value: Any) -> bool:
    """Whether an argument of an operation is a process group as an object."""
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


@contextlib.contextmanager
def optimizer_without_arithmetic() -> Iterator[None]:
    """Leave out the update of a parameter in torchao's optimizers, which a run compiles.

    Seen in torchao 0.15: ``optim.adam.single_param_adam``.
    """
    from torchao.optim import adam

    update = adam.single_param_adam
    adam.single_param_adam = lambda *_: None
    try:
        yield
    finally:
        adam.single_param_adam = update


def has_attention(layer: Any) -> bool:
    """Whether the product of queries, keys and values in a layer can be replaced."""
    return hasattr(layer.attn, "_attention_call")


def set_attention(layer: Any, attend: Callable[..., Tensor]) -> None:
    """Replace the product of queries, keys and values in a layer (torchtune 0.6.1)."""
    layer.attn._attention_call = attend


@contextlib.contextmanager
def rotary_scaling_without_arithmetic() -> Iterator[None]:
    """Leave out the scaling of Llama 3.1's rotary frequencies, which branches on their values.

    Tensors without values have the same shapes without it (torchtune 0.6.1).
    """
    from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE

    scale = Llama3ScaledRoPE.apply_scaling
    Llama3ScaledRoPE.apply_scaling = lambda self, freqs, *_: torch.empty_like(freqs)
    try:
        yield
    finally:
        Llama3ScaledRoPE.apply_scaling = scale


@contextlib.contextmanager
def modules_stay_where_they_are() -> Iterator[None]:
    """Let modules stay on the device and in the dtype that they were made in.

    peft 0.18 moves new adapters to those of the base layer. They are there already where all was
    made under one default, and fake tensors cannot be moved.
    """
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]


def can_pack_weights() -> bool:
    """Return whether torch has oneDNN and its products with packed weights (torch 2.13)."""
    has_products = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_on = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_products and is_on


def pack_weight(
    weight: Tensor,  # [out, in]
) -> Tensor:
    """Copy a weight into oneDNN's blocks, in a form that :func:`multiply_packed` alone reads."""
    # The rows of later inputs choose the blocks; those for 2 to 2,900 rows are the same.
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)


def multiply_packed(
    x: Tensor,  # [..., in]
    packed: Tensor,
    bias: Tensor | None,  # [out]
    activation: str = "none",  # by oneDNN's name, such as swish
) -> Tensor:  # [..., out]
    """Return activation(x W^T + b)."""
    x = x.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "")


def multiply_packed_and_add(
    x: Tensor,  # [N, in]
    packed: Tensor,
    bias: Tensor | None,  # [out]
    other: Tensor,  # [N, out]
) -> Tensor:  # [N, out]
    """Return x W^T + b + other."""
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), other, packed, bias, "add")


def multiply_packed_times(
    x: Tensor,  # [N, in]
    packed: Tensor,
    bias: Tensor | None,  # [out]
    other: Tensor,  # [N, out]
) -> Tensor:  # [N, out]
    """Return (x W^T + b) * other."""
    return torch.ops.mkldnn._linear_pointwise.binary(x.contiguous(), other, packed, bias, "mul")
