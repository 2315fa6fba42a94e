import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchao.optim import adam

from gspo.compat import patch_stochastic_rounding
from gspo.parallel.mesh import init_process_group


@pytest.fixture
def mesh():
    init_process_group(torch.device("cpu"))
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def rounding(monkeypatch):
    """torchao's function after the patch, which is made anew."""
    plain = adam._fp32_to_bf16_sr
    while plain.__module__ == "gspo.compat":
        plain = plain.__closure__[0].cell_contents
    monkeypatch.setattr(adam, "_fp32_to_bf16_sr", plain)
    patch_stochastic_rounding()
    return adam._fp32_to_bf16_sr


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "plain"])
def test_rounding_hits_either_neighbour_with_the_right_share(rounding, mesh, sharded):
    x = torch.full(
        (100, 200), 1.0 + 2**-9
    )  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7
    torch.manual_seed(0)
    rounded = rounding(distribute_tensor(x, mesh, [Shard(0)]) if sharded else x)
    assert isinstance(rounded, DTensor) == sharded and rounded.shape == x.shape
    values = rounded.to_local() if sharded else rounded
    assert values.dtype == torch.bfloat16
    assert set(values.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (values > 1).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_second_patch_changes_nothing(rounding):
    patch_stochastic_rounding()
    assert adam._fp32_to_bf16_sr is rounding
