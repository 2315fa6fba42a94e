"""torchtune's RMS norm as one kernel."""

import pytest
import torch
from torchtune.modules import RMSNorm

from gspo.norm import FusedRMSNorm, fuse_norms
from tests.launches import count
from tests.sampling.test_local import build

DTYPES = [torch.float32, torch.bfloat16]


def norms_of(dtype, dim=96):
    """Return torchtune's norm and the same fused."""
    torch.manual_seed(0)
    plain, fused = RMSNorm(dim, eps=1e-5).to(dtype), RMSNorm(dim, eps=1e-5).to(dtype)
    torch.nn.init.normal_(plain.scale, 1.0, 0.3)
    fused.load_state_dict(plain.state_dict())
    fuse_norms(fused)
    return plain, fused


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_fused_norm_gives_torchtunes_numbers_and_gradients(dtype):
    plain, fused = norms_of(dtype)
    inputs = 3 * torch.randn(257, 96, dtype=dtype)
    x, y = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    expected, normed = plain(x), fused(y)
    assert normed.dtype == dtype
    expected.float().square().mean().backward()
    normed.float().square().mean().backward()
    pairs = [(normed, expected), (y.grad, x.grad), (fused.scale.grad, plain.scale.grad)]
    if dtype == torch.float32:
        assert all(torch.equal(one, other) for one, other in pairs)
        return
    one_rounding = 2**-7  # from one bfloat16 to the next, relative
    torch.testing.assert_close(normed, expected, rtol=one_rounding, atol=0)
    for one, other in pairs[1:]:
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_fused_norm_is_one_kernel(dtype):
    plain, fused = norms_of(dtype)
    x = torch.randn(4, 96, dtype=dtype)
    assert count(fused, x) == 1
    assert count(plain, x) == (1 if dtype == torch.float32 else 8)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_an_input_of_another_dtype_goes_torchtunes_way():
    plain, fused = norms_of(torch.bfloat16)
    x = torch.randn(4, 96)
    assert torch.equal(fused(x), plain(x)) and fused(x).dtype == torch.float32


def test_every_norm_of_a_decoder_is_fused_and_keeps_its_name():
    decoder = build(qk_norm=True)
    names = list(decoder.state_dict())
    fuse_norms(decoder)
    fuse_norms(decoder)
    norms = [module for module in decoder.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * 4 + 1
    assert all(type(norm) is FusedRMSNorm for norm in norms)
    assert list(decoder.state_dict()) == names


def test_a_subclass_of_the_norm_is_left_alone():
    class Shifted(RMSNorm):
        def forward(self, x):
            return super().forward(x) + 1.0

    norm = Shifted(8)
    fuse_norms(norm)
    assert type(norm) is Shifted
