"""The block mask of FlexAttention is torch's own, made without the dense one."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from gspo.data.layout import Document, pack_documents
from gspo.data.pack import Pack
from gspo.parallel import split
from gspo.parallel.context import ContextAxis
from gspo.policy import document_mask
from gspo.policy.mask import mask_mod
from tests import tiny_policy
from tests.data.fakes import Items
from tests.data.test_packing import random_rollout

CPU = torch.device("cpu")
TABLES = [
    f"{full}{axis}_{kind}"
    for full in ("", "full_")
    for axis in ("kv", "q")
    for kind in ("num_blocks", "indices")
]


def documents(rng, longest):
    drawn = []
    for group in range(rng.randint(1, 6)):
        prompt = rng.randint(1, longest)
        for _ in range(rng.randint(1, 4)):
            completion = rng.randint(1, longest)
            tokens, logps = [1] * (prompt + completion), [0.0] * completion
            drawn.append(Document(tokens, prompt, logps, 1.0, 0.0, 1.0, 0, f"p{group}", group))
    return drawn


def random_batch(seed):
    """Bins of one block and of many, cut by their ends or not, with shared prompts or without."""
    rng = random.Random(seed)
    drawn = documents(rng, rng.choice([5, 60, 300]))
    longest = max(document.num_slots for document in drawn)
    in_blocks = 128 * -(-longest // 128)
    bin_length = rng.choice([None, longest, longest + rng.randint(0, 9), in_blocks, 1280])
    return pack_documents(drawn, bin_length, share_prompts=rng.random() < 0.7)


@pytest.mark.parametrize("window", [None, 1, 7, 150])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_are_those_of_the_dense_mask(size, seed, window):
    batch = random_batch(seed)
    for rank in range(size):
        shard = split(batch, ContextAxis(None, rank, size))
        num_ranks, num_bins, share = shard.slots.shape
        mask = document_mask(shard, CPU, window=window, in_blocks=True)
        if mask is None:
            continue
        expected = create_block_mask(
            mask_mod(shard, CPU, window), num_bins, None, share, share * num_ranks, device="cpu"
        )
        assert mask.seq_lengths == expected.seq_lengths
        assert mask.BLOCK_SIZE == expected.BLOCK_SIZE
        for name in TABLES:
            assert torch.equal(getattr(mask, name), getattr(expected, name)), name


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_counts_the_tokens_of_a_document_through_its_prompt(window):
    """By hand, token by token, where documents share a prompt and where they do not."""
    batch = pack_documents(tiny_policy.documents(9), 48)
    assert batch.prefix_index is not None
    mask = document_mask(split(batch, None), CPU, window=window, in_blocks=False)
    index = batch.document_index.view(batch.num_bins, -1)
    positions = batch.positions.view(batch.num_bins, -1)
    for r in range(batch.num_bins):
        for q in range(48):
            document = int(index[r, q])
            own = {document, int(batch.prefix_index[document])}
            seen = [
                k <= q
                and int(index[r, k]) in own
                and int(positions[r, q]) - int(positions[r, k]) < window
                for k in range(48)
            ]
            assert mask[r, q].tolist() == seen


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


def test_no_tensor_has_a_number_for_each_query_and_key():
    length = 8192
    rng = random.Random(0)
    drawn = [document for _ in range(4) for document in documents(rng, 300)]
    shard = split(pack_documents(drawn, length), None)
    with Largest() as largest:
        assert document_mask(shard, CPU, in_blocks=True) is not None
    assert largest.num_bytes < length**2 / 100  # a dense mask has 1 byte each


def test_all_microbatches_of_rollouts_are_attended_with_one_compilation():
    """Whatever the documents and however many bins they need."""
    counter = CompileCounter()
    attend = torch.compile(flex_attention, backend=counter, dynamic=False)
    packer = Pack(
        Items(random_rollout, 9), tokens_per_microbatch=512, bin_length=256, fixed_shape=True
    )
    shapes = set()
    num_used = set()
    for batch in packer:
        shapes.add((batch.num_bins, batch.bin_length))
        used = batch.document_index.view(batch.num_bins, -1) != batch.padding_document
        num_used.add(int(used.any(1).sum()))
        q = torch.zeros(batch.num_bins, 1, batch.bin_length, 16)
        mask = document_mask(split(batch, None), CPU, in_blocks=True)
        if mask is not None:
            attend(q, q, q, block_mask=mask)
    assert shapes == {(2, 256)} and num_used == {0, 1, 2}
    assert counter.frame_count == 1
