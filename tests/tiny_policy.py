"""A policy small enough for every arrangement of a test, and documents for it."""

import torch
from torchtune.models.qwen2 import qwen2

from gspo.data.layout import Document

VOCAB_SIZE = 61


def build_decoder(*, tied=True, num_kv_heads=2, embed_dim=32):
    return qwen2(
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=48,
        max_seq_len=512,
        tie_word_embeddings=tied,
    )


def weights(*, tied=True, num_kv_heads=2, embed_dim=32, seed=0):
    """The weights every rank starts from."""
    torch.manual_seed(seed)
    decoder = build_decoder(tied=tied, num_kv_heads=num_kv_heads, embed_dim=embed_dim)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return {name: value.clone() for name, value in decoder.state_dict().items()}


def documents(count=14, *, seed=0, temperature=0.7, group_size=3):
    """Draws ragged documents in groups.

    Their old log-probabilities are near those of a policy of that size.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def tokens(length):
        return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()

    drawn = []
    for i in range(count):
        if i % group_size == 0:
            prompt = tokens(integer(1, 9))
        completion = integer(1, 23)
        drawn.append(
            Document(
                tokens=prompt + tokens(completion),
                num_prompt_tokens=len(prompt),
                logps=(-4.1 + 0.3 * torch.randn(completion, generator=generator)).tolist(),
                advantage=float(torch.randn((), generator=generator)),
                reward=0.0,
                temperature=temperature if i % 3 else 1.0,
                policy_version=0,
                prompt_id=f"p{i // group_size}",
                group_id=i // group_size,
            )
        )
    return drawn
