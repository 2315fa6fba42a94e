"""Optimizer steps drawn from ragged sources, on the ranks of this process group."""

import torch
import torch.distributed as dist

from gspo.data.layout import Document, pack_documents
from gspo.data.pack import Pack
from gspo.data.steps import FetchSteps
from gspo.metrics import Mean
from gspo.types import Group, GroupBatch, Prompt
from tests.data.fakes import Items, completion, exact
from tests.data.law import assert_resumes_anywhere

CPU = torch.device("cpu")

# Documents in each microbatch, a list a rank; a rank beyond the lists has a source without an item.
SOURCES = {
    "ragged": [
        [3, 1, 4, 1, 5, 2, 6],
        [2, 7, 1, 8, 2, 8, 1],
        [1, 4, 1, 4, 2, 1, 3],
        [5, 7, 7, 2, 1, 5, 6],
    ],
    "empty_for_a_while": [[4, 4, 4, 4], [0, 0, 3, 3], [1, 0, 0, 1], [0, 0, 0, 9]],
    "ends_first": [[3, 3, 3, 3, 3], [2], [1, 1, 1], []],
    "nothing": [[0, 0], [0], [], [0]],
}

# Each rank has a list here: the number of live documents in each of its rollouts.
# The others of ROLLOUT_SIZE were dropped. Three documents fit into a microbatch.
LIVE = [[1, 9, 0, 4], [9, 2, 3], [0, 5, 9, 7, 3], [6, 1, 0, 9]]
ROLLOUT_SIZE = 9


def batch(num_documents, dropped):
    """Packs ``num_documents`` documents of 1, 2, ... tokens.

    The first ``dropped`` of them were taken out before the update.
    """
    documents = [
        Document([1, *range(2, 3 + i)], 1, [-1.0] * (i + 1), 1.0, 0.0, 1.0, 0, "p", i)
        for i in range(num_documents)
    ]
    packed = pack_documents(documents[dropped:])
    packed.num_documents += dropped
    packed.num_label_tokens += sum(len(d.logps) for d in documents[:dropped])
    return packed


def everything(docs_per_step, docs_per_step_of_rollouts):
    """Both kinds of sources in one process group."""
    rollouts = {docs: draw_rollouts(docs) for docs in docs_per_step_of_rollouts}
    return {"rollouts": rollouts, "sources": draw_all(docs_per_step)}


def draw_rollouts(docs_per_step):
    """Returns the rounds in which this rank drew a rollout, and the staleness by step.

    The staleness tells how many steps ago the documents of a step were sampled.
    """
    num_rounds, drawn, staleness = 0, [], []
    for step in FetchSteps(rollouts(lambda: len(staleness)), docs_per_step=docs_per_step):
        drawn += [num_rounds + i for i, b in enumerate(step.batches) if "drawn" in b.stats]
        versions = {v for b in step.batches for v in b.policy_version[: len(b.ids)].tolist()}
        staleness.append({len(staleness) - version for version in versions})
        num_rounds += len(step.batches)
    return {"drawn": drawn, "staleness": staleness}


def rollouts(version):
    """Microbatches of this rank's rollouts, sampled from the weights ``version()``."""
    live = LIVE[dist.get_rank()]

    def make(index):
        dropped = ROLLOUT_SIZE - live[index]
        completions = [completion(8, policy_version=version()) for _ in range(live[index])]
        groups = [Group(i, Prompt(f"p:{index}", "", [1]), [c]) for i, c in enumerate(completions)]
        return GroupBatch(
            groups, {"drawn": Mean(index, 1)}, dropped_documents=dropped, dropped_tokens=8 * dropped
        )

    return Pack(Items(make, len(live)), tokens_per_microbatch=24, bin_length=24)


def resume_anywhere(docs_per_step):
    """The law of the data graph, on all ranks at once."""
    assert_resumes_anywhere(
        lambda: FetchSteps(rollouts(lambda: 0), docs_per_step=docs_per_step),
        20,
        key=exact,
    )


def draw_all(docs_per_step):
    """Every step of every source: what this rank got of it and the totals it was told."""
    rank = dist.get_rank()
    return {
        name: _steps(counts[rank] if rank < len(counts) else [], docs_per_step)
        for name, counts in SOURCES.items()
    }


def _steps(counts, docs_per_step):
    source = Items(lambda i: batch(counts[i], dropped=min(counts[i], i % 2)), len(counts))
    steps = []
    for step in FetchSteps(source, docs_per_step=docs_per_step):
        mine = [(b.num_documents, b.num_label_tokens) for b in step.batches]
        steps.append(
            {
                "mine": mine,
                "num_documents": step.num_documents,
                "num_label_tokens": step.num_label_tokens,
            }
        )
    return steps
