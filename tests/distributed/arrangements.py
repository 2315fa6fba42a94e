"""Computes gradients of the same documents in one arrangement after another.

It runs on the ranks of this process group.
"""

import random

import torch
from torch.nn.attention.flex_attention import BlockMask

from gspo.data.layout import pack_documents
from gspo.losses import GRPOLoss, GSPOLoss
from gspo.metrics import StepMetrics
from gspo.parallel import Ranks, sum_over_ranks
from gspo.policy import Microbatch, Policy, load_weights, shard_policy
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.flex import flex_on_cpu

CPU = torch.device("cpu")
LOSSES = {
    "gspo": GSPOLoss(clip_low=0.2, clip_high=0.2),
    "grpo": GRPOLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.0),
}
ARRANGEMENTS: dict[str, dict] = {
    "one_bin": {"bin_length": 512},
    "many_bins": {"bin_length": 32},
    "short_bins": {"bin_length": None},
    "prompts_apart": {"bin_length": 64, "share_prompts": False},
    "shuffled": {"bin_length": 64, "shuffle": True},
    "five_microbatches": {"bin_length": 48, "num_microbatches": 5},
    "reduced_once": {"bin_length": 48, "num_microbatches": 5, "reduce_every_microbatch": False},
    "checkpointed": {"bin_length": 48, "activation_checkpointing": True},
    "small_head_chunks": {"bin_length": 48, "chunk_size": 7},
    "compiled_head": {"bin_length": 48, "chunk_size": 24, "kernel": "compile"},
    "compiled_head_whole": {"bin_length": 48, "kernel": "compile"},
    "compiled_head_long_documents": {"bin_length": 48, "chunk_size": 7, "kernel": "compile"},
    "compiled_head_untied": {
        "bin_length": 48,
        "chunk_size": 24,
        "kernel": "compile",
        "tied": False,
    },
    "compiled_head_in_compiled_checkpoints": {
        "bin_length": 48,
        "chunk_size": 24,
        "kernel": "compile",
        "compile_layers": True,
        "activation_checkpointing": True,
    },
    "compiled": {"bin_length": 48, "compile_layers": True},
    "untied": {"bin_length": 48, "tied": False},
    "context": {"bin_length": 48, "context": 2},
    "context_one_bin": {"bin_length": 512, "context": 2},
    "context_short_bins": {"bin_length": None, "context": 2, "num_microbatches": 5},
    "context_prompts_apart": {
        "bin_length": 64,
        "context": 2,
        "share_prompts": False,
        "tied": False,
    },
    "context_compiled_head": {"bin_length": 48, "context": 2, "chunk_size": 7, "kernel": "compile"},
    "context_in_compiled_checkpoints": {
        "bin_length": 48,
        "context": 2,
        "compile_layers": True,
        "activation_checkpointing": True,
    },
    "context_of_four": {"bin_length": 64, "context": 4},
    "context_of_four_padded": {"bin_length": 46, "context": 4, "num_microbatches": 5},
    "context_in_replicas": {"bin_length": 48, "context": 2, "replicate": 2},
    "replicas": {"bin_length": 48, "replicate": 2},
    # The attention of a GPU.
    "blocks": {"bin_length": 512, "in_blocks": True},
    "blocks_many_bins": {"bin_length": 48, "in_blocks": True, "num_microbatches": 2},
    "blocks_prompts_apart": {"bin_length": 300, "share_prompts": False, "in_blocks": True},
    "blocks_in_checkpoints": {
        "bin_length": 512,
        "in_blocks": True,
        "activation_checkpointing": True,
    },
    "blocks_in_compiled_checkpoints": {
        "bin_length": 512,
        "in_blocks": True,
        "compile_layers": True,
        "activation_checkpointing": True,
    },
    "context_blocks": {"bin_length": 512, "in_blocks": True, "context": 2},
    "context_of_four_blocks": {"bin_length": 518, "in_blocks": True, "context": 4},
}


def all_gradients(names):
    """Returns ``{(arrangement, loss): (metrics, gradients by parameter)}``.

    The gradients are full tensors, the same on every rank.
    """
    return {
        (name, loss): gradients(LOSSES[loss], **ARRANGEMENTS[name])
        for name in names
        for loss in LOSSES
    }


def build_policy(
    loss,
    *,
    tied=True,
    num_kv_heads=2,
    chunk_size=4096,
    kernel="reference",
    compile_layers=False,
    activation_checkpointing=False,
    ranks=None,
    dtype=torch.float32,
):
    with torch.device("meta"):
        decoder = tiny_policy.build_decoder(tied=tied, num_kv_heads=num_kv_heads).to(dtype)
    ranks = ranks or Ranks.of(CPU)
    policy = Policy(decoder, loss, chunk_size=chunk_size, kernel=kernel, context=ranks.context)
    shard_policy(
        policy,
        ranks.fsdp_mesh,
        compile_layers=compile_layers,
        activation_checkpointing=activation_checkpointing,
    )
    load_weights(policy, tiny_policy.weights(tied=tied, num_kv_heads=num_kv_heads), CPU)
    return policy


def gradients(
    loss,
    *,
    bin_length,
    share_prompts=True,
    shuffle=False,
    num_microbatches=1,
    reduce_every_microbatch=True,
    replicate=1,
    context=1,
    in_blocks=False,
    **options,
):
    ranks = Ranks.of(CPU, replicate=replicate, context=context)
    policy = build_policy(loss, ranks=ranks, **options)
    documents = tiny_policy.documents()
    if shuffle:
        random.Random(1).shuffle(documents)
    rank, num_ranks = ranks.data_rank, ranks.num_data_ranks
    mine = [d for d in documents if d.group_id % num_ranks == rank]
    parts = [  # some are empty on some ranks
        [d for d in mine if d.group_id // num_ranks % num_microbatches == i]
        for i in range(num_microbatches)
    ]
    batches = [pack_documents(part, bin_length, share_prompts=share_prompts) for part in parts]
    shared = sum(batch.prefix_index is not None for batch in batches)
    assert bool(sum_over_ranks([shared])[0]) == share_prompts
    microbatches = [
        Microbatch.prepare(batch, CPU, ranks.context, in_blocks=in_blocks) for batch in batches
    ]
    if in_blocks:
        assert any(isinstance(m.mask(), BlockMask) for m in microbatches)
    denominator = loss.denominator(len(documents), sum(len(d.logps) for d in documents))
    sums = StepMetrics()
    with flex_on_cpu():
        for output in accumulate_gradients(
            policy, microbatches, denominator, reduce_every_microbatch=reduce_every_microbatch
        ):
            sums.add(output.metrics)
    grads = {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.full_tensor().numpy()
        for name, p in policy.decoder.named_parameters()
    }
    return sums.reduce(), grads
