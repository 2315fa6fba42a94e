"""What FSDP2 holds gathered, and when: the docs and the planner say so."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gspo import parallel
from gspo.data.layout import pack_documents
from gspo.losses import GSPOLoss
from gspo.policy import Microbatch
from tests import tiny_policy
from tests.distributed.arrangements import build_policy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_process():
    parallel.init_process_group(CPU)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_and_head_are_gathered_from_the_forward_to_the_backward(tied):
    """Layers are gathered one by one; the root's own parameters stay."""
    policy = build_policy(GSPOLoss(), tied=tied)
    decoder = policy.decoder
    gathered = []

    def look(*_):
        own = [decoder.tok_embeddings.weight, *([] if tied else [decoder.output.weight])]
        layers = [isinstance(layer.mlp.w1.weight, DTensor) for layer in decoder.layers]
        gathered.append(([not isinstance(weight, DTensor) for weight in own], layers.count(False)))

    for layer in decoder.layers:
        layer.register_forward_hook(look)
        layer.mlp.register_full_backward_hook(look)
    microbatch = Microbatch.prepare(pack_documents(tiny_policy.documents(), 48), CPU)
    policy(microbatch).loss.backward()
    assert len(gathered) == 4
    assert all(all(own) and num_layers <= 2 for own, num_layers in gathered)
    assert isinstance(decoder.tok_embeddings.weight, DTensor)
