"""A transformers model run token by token over its own cache, without gradients.

It has the form of :class:`gspo.sampling.cached_decoder.CachedDecoder`, for the in-process sampler.
Prompts are padded on the left, as the library's own generation has them, so that windows and
columns count alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gspo.sampling.logits import float32_logits


class IncrementalCache:
    """The keys and values of N rows, with what the next step needs to know about each row.

    Args:
        layers: the library's cache.
        mask: [N, columns] int64, 1 for the columns that hold a token.
    """

    def __init__(self, layers: DynamicCache, mask: Tensor) -> None:
        self.layers = layers
        self.mask = mask

    def expand(self, rows: Tensor, room: int) -> None:
        """Take ``rows`` [M] int64, repeats allowed; the cache itself grows by the step."""
        self.select(rows)

    def select(self, rows: Tensor) -> None:
        """Keep ``rows`` [M] int64."""
        self.layers.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def add_column(self) -> None:
        """Count a token more in every row."""
        column = self.mask.new_ones(self.mask.shape[0], 1)
        self.mask = torch.cat([self.mask, column], 1)


class IncrementalCausalLM:
    """An incremental forward: ``prefill`` the prompts, then ``step`` one token per row.

    Args:
        decoder: made by :func:`gspo.models.huggingface.causal_lm`, whose parameters it shares. Its
            layers attend as the library has it from now on, so it is no policy any more.
        max_prefill_tokens: prompt tokens that go through at once.
    """

    def __init__(self, decoder: Any, *, max_prefill_tokens: int) -> None:
        config = decoder.config.get_text_config()
        has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
        decoder.set_attn_implementation("eager" if has_softcap else "sdpa")
        self.decoder = decoder
        self.max_prefill_tokens = max_prefill_tokens

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, IncrementalCache]:
        """Return logits [U, V] float32 of the token after each of U prompts, and their cache."""
        tokens, mask = _pad_left(prompts, self._device)
        num_prompts, longest = tokens.shape
        size = max(self.max_prefill_tokens // longest, 1)
        logits = []
        caches = []
        for start in range(0, num_prompts, size):
            rows = slice(start, start + size)
            layers = DynamicCache(config=self.decoder.config)
            logits.append(self._forward(tokens[rows], mask[rows], layers))
            caches.append(layers)
        return torch.cat(logits), IncrementalCache(_joined(caches), mask)

    def step(
        self,
        tokens: Tensor,  # [N] int64
        cache: IncrementalCache,
    ) -> Tensor:  # [N, V] float32
        """Append one token to every row and return the logits of the next."""
        cache.add_column()
        return self._forward(tokens[:, None], cache.mask, cache.layers)

    @property
    def _device(self) -> torch.device:
        return self.decoder.tok_embeddings.weight.device

    def _forward(
        self,
        tokens: Tensor,  # [N, new tokens]
        mask: Tensor,  # [N, columns]
        layers: DynamicCache,
    ) -> Tensor:  # [N, V] float32
        num_new = tokens.shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.decoder.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions[:, -num_new:],
            past_key_values=layers,
            use_cache=True,
        )
        return self._logits(output.last_hidden_state[:, -1])

    def _logits(
        self,
        hidden: Tensor,  # [N, H]
    ) -> Tensor:  # [N, V] float32
        head = self.decoder.output
        logits = float32_logits(hidden, head.weight, getattr(head, "bias", None))
        form = self.decoder.head_form
        logits = logits / form.divisor
        if form.softcap is not None:
            logits = form.softcap * torch.tanh(logits / form.softcap)
        return logits


def _pad_left(
    prompts: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:  # [U, P] int64, [U, P] int64
    """Return prompts padded to the longest, and where their tokens are."""
    longest = max(len(prompt) for prompt in prompts)
    padded = []
    masks = []
    for prompt in prompts:
        num_missing = longest - len(prompt)
        padded.append([0] * num_missing + prompt)
        masks.append([0] * num_missing + [1] * len(prompt))
    return torch.tensor(padded, device=device), torch.tensor(masks, device=device)


def _joined(caches: list[DynamicCache]) -> DynamicCache:
    """Return the rows of several caches in one, the first."""
    first, *others = caches
    for index, layer in enumerate(first.layers):
        keys = [layer.keys]
        values = [layer.values]
        for other in others:
            keys.append(other.layers[index].keys)
            values.append(other.layers[index].values)
        layer.keys = torch.cat(keys)
        layer.values = torch.cat(values)
    return first
