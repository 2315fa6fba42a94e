"""Runs the recipe's update on the ranks of this process group.

Some updates have numbers that are not finite.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from gspo import parallel
from gspo import update as update_module
from gspo.data.layout import Document, pack_documents
from gspo.data.steps import StepBatches
from gspo.errors import InputError
from tests.recipes import runs

SPOILED = 3  # which document
RARE_TOKEN = 200  # in no other document


def documents():
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(8):
        size = 3 + i
        tokens = torch.randint(0, 150, (4 + size,), generator=generator).tolist()
        tokens[0] = RARE_TOKEN if i == SPOILED else tokens[0]
        logps = (-5.6 + 0.1 * torch.randn(size, generator=generator)).tolist()
        advantage = float(torch.randn((), generator=generator))
        found.append(Document(tokens, 4, logps, advantage, 0.0, 1.0, 0, f"p{i}", i))
    return found


def build(base, output_dir, loss, *more):
    """A recipe inside the process group that is there."""
    module = runs.load_recipe()
    parallel.init_process_group = lambda *_: None
    arguments = runs.overrides(
        base, output_dir, f"loss={loss}", "loss.aggregation=token", "max_skipped_steps=1", *more
    )
    monkeypatch = type("patch", (), {"setattr": staticmethod(setattr)})
    recipe = runs.build(module, monkeypatch, *arguments)
    recipe.setup()
    return recipe


def update(recipe, how):
    """One update in two microbatches; what it reported, and the gradient that the optimizer got."""
    kept = documents()
    if how == "absent":
        del kept[SPOILED]
    elif how == "infinite_old_logps":
        kept[SPOILED] = replace(kept[SPOILED], logps=[*kept[SPOILED].logps[:-1], float("inf")])
    ranks = recipe._ranks
    mine = kept[ranks.data_rank :: ranks.num_data_ranks]
    batches = [pack_documents(mine[i::2], 16) for i in (0, 1)]
    totals = [len(kept), sum(len(d.logps) for d in kept)]
    found = {}
    clip = update_module.clip_gradients

    def keep_gradient(policy, max_norm):
        found["grads"] = {
            n: p.grad.full_tensor().clone().numpy() for n, p in policy.decoder.named_parameters()
        }
        return clip(policy, max_norm)

    update_module.clip_gradients = keep_gradient
    try:
        microbatches = [recipe._prepare(b) for b in batches]
        found |= recipe._update(microbatches, StepBatches(batches, *totals), [])
    finally:
        update_module.clip_gradients = clip
    return found


def updates(base, output_dir, loss, *more):
    """The same weights updated without the document, and with it spoiled."""
    found = {}
    for how in ("absent", "infinite_old_logps"):
        found[how] = update(build(Path(base), Path(output_dir), loss, *more), how)
    return found


def skipped(base, output_dir, *more):
    """Steps a model that gives one document NaN.

    Then it steps with a gradient that is infinite on one rank only.
    """
    recipe = build(Path(base), Path(output_dir), "gspo.losses.GSPOLoss", *more)
    decoder = recipe._policy.decoder
    embedding = decoder.tok_embeddings.weight
    local, first = embedding.to_local(), dist.get_rank() * embedding.to_local().shape[0]

    def weights():
        return {name: p.full_tensor().clone() for name, p in decoder.named_parameters()}

    before = weights()
    if first <= RARE_TOKEN < first + local.shape[0]:
        local.data[RARE_TOKEN - first] = float("nan")
    nan = update(recipe, "whole")
    local.data.copy_(before["tok_embeddings.weight"][first : first + local.shape[0]])
    same = all(torch.equal(before[name], value) for name, value in weights().items())

    good = update(recipe, "whole")
    for rank in (0, dist.get_world_size() - 1):
        for p in recipe._policy.parameters():
            p.grad = torch.zeros_like(p)
        if dist.get_rank() == rank:
            next(iter(recipe._policy.parameters())).grad.to_local().view(-1)[:1] = float("inf")
        try:
            recipe._move_weights()
            message = None
        except InputError as error:
            message = str(error)
    counts = {"num_skipped": recipe._state.num_skipped, "message": message, "pid": os.getpid()}
    return {
        "nan": nan["grad_norm"],
        "quarantined": nan["quarantined_documents"],
        "same": same,
        **counts,
    } | {"good": good["grad_norm"]}


def seeds(base, output_dir):
    """Returns the seeds that this rank's optimizer draws from in two steps.

    The keys tell how the ranks are used.
    """
    found = {}
    for option in (
        "data_parallel_replicate_size=1",
        "data_parallel_replicate_size=2",
        "context_parallel_size=2",
    ):
        recipe = build(Path(base), Path(output_dir), "gspo.losses.GSPOLoss", option)
        drawn = found[option] = []
        recipe._optimizer.step = lambda drawn=drawn: drawn.append(torch.initial_seed())
        for p in recipe._policy.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(2):
            recipe._move_weights()
    return found
