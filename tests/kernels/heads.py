"""Inputs of a loss head, its float64 restatement, and gradients, for the tests of every backend."""

import torch

from gspo.kernels import linear_loss

LOW = HIGH = 0.2


def inputs(size, *, dtype=torch.float32, scale=1.0):
    """Return hidden [T, H], weight [V, H], labels [T], temperature [T] of ``size`` (T, H, V)."""
    num_tokens, hidden_size, vocab_size = size
    generator = torch.Generator().manual_seed(sum(size))
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = scale * torch.randn(vocab_size, hidden_size, generator=generator)
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    temperature = 0.5 + torch.rand(num_tokens, generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels, temperature


def restated(hidden, weight, labels, temperature):
    """Return log-probabilities and entropies in float64, from all logits."""
    return restated_logits(hidden.double() @ weight.double().T, labels, temperature)


def restated_logits(logits, labels, temperature):
    logits = logits.double() / temperature.double()[:, None]
    largest = logits.amax(-1, keepdim=True)
    all_logps = logits - largest - (logits - largest).exp().sum(-1, keepdim=True).log()
    p = all_logps.exp()
    entropy = -(p * all_logps.clamp(min=-1e300)).sum(-1)
    return all_logps.gather(-1, labels[:, None]).squeeze(-1), entropy


def mixed(logps, entropy, weights):
    """Return the sum of both outputs with fixed weights, some of them 0."""
    return (weights[0] * logps).sum() + (weights[1] * entropy).sum()


def mix_weights(num_rows, *, zeros=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, num_rows, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(num_rows, generator=generator) < zeros, 0.0, weights)


def gradients(function, weights, *values):
    """Return what ``function(*values)`` does, and the gradients of its mix.

    They are by the first two values, or by the first if one only is followed by two others.
    """
    leaves = [x.detach().clone().requires_grad_() for x in values if x.is_floating_point()][
        : len(values) - 2
    ]
    rest = values[len(leaves) :]
    logps, entropy = function(*[leaf * 1 for leaf in leaves], *rest)
    found = torch.autograd.grad(mixed(logps, entropy, weights.to(logps.dtype)), leaves)
    return logps.detach(), entropy.detach(), *found


def relative(found, expected):
    """Return the relative Frobenius error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def documents(num_rows, *, seed=0, longest=9):
    """Return row counts of documents that make up ``num_rows``, some of 0 and of 1."""
    generator = torch.Generator().manual_seed(seed)
    counts = []
    while (left := num_rows - sum(counts)) > 0:
        counts.append(min(left, int(torch.randint(0, longest + 1, (), generator=generator))))
    return counts


def sequence_loss(old_logps, advantages, label_counts, entropy_coef=0.0):
    """Return a clipped sequence objective written down by itself, as a loss function.

    Its second result is the number of clipped documents.
    """

    def loss_function(logps, entropy, first, last):
        loss = logps.new_zeros(())
        start = sum(label_counts[:first])
        begin = start
        clipped = 0
        for d in range(first, last):
            stop = start + label_counts[d]
            if stop > start:
                new = logps[start - begin : stop - begin]
                ratio = (new - old_logps[start:stop].to(new.dtype)).mean().exp()
                a = advantages[d].to(new.dtype)
                loss = loss - torch.minimum(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
                loss = loss - entropy_coef * entropy[start - begin : stop - begin].mean()
                clipped += int((ratio * a > ratio.clamp(1 - LOW, 1 + HIGH) * a).item())
            start = stop
        return loss, clipped

    return loss_function


def loss_and_gradients(values, counts, loss_function, **options):
    """Return the loss, the clipped documents, and the gradients of three times the loss."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in values[:2])
    loss, clipped = linear_loss(hidden, weight, *values[2:], counts, loss_function, **options)
    (3.0 * loss).backward()
    return float(loss.detach()), sum(clipped), hidden.grad, weight.grad


def restated_loss(values, counts, loss_function):
    """Return the same in float64, from all logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in values[:2])
    loss, clipped = loss_function(*restated(hidden, weight, *values[2:]), 0, len(counts))
    (3.0 * loss).backward()
    return float(loss.detach()), clipped, hidden.grad, weight.grad


def gradients_beside_a_spoiled_row(function, value, *, device="cpu", **options):
    """Return gradients with a row of ``value`` that has no coefficient, and those without the row.

    The row's own gradient, which must be 0, stands beside zeros.
    """
    hidden, weight, labels, temperature = (x.to(device) for x in inputs((21, 16, 61)))
    if function.__name__ == "logits_logps":
        hidden, weight = hidden @ weight.T, None
    clean = torch.arange(21, device=device) != 9
    spoiled = hidden.clone()
    spoiled[9] = value
    d_spoiled, d_weight = _sum_gradients(
        function, (spoiled, weight, labels, temperature), clean, options
    )
    rows = (hidden[clean], weight, labels[clean], temperature[clean])
    d_clean, expected = _sum_gradients(function, rows, clean[clean], options)
    pairs = [(d_spoiled[clean], d_clean), (d_spoiled[9], torch.zeros_like(d_spoiled[9]))]
    return pairs if weight is None else [*pairs, (d_weight, expected)]


def _sum_gradients(function, values, counted, options):
    """Return the gradients of the sum of the log-probabilities of the rows that are counted."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in values[:2]]
    arguments = [leaf * 1 for leaf in leaves if leaf is not None] + list(values[2:])
    if function is linear_loss:
        counts = [1] * len(counted)

        def loss_function(logps, entropy, first, last):
            return torch.where(counted[first:last], logps, 0.0).sum(), 0

        loss, _ = function(*arguments, counts, loss_function, **options)
    else:
        logps, _ = function(*arguments, **options)
        loss = torch.where(counted, logps, 0.0).sum()
    loss.backward()
    return [None if leaf is None else leaf.grad for leaf in leaves]
