"""Counts of what each path of the loss head multiplies and holds, on the operations it issues."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gspo.kernels import head
from gspo.kernels.rows import PLAIN
from tests.kernels import heads

SIZE = 256, 16, 521  # T, H, V
UNIT = 2 * 256 * 16 * 521
DOCUMENT = 8  # rows


def case(dead_share):
    """Documents of 8 rows, the first of which have no coefficient."""
    values = heads.inputs(SIZE)
    num_documents = SIZE[0] // DOCUMENT
    coefficients = torch.ones(num_documents)
    coefficients[: round(dead_share * num_documents)] = 0
    coefficients = coefficients[
        torch.randperm(num_documents, generator=torch.Generator().manual_seed(0))
    ]

    def loss_function(logps, entropy, first, last):
        return (coefficients[first:last].repeat_interleave(DOCUMENT) * logps).sum(), None

    return values, [DOCUMENT] * num_documents, loss_function


def run(path, dead_share, *, chunk_size=64, frozen=False):
    (hidden, weight, *rest), counts, loss_function = case(dead_share)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    options = {"kernels": PLAIN, "chunk_size": chunk_size}
    if path == "linear_loss":
        loss, _ = head.linear_loss(hidden, weight, *rest, counts, loss_function, **options)
    else:
        loss, _ = loss_function(
            head.linear_logps(hidden, weight, *rest, **options)[0], None, 0, len(counts)
        )
    loss.backward()


def units(*args, **options):
    with FlopCounterMode(display=False) as counter:
        run(*args, **options)
    return counter.get_total_flops() / UNIT


@pytest.mark.parametrize("dead_share", [0.0, 0.25, 0.5, 1.0])
def test_linear_loss_takes_3_minus_2f_products(dead_share):
    assert units("linear_loss", dead_share) == 3 - 2 * dead_share


@pytest.mark.parametrize("dead_share", [0.0, 0.25, 0.5, 1.0])
def test_linear_logps_takes_4_minus_3f_products(dead_share):
    assert units("linear_logps", dead_share) == 4 - 3 * dead_share


def test_a_frozen_head_saves_a_product():
    assert units("linear_loss", 0.5, frozen=True) == 1.5
    assert units("linear_logps", 0.5, frozen=True) == 2


def test_documents_longer_than_a_chunk_cost_their_rows_again_but_for_the_last_chunk():
    assert units("linear_loss", 0.0, chunk_size=4) == 3.5
    assert units("linear_loss", 0.0, chunk_size=2) == 3.75


@pytest.mark.parametrize(
    ("label_counts", "rows"),
    [
        ([4, 4, 4, 4, 4], [12, 8]),
        ([16, 1, 1], [16, 2]),
        ([3, 40, 0, 5], [3, 40, 5]),  # longer than a chunk
        ([1, 0, 0], [1]),
        ([0, 0], []),
    ],
)
def test_chunks_are_few_and_even(label_counts, rows):
    chunks = head._even_chunks(label_counts, 16)
    assert [chunk.stop - chunk.start for chunk in chunks] == rows
    documents = [i for chunk in chunks for i in range(chunk.first, chunk.last)]
    assert not rows or documents == list(range(len(label_counts)))


def test_long_documents_without_a_coefficient_cost_nothing_more():
    assert units("linear_loss", 1.0, chunk_size=4) == 1
    assert units("linear_loss", 0.5, chunk_size=4) == 2.25


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("path", ["linear_loss", "linear_logps"])
def test_nothing_is_larger_than_a_chunk_of_logits(path):
    with Largest() as largest:
        run(path, 0.5, chunk_size=32)
    assert largest.elements == 32 * (SIZE[2] + head._ROW_GAP) < SIZE[0] * SIZE[2]


def test_logits_logps_multiplies_nothing_and_writes_over_its_logits():
    hidden, weight, *rest = heads.inputs(SIZE)
    logits = (hidden @ weight.T).requires_grad_()
    memory = logits * 1  # not a leaf, as a model gives it
    with FlopCounterMode(display=False) as counter:
        logps, _ = head.logits_logps(memory, *rest, kernels=PLAIN)
        (grad,) = torch.autograd.grad(logps.sum(), memory)
    assert counter.get_total_flops() == 0
    assert grad.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize("path", ["linear_loss", "linear_logps"])
@pytest.mark.parametrize("dead_share", [0.5, 1.0])
def test_what_the_buffer_held_before_does_not_matter(monkeypatch, path, dead_share):
    (hidden, weight, *rest), counts, loss_function = case(dead_share)

    def gradients():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"kernels": PLAIN, "chunk_size": 48}
        if path == "linear_loss":
            loss, _ = head.linear_loss(*leaves, *rest, counts, loss_function, **options)
        else:
            loss, _ = loss_function(
                head.linear_logps(*leaves, *rest, **options)[0], None, 0, len(counts)
            )
        return torch.autograd.grad(loss, leaves)

    expected = gradients()
    empty = torch.Tensor.new_empty
    poisoned = []

    def new_empty(self, *size, **kwargs):
        poisoned.append(size)
        return empty(self, *size, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    found = gradients()
    assert poisoned and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
