"""Optimizer steps drawn from ragged sources, on the ranks of this process group."""

import torch
import torch.distributed as dist

from gspo.data.packing import Document, pack_documents
from gspo.parallel import fetch_step

CPU = torch.device("cpu")

# Documents in each microbatch, a list a rank; a rank beyond the lists has a source without an item.
SOURCES = {
    "ragged": [[3, 1, 4, 1, 5, 2, 6], [2, 7, 1, 8, 2, 8, 1], [1, 4, 1, 4, 2, 1, 3], [5, 7, 7, 2, 1, 5, 6]],
    "empty_for_a_while": [[4, 4, 4, 4], [0, 0, 3, 3], [1, 0, 0, 1], [0, 0, 0, 9]],
    "ends_first": [[3, 3, 3, 3, 3], [2], [1, 1, 1], []],
    "nothing": [[0, 0], [0], [], [0]],
}


def batch(num_documents, dropped):
    """``num_documents`` of 1, 2, ... tokens, of which ``dropped`` were taken out before the update."""
    documents = [
        Document([1, *range(2, 3 + i)], 1, [-1.0] * (i + 1), 1.0, 0.0, 1.0, 0, "p", i) for i in range(num_documents)
    ]
    packed = pack_documents(documents[dropped:])
    packed.num_documents += dropped
    packed.num_label_tokens += sum(len(d.logps) for d in documents[:dropped])
    return packed


def draw_all(docs_per_step):
    """Every step of every source: what this rank got of it and the totals it was told."""
    rank = dist.get_rank()
    return {name: _steps(counts[rank] if rank < len(counts) else [], docs_per_step) for name, counts in SOURCES.items()}


def _steps(counts, docs_per_step):
    source = iter([batch(count, dropped=min(count, i % 2)) for i, count in enumerate(counts)])
    steps = []
    while (step := fetch_step(source, docs_per_step=docs_per_step, device=CPU)) is not None:
        mine = [(b.num_documents, b.num_label_tokens) for b in step.batches]
        steps.append({"mine": mine, "num_documents": step.num_documents, "num_label_tokens": step.num_label_tokens})
    return steps
