"""The settings of torch on a GPU, with CUDA's part of them recorded."""

import pytest
import torch

from gspo import parallel
from gspo.parallel import cuda

CUDA = torch.device("cuda")


@pytest.fixture
def allocator(monkeypatch):
    """The settings that the allocator was given; torch's own are put back."""
    for name in cuda._ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    settings = []
    monkeypatch.setattr(cuda, "set_allocator", settings.append)
    matmul = torch.backends.cuda.matmul
    before = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction_split_k,
        torch.get_float32_matmul_precision(),
    )
    limits = {
        name: getattr(torch._dynamo.config, name)
        for name in ("recompile_limit", "fail_on_recompile_limit_hit")
    }
    with torch._dynamo.config.patch(limits):
        yield settings
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    matmul.allow_bf16_reduced_precision_reduction = before[1:3]
    torch.set_float32_matmul_precision(before[3])


def test_a_gpu_attends_without_cudnn_and_sums_in_float32(allocator):
    torch.set_float32_matmul_precision("high")
    parallel.prepare_device(CUDA)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k
    assert torch.get_float32_matmul_precision() == "highest"
    assert allocator == ["expandable_segments:True"]


def test_attention_never_goes_on_uncompiled(allocator):
    parallel.prepare_device(CUDA)
    compiled = torch.compile(lambda x: x + 1, dynamic=False, backend="eager")
    for size in range(cuda.RECOMPILE_LIMIT):
        compiled(torch.zeros(size + 2))
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.zeros(cuda.RECOMPILE_LIMIT + 2))


@pytest.mark.parametrize("name", cuda._ALLOCATOR_VARIABLES)
def test_what_the_environment_says_of_the_allocator_stands(allocator, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    parallel.prepare_device(CUDA)
    assert allocator == []


def test_nothing_changes_for_a_cpu(allocator):
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.config.recompile_limit
    parallel.prepare_device(torch.device("cpu"))
    after = torch.backends.cuda.cudnn_sdp_enabled(), torch._dynamo.config.recompile_limit
    assert after == before and allocator == []
