"""Float64 restatements of the objectives, document by document, and documents to try them on."""

import math

import torch

from gspo.losses.inputs import LossInputs, find_segments


def random_documents(lengths, *, seed=0, scale=0.3, prompt=2):
    """Log-probabilities, masks and advantages; the first ``prompt`` slots have no label."""
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
    for document in documents:  # drawn last, so that the others are the same without
        length = document["old"].numel()
        document["token_advantage"] = randn(length)
        document["segment"] = torch.arange(length) // 3 % 4  # one may go on after another
    return documents


def pack(documents, *, padding=3, per_token=False, with_segments=False):
    """The documents laid end to end, with a padding document last, as the packer lays them."""
    index = [torch.full_like(d["old"], i, dtype=torch.int64) for i, d in enumerate(documents)]
    index.append(torch.full((padding,), len(documents)))
    blank = torch.zeros(padding, dtype=torch.float64)
    flat = {
        k: torch.cat([d[k] for d in documents] + [blank]) for k in ("old", "new", "ref", "entropy")
    }
    mask = torch.cat([d["mask"] for d in documents] + [blank.bool()])
    zero = torch.zeros(1, dtype=torch.float64)
    document_index = torch.cat(index)
    segment = torch.cat([d["segment"] for d in documents] + [blank.long()])
    token_advantages = torch.cat([d["token_advantage"] for d in documents] + [blank])
    inputs = LossInputs(
        document_index=document_index,
        loss_mask=mask,
        old_logps=flat["old"],
        advantages=torch.cat([torch.stack([d["advantage"] for d in documents]), zero]),
        label_counts=torch.tensor([int(d["mask"].sum()) for d in documents] + [0]),
        ref_logps=flat["ref"],
        # Numbered backwards through the batch, some without a label: an order is not asked for.
        segments=find_segments(
            7 * (len(documents) - document_index) - segment, document_index, mask
        )
        if with_segments
        else None,
        token_advantages=token_advantages if per_token else None,
    )
    return flat["new"], flat["entropy"], inputs


def clipped(ratio, advantage, low, high, dual=None):
    """-min(r A, clip(r) A) of one number, with branches instead of tensor functions."""
    if dual is not None and advantage < 0 and ratio > dual:
        return -advantage * dual
    if advantage >= 0:
        return -advantage * ratio if ratio <= 1 + high else -advantage * (1 + high)
    return -advantage * ratio if ratio >= 1 - low else -advantage * (1 - low)


def weight(document, aggregation):
    """What a document weighs."""
    return 1.0 if aggregation == "document" else float(document["mask"].sum())


def bounded_exp(exponent, bound, below=True):
    """exp of a number in a range, constant outside it."""
    if exponent > bound:
        return torch.tensor(math.exp(bound), dtype=torch.float64)
    return torch.tensor(math.exp(-bound)) if below and exponent < -bound else torch.exp(exponent)


def trained(documents):
    """Each document that has labels with its log-ratios there."""
    for d in documents:
        if d["mask"].any():
            yield d, (d["new"] - d["old"])[d["mask"]]


def advantages(document, per_token):
    """One for each label."""
    if per_token:
        return document["token_advantage"][document["mask"]]
    return document["advantage"].expand(int(document["mask"].sum()))


def gspo(
    documents,
    *,
    low,
    high,
    aggregation="document",
    bound=10.0,
    exponent=1.0,
    dual=None,
    per_token=False,
    unclipped=False,
):
    """The undivided GSPO sum."""
    total = 0.0
    for d, log_ratio in trained(documents):
        ratio = bounded_exp(log_ratio.sum() / len(log_ratio) ** exponent, bound)
        advantage = advantages(d, per_token).mean()
        term = -ratio * advantage if unclipped else clipped(ratio, advantage, low, high, dual)
        total = total + weight(d, aggregation) * term
    return total


def weighted_logp(ratio, log_ratio, advantage, low, high, dual=None):
    """A term with the value of a constant ratio and a gradient through the log-probability."""
    value = torch.as_tensor(ratio, dtype=torch.float64).detach().requires_grad_()
    term = clipped(value, advantage, low, high, dual)
    slope = torch.autograd.grad(term, value, allow_unused=True)[0] if term.requires_grad else None
    return term.detach() + (
        0.0 if slope is None else slope * value.detach() * (log_ratio - log_ratio.detach())
    )


