"""FlexAttention uncompiled on a CPU, so that tests run the attention that a GPU takes."""

import contextlib

from torch.nn.attention import flex_attention


@contextlib.contextmanager
def flex_on_cpu():
    """Allow gradients of FlexAttention on a CPU.

    torch has them there, and refuses them to users, for whom they would be slow. The layers are run
    without the compiler, which would compile each shape of mask anew.
    """
    check, debug = (
        flex_attention._validate_device,
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG,
    )
    flex_attention._validate_device = lambda *_: None
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex_attention._validate_device = check
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = debug
