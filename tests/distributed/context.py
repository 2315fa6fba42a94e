"""Measures what context parallelism must not change, and what it costs.

It runs on the ranks of this process group.
"""

import random
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from gspo.data.broadcast import ShareOverContext
from gspo.data.layout import Document, pack_documents
from gspo.losses import GRPOLoss, GSPOLoss, SegmentLoss
from gspo.metrics import StepMetrics
from gspo.parallel import Ranks, split
from gspo.policy import Microbatch, Policy
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.data.fakes import Items
from tests.distributed.arrangements import build_policy
from tests.flex import flex_on_cpu

CPU = torch.device("cpu")
MESHES = {  # replicate, context; the shard axis takes the other ranks
    2: {"2x1": (1, 1), "1x2": (1, 2)},
    4: {"2x2": (1, 2), "1x4": (1, 4), "2x2x1": (2, 1), "2x1x2": (2, 2)},
}
LOSSES = {
    "gspo": lambda: GSPOLoss(clip_low=0.05, clip_high=0.05, kl_coef=0.1, entropy_coef=0.01),
    "grpo": lambda: GRPOLoss(clip_low=0.05, clip_high=0.05, aggregation="token"),
}
OF_CASES = (*LOSSES.items(), ("segment", lambda: SegmentLoss(clip_low=0.05, clip_high=0.05)))
BIN_LENGTH = 64  # of the measurements below


def everything(num_cases):
    """Of every way to use the ranks."""
    meshes = MESHES.get(dist.get_world_size(), {"1x1": (1, 1)})
    built = {
        name: Ranks.of(CPU, replicate=replicate, context=context)
        for name, (replicate, context) in meshes.items()
    }
    return {
        "cases": {
            name: [random_case(ranks, seed) for seed in range(num_cases)]
            for name, ranks in built.items()
        },
        "steps": {
            (name, loss): train(ranks, loss) for name, ranks in built.items() for loss in LOSSES
        },
        "cost": {name: cost(ranks) for name, ranks in built.items()},
        "shared": {name: shared(ranks) for name, ranks in built.items()},
    }


def random_documents(rng):
    """Draws one to six documents of 2 to 60 tokens.

    Some share a prompt. Their spans of labels have gaps between them.
    """
    documents = []
    for group in range(rng.randint(1, 3)):
        prompt = [rng.randrange(tiny_policy.VOCAB_SIZE) for _ in range(rng.choice([1, 2, 7, 20]))]
        for _ in range(rng.randint(1, 2)):
            completion = [
                rng.randrange(tiny_policy.VOCAB_SIZE)
                for _ in range(rng.choice([1, 2, 8, 16, 31, 40]))
            ]
            logps = [rng.gauss(-4.1, 0.3) for _ in completion]
            advantage, temperature = rng.choice([-1.3, 0.0, 0.7, 2.0]), rng.choice([0.7, 1.0])
            documents.append(
                Document(
                    prompt + completion,
                    len(prompt),
                    logps,
                    advantage,
                    0.0,
                    temperature,
                    0,
                    f"p{group}",
                    group,
                )
            )
    return documents