def mix(
    documents,
    *,
    low,
    high,
    aggregation="document",
    share=0.0,
    bound=10.0,
    below=True,
    dual=None,
    per_token=False,
):
    """The undivided sum with the ratio exp(a l + (1 - a) mean l): 0 is GSPO-token, 1 GRPO."""
    total = 0.0
    for d, log_ratio in trained(documents):
        for one, advantage in zip(log_ratio, advantages(d, per_token), strict=True):
            exponent = share * one.detach() + (1 - share) * log_ratio.detach().mean()
            inside = exponent <= bound and (exponent >= -bound or not below)
            gradient = one if inside else one.detach()
            term = weighted_logp(
                bounded_exp(exponent, bound, below), gradient, advantage, low, high, dual
            )
            total = total + weight(d, aggregation) / len(log_ratio) * term
    return total


def grpo(
    documents,
    *,
    low,
    high,
    aggregation="document",
    bound=10.0,
    dual=None,
    per_token=False,
    unclipped=False,
):
    """The undivided GRPO sum."""
    total = 0.0
    for d, log_ratio in trained(documents):
        for one, advantage in zip(log_ratio, advantages(d, per_token), strict=True):
            ratio = bounded_exp(one, bound)
            term = -ratio * advantage if unclipped else clipped(ratio, advantage, low, high, dual)
            total = total + weight(d, aggregation) / len(log_ratio) * term
    return total


def cispo(documents, *, low, high, aggregation="token", bound=10.0, per_token=False):
    """The undivided CISPO sum; a width of None is infinite."""
    total = 0.0
    for d, log_ratio in trained(documents):
        rows = zip(log_ratio, d["new"][d["mask"]], advantages(d, per_token), strict=True)
        for one, logp, advantage in rows:
            ratio = bounded_exp(one.detach(), bound)
            if high is not None and ratio > 1 + high:
                ratio = 1 + high
            if low is not None and ratio < 1 - low:
                ratio = 1 - low
            total = total - weight(d, aggregation) / len(log_ratio) * ratio * advantage * logp
    return total


def fspo(documents, *, low, high, aggregation="document", bound=40.0, per_token=False):
    """The undivided FSPO sum."""
    total = 0.0
    for d, log_ratio in trained(documents):
        product, root = log_ratio.sum(), math.sqrt(len(log_ratio))
        advantage = advantages(d, per_token).mean()
        term = -bounded_exp(product, bound) * advantage
        if advantage >= 0 and product > high * root:
            term = -math.exp(min(high * root, bound)) * advantage
        if advantage < 0 and product < -low * root:
            term = -math.exp(max(-low * root, -bound)) * advantage
        total = total + weight(d, aggregation) * term
    return total


def segments(documents, *, low, high, aggregation="document", dual=None, per_token=False):
    """The undivided sum with a ratio per segment.

    A segment weighs as its document times its share of the labels.
    """
    total = 0.0
    for d, log_ratio in trained(documents):
        segment, of_tokens = d["segment"][d["mask"]], advantages(d, per_token)
        for s in sorted(set(segment.tolist())):
            inside = segment == s
            ratio = torch.exp(log_ratio[inside].mean())
            share = int(inside.sum()) / len(segment)
            term = clipped(ratio, of_tokens[inside].mean(), low, high, dual)
            total = total + weight(d, aggregation) * share * term
    return total


def penalties(documents, *, kl_coef, estimator, entropy_coef, aggregation="document"):
    """KL and entropy terms, undivided."""
    total = 0.0
    for d in documents:
        if not d["mask"].any():
            continue
        delta = (d["ref"] - d["new"])[d["mask"]]
        kl = {"k1": -delta, "k2": delta**2 / 2, "k3": torch.exp(delta) - delta - 1}[estimator]
        total = total + weight(d, aggregation) * (
            kl_coef * kl.mean() - entropy_coef * d["entropy"][d["mask"]].mean()
        )
    return total
