"""FlexAttention uncompiled on a CPU, so that tests run the attention that a GPU takes."""

import contextlib
import sys
from unittest import mock

from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import flex_attention

# By its name in the list of modules: the package has an operator of the same name.
operator = sys.modules["torch._higher_order_ops.flex_attention"]


@contextlib.contextmanager
def flex_on_cpu():
    """Allow gradients of FlexAttention on a CPU.

    torch has them there, and refuses them to users, for whom they would be slow. The layers are run
    without the compiler, which would compile each shape of mask anew.
    """
    trace = operator.create_fw_bw_graph

    def trace_apart(*arguments):
        # What tracing a score's function saves is not the layer's: a checkpoint would count it, and
        # mistake one tensor for another when it runs the layer again.
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return trace(*arguments)

    with (
        mock.patch.object(flex_attention, "_validate_device", lambda *_: None),
        mock.patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        mock.patch.object(operator, "create_fw_bw_graph", trace_apart),
    ):
        yield