def random_batch(rng):
    """Packs random documents into one bin or several.

    A document may end where its bin ends. Some tokens of a completion are not trained.
    """
    documents = random_documents(rng)
    longest = max(d.num_slots for d in documents)
    bin_length = rng.choice([None, longest, longest + rng.randint(0, 9), 4 * -(-longest // 4), 128])
    batch = pack_documents(documents, bin_length, share_prompts=rng.random() < 0.7)
    holes = torch.tensor([rng.random() < 0.15 for _ in range(batch.tokens.numel())])
    holes &= batch.label_counts[batch.document_index] > 1
    batch.loss_mask &= ~holes
    counts = torch.zeros_like(batch.label_counts).index_add(
        0, batch.document_index, batch.loss_mask.long()
    )
    batch.label_counts = counts
    return batch


def random_case(ranks, seed):
    """The largest error of any gradient and of the loss, relative to a policy that is not split."""
    axis, data_rank = ranks.context, ranks.data_rank
    name, build_loss = OF_CASES[seed // 3 % 3]
    loss, heads = build_loss(), {"num_kv_heads": (1, 2, 4)[seed % 3]}
    batches = [
        random_batch(random.Random(100 * seed + rank)) for rank in range(ranks.num_data_ranks)
    ]
    denominator = loss.denominator(7, 50)
    for batch in batches:
        batch.ref_logps = batch.old_logps - 0.2 if name == "gspo" else None
        if (
            name == "segment"
        ):  # their slots as they come, some segments empty, over both ends of a rank's part
            draw = torch.Generator().manual_seed(seed)
            batch.segment_index = 4 * batch.document_index + torch.randint(
                4, batch.tokens.shape, generator=draw
            )
            batch.segment_advantages = torch.randn(4 * batch.advantages.numel(), generator=draw)
    plain = Policy(tiny_policy.build_decoder(**heads), loss, kernel="reference")
    plain.decoder.load_state_dict(tiny_policy.weights(**heads))
    expected_loss = (
        sum(plain(Microbatch.prepare(batch, CPU)).loss for batch in batches) / denominator
    )
    expected_loss.backward()

    policy = build_policy(
        build_loss(), ranks=ranks, chunk_size=(4096, 5, 16)[seed // 2 % 3], **heads
    )
    in_blocks = seed % 4 == 0  # the attention of a GPU: one case of each loss, and one more
    microbatch = Microbatch.prepare(batches[data_rank], CPU, axis, in_blocks=in_blocks)
    with flex_on_cpu():
        (output,) = accumulate_gradients(policy, [microbatch], denominator)
    value = StepMetrics([output.metrics]).reduce()["loss"]
    errors = [
        float((p.grad.full_tensor() - want.grad).norm() / want.grad.norm().clamp(min=1e-6))
        for p, want in zip(policy.decoder.parameters(), plain.decoder.parameters(), strict=True)
    ]
    return max(errors), abs(value - expected_loss.item())


def train(ranks, loss_name, num_steps=3):
    """Loss and metrics of ``num_steps`` optimizer steps, and the gradient of one more."""
    loss = LOSSES[loss_name]()
    policy, axis = build_policy(loss, ranks=ranks, dtype=torch.float32), ranks.context
    rank, num_ranks = ranks.data_rank, ranks.num_data_ranks
    documents = tiny_policy.documents()
    batch = pack_documents([d for d in documents if d.group_id % num_ranks == rank], 48)
    batch.ref_logps = batch.old_logps - 0.1 if loss.kl_coef else None
    microbatch = Microbatch.prepare(batch, CPU, axis)
    denominator = loss.denominator(len(documents), sum(len(d.logps) for d in documents))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, eps=1e-3)
    found = []
    for _ in range(num_steps + 1):
        optimizer.zero_grad()
        sums = StepMetrics()
        for output in accumulate_gradients(policy, [microbatch], denominator):
            sums.add(output.metrics)
        grads = {
            name: p.grad.full_tensor().numpy() for name, p in policy.decoder.named_parameters()
        }
        found.append((sums.reduce(), grads))
        optimizer.step()
    return found


class Collectives(TorchDispatchMode):
    """Counts the elements that each kind of collective hands to this rank.

    FSDP's own collectives go by other operators.
    """

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "all_gather_into_tensor" in str(func) and "c10d_functional" in str(func):
            self.elements[func.__name__.partition(".")[0]] += out.numel()
        return out


def cost(ranks):
    """Counts the elements that one forward gathers, and the bytes that it keeps for the backward.

    The bytes are of hidden states, with checkpointing and without.
    """
    axis = ranks.context
    documents = [d for d in tiny_policy.documents() if d.group_id % 2]
    batch = pack_documents(documents, BIN_LENGTH)
    found = {"slots": batch.tokens.numel()}
    for checkpointed in (False, True):
        policy = build_policy(LOSSES["gspo"](), ranks=ranks, activation_checkpointing=checkpointed)
        microbatch = Microbatch.prepare(batch, CPU, axis)
        parameters = {p.to_local().untyped_storage().data_ptr() for p in policy.parameters()}
        kept = {}

        def keep(x, kept=kept, parameters=parameters):
            storage = x.untyped_storage()
            if x.dim() == 3 and x.dtype == torch.float32 and storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with (
            Collectives() as collectives,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            policy(microbatch)
        found["checkpointed" if checkpointed else "kept"] = sum(kept.values())
        found["collectives"] = dict(collectives.elements)
    return found


def shared(ranks):
    """Returns this rank's microbatches, and whether values survive a split and a collect.

    The first rank of the context axis draws each microbatch.
    """
    axis, rank = ranks.context, ranks.data_rank
    documents = tiny_policy.documents(6, seed=rank)
    source = Items(lambda i: pack_documents(documents[: 2 * i], 48), 3) if axis.rank == 0 else None
    node = ShareOverContext(source, axis)
    batches = list(node)
    node.reset()
    next(node)
    state = node.state_dict()
    rest = list(node)
    node.reset(state)
    resumed = list(node)
    whole = batches[-1]
    shard = split(whole, axis)
    collected = shard.collect(shard.part.positions.float(), axis)
    return {
        "data_rank": rank,
        "tokens": [b.tokens.tolist() for b in batches],
        "rest": [b.tokens.tolist() for b in rest],
        "resumed": [b.tokens.tolist() for b in resumed],
        "collected": torch.equal(collected, shard.whole.positions.float()),
    }
