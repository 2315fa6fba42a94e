"""What the memory tracker counts where a GPU does otherwise than the fake tensors' CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gspo.kernels import head, rows
from gspo.plan import memory_tracker as labels

NUM_ROWS, WIDTH, VOCAB = 7, 16, 33


@pytest.mark.parametrize(("on_gpu", "itemsize"), [(True, 2), (False, 4)], ids=["narrow", "widened"])
def test_operand_of_the_head_counts_as_long_as_the_head_holds_it(on_gpu, itemsize):
    shape = torch.Size((VOCAB, WIDTH))
    tracker = labels.MemoryTracker({shape}, shape, on_gpu=on_gpu)
    with FakeTensorMode():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        tokens = torch.zeros(NUM_ROWS, dtype=torch.int64)
        temperature = torch.ones(NUM_ROWS)
        with tracker:
            operand = torch.empty(NUM_ROWS, WIDTH, dtype=torch.bfloat16)
            made = head._Head(
                operand,
                weight,
                tokens,
                temperature,
                kernels=rows.PLAIN,
                buffer_rows=1,
                needs=head._NeedsGradient(False, False),
            )
            del operand
            held = tracker.held(labels.ACTIVATIONS) + tracker.held(labels.HEAD_HIDDEN)
            assert held == NUM_ROWS * WIDTH * itemsize
            del made
            assert tracker.held(labels.ACTIVATIONS) == tracker.held(labels.HEAD_HIDDEN) == 0
