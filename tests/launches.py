"""Counts the kernels that a GPU would launch, on a CPU."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts operations that are no views.

    Two that a CPU takes to pieces count as one, as CUDA has a kernel for each: attention, and an
    RMS norm whose weight has its input's dtype. Not for ``torch.inference_mode``, which hides what
    a composite operation such as ``flatten`` does.
    """

    def __init__(self, one_kernel_each=(F.scaled_dot_product_attention, F.rms_norm)):
        super().__init__()
        self.names = []
        self._fused = _OneKernelEach(self, one_kernel_each)

    def __enter__(self):
        self._fused.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fused.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._fused.is_inside and not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _OneKernelEach(TorchFunctionMode):
    def __init__(self, launches, functions):
        super().__init__()
        self.launches = launches
        self.functions = functions
        self.is_inside = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_fused = func in self.functions
        if func is F.rms_norm:
            is_fused &= kwargs["weight"].dtype == args[0].dtype
        if not is_fused:
            return func(*args, **kwargs)
        self.launches.names.append(func.__name__)
        self.is_inside = True
        output = func(*args, **kwargs)
        self.is_inside = False
        return output


def count(call, *arguments):
    """How many kernels a call launches."""
    with torch.no_grad(), Launches() as launches:
        call(*arguments)
    return len(launches.names)
