"""Float64 restatements of the objectives, document by document, and documents to try them on."""

import math

import torch

from gspo.functional import LossInputs


def random_documents(lengths, *, seed=0, scale=0.3, prompt=2):
    """Old and new log-probabilities, masks and advantages of documents; the first ``prompt`` places have no label."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    documents = []
    for length in lengths:
        mask = torch.arange(length + prompt) >= prompt
        old = -randn(length + prompt).abs()
        documents.append(
            {
                "old": old,
                "new": old + scale * randn(length + prompt),
                "ref": old + scale * randn(length + prompt),
                "entropy": randn(length + prompt).abs(),
                "mask": mask,
                "advantage": randn(()),
            }
        )
    return documents


def pack(documents, *, padding=3):
    """The documents laid end to end, with a padding document last, as the packer lays them."""
    index = [torch.full_like(d["old"], i, dtype=torch.int64) for i, d in enumerate(documents)]
    index.append(torch.full((padding,), len(documents)))
    blank = torch.zeros(padding, dtype=torch.float64)
    flat = {k: torch.cat([d[k] for d in documents] + [blank]) for k in ("old", "new", "ref", "entropy")}
    mask = torch.cat([d["mask"] for d in documents] + [blank.bool()])
    zero = torch.zeros(1, dtype=torch.float64)
    inputs = LossInputs(
        document_index=torch.cat(index),
        loss_mask=mask,
        old_logps=flat["old"],
        advantages=torch.cat([torch.stack([d["advantage"] for d in documents]), zero]),
        label_counts=torch.tensor([int(d["mask"].sum()) for d in documents] + [0]),
        ref_logps=flat["ref"],
    )
    return flat["new"], flat["entropy"], inputs


def clipped(ratio, advantage, low, high):
    """-min(r A, clip(r) A) of one number, with branches instead of tensor functions."""
    if advantage >= 0:
        return -advantage * ratio if ratio <= 1 + high else -advantage * (1 + high)
    return -advantage * ratio if ratio >= 1 - low else -advantage * (1 - low)


def weight(document, aggregation):
    """What a document weighs."""
    return 1.0 if aggregation == "document" else float(document["mask"].sum())


def gspo(documents, *, low, high, aggregation="document", bound=10.0):
    """The undivided GSPO sum."""
    total = 0.0
    for d in documents:
        if not d["mask"].any():
            continue
        mean = (d["new"] - d["old"])[d["mask"]].mean()
        ratio = torch.exp(mean) if abs(mean) < bound else torch.tensor(math.exp(math.copysign(bound, mean)))
        total = total + weight(d, aggregation) * clipped(ratio, d["advantage"], low, high)
    return total


def grpo(documents, *, low, high, aggregation="document"):
    """The undivided GRPO sum."""
    total = 0.0
    for d in documents:
        count = int(d["mask"].sum())
        for new, old in zip(d["new"][d["mask"]], d["old"][d["mask"]], strict=True):
            term = clipped(torch.exp(new - old), d["advantage"], low, high)
            total = total + weight(d, aggregation) / count * term
    return total


def penalties(documents, *, kl_coef, estimator, entropy_coef, aggregation="document"):
    """KL and entropy terms, undivided."""
    total = 0.0
    for d in documents:
        if not d["mask"].any():
            continue
        delta = (d["ref"] - d["new"])[d["mask"]]
        kl = {"k1": -delta, "k2": delta**2 / 2, "k3": torch.exp(delta) - delta - 1}[estimator]
        total = total + weight(d, aggregation) * (kl_coef * kl.mean() - entropy_coef * d["entropy"][d["mask"]].mean())
    return total
