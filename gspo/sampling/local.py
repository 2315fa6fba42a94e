"""The in-process sampler: a plain replica of the policy, batched, with a key/value cache.

Not here: continuous batching, paged caches, prefix caches across calls. Where generation is most of the step, a server
does it better. Top-p and top-k are refused: the trainer computes log-probabilities of the full distribution.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from gspo.errors import InputError
from gspo.sampling.cached_decoder import CachedDecoder, KVCache
from gspo.sampling.fingerprint import tokenizer_fingerprint, vocabulary_of
from gspo.types import Completion, Prompt, SamplingParams

# Finished rows are dropped when this share or less is left: below it the copy of the cache pays for itself.
_COMPACT_BELOW = 0.75
# On a GPU, asking how many rows have finished waits for the device; a few steps too many cost less.
_CHECK_EVERY = {"cuda": 8}


class LocalSampler:
    """Draws completions with ``model``, an unsharded torchtune decoder that this sampler owns from now on.

    Stop tokens are the tokenizer's ``stop_tokens``, or its ``eos_id``, unless ``stop_token_ids`` names others ([] for
    none).
    ``max_batch_size`` bounds the completions drawn at once, ``max_prefill_tokens`` the prompt tokens that go through
    the model at once. ``progress`` shows a bar.

    Raises:
        InputError: the model has parts that the cached attention does not know, or there is no stop token.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        tokenizer: Any,
        *,
        stop_token_ids: list[int] | None = None,
        max_batch_size: int = 512,
        max_prefill_tokens: int = 16384,
        progress: bool = False,
    ) -> None:
        if max_batch_size < 1:
            raise InputError(f"max_batch_size: must be at least 1, got {max_batch_size}.")
        self._model = model.eval().requires_grad_(False)
        self._decoder = CachedDecoder(self._model, max_prefill_tokens=max_prefill_tokens)
        self._tokenizer = tokenizer
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._stops = _stop_tokens(tokenizer) if stop_token_ids is None else set(stop_token_ids)
        if not self._stops and stop_token_ids is None:
            raise InputError(
                "stop_token_ids: the tokenizer names no stop token. Set stop_token_ids; [] for none."
            )
        # A model's vocabulary may be padded beyond its tokenizer's: such ids do get drawn, and have no text.
        vocabulary = vocabulary_of(tokenizer) or {}
        self._text_tokens = set(vocabulary.values()) - self._stops - _special_tokens(tokenizer)
        self._is_stop = torch.zeros(model.tok_embeddings.num_embeddings, dtype=torch.bool)
        self._check_tokens("stop_token_ids", sorted(self._stops))
        self._is_stop[list(self._stops)] = True
        self._is_stop = self._is_stop.to(self._device)
        self._max_batch_size = max_batch_size
        self._progress = progress
        self._version = 0
        # A prefetch thread samples while the trainer updates: a completion must not see half of the new weights.
        self._lock = threading.Lock()

    @property
    def _device(self) -> torch.device:
        return self._model.tok_embeddings.weight.device

    def update(self, policy: Any, version: int) -> None:
        """Copy the policy's weights into the replica, parameter by parameter. Collective: every rank calls it.

        ``policy.full_state_dict()`` yields (name, full tensor) for every parameter of the decoder.

        Raises:
            InputError: the names or shapes are not those of the replica.
        """
        with self._lock, torch.no_grad():
            missing = dict(self._model.state_dict())
            for name, tensor in policy.full_state_dict():
                target = missing.pop(name, None)
                if target is None or target.shape != tensor.shape:
                    raise InputError(
                        f"model: the policy gives {name} {list(tensor.shape)}, the sampler's replica has "
                        f"{'no such parameter' if target is None else list(target.shape)}. Build both with one builder."
                    )
                target.copy_(tensor)
            if missing:
                raise InputError(
                    f"model: the policy did not give {sorted(missing)[0]} (of {len(missing)} missing). "
                    "Build policy and sampler replica with one builder."
                )
            self._version = version

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """``group_size`` completions for each prompt, with their log-probabilities in nats.

        Each token is drawn by inverting the distribution function at one uniform number that the prompt's entry in
        ``seeds`` fixes for its completion and step. So a completion depends neither on ``max_batch_size`` nor on the
        other prompts nor on which completions have finished, but for rounding. The global generators are left alone. At
        temperature 0 the likeliest token is taken, and log-probabilities are those at temperature 1
        (``logps_of="raw"``).

        Raises:
            InputError: top-p or top-k is on, a value is out of range, a prompt has no seed, is empty, has ids outside
                the vocabulary, or leaves no room for ``max_new_tokens`` in the model's ``max_seq_len``.
        """
        self._check(prompts, group_size, params)
        if len(seeds) != len(prompts):
            raise InputError(
                f"seeds: there are {len(seeds)} for {len(prompts)} prompts. Give one for each."
            )
        num_rows = len(prompts) * group_size
        uniforms = _uniforms(seeds, group_size, params.max_new_tokens)
        # Rows of like length go together: the gap between a short prompt and the longest is computed in vain.
        order = sorted(range(num_rows), key=lambda row: len(prompts[row // group_size].tokens))
        completions: dict[int, Completion] = {}
        bar = tqdm(
            total=num_rows,
            desc="sample",
            unit="completion",
            leave=False,
            disable=not self._progress,
        )
        with self._lock, torch.inference_mode(), bar:
            for start in range(0, num_rows, self._max_batch_size):
                rows = order[start : start + self._max_batch_size]
                batch = [prompts[row // group_size].tokens for row in rows]
                drawn = self._draw(batch, uniforms[:, rows], params.temperature, bar)
                for row, tokens, logps in zip(rows, *drawn, strict=True):
                    completions[row] = self._completion(tokens, logps, params)
        return [
            [completions[i + j] for j in range(group_size)] for i in range(0, num_rows, group_size)
        ]

    def _draw(
        self,
        prompts: list[list[int]],  # N of them, equal ones prefilled once
        uniforms: Tensor,  # [max_new_tokens, N] float64
        temperature: float,
        bar: tqdm,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of N completions, with what was drawn after a stop token still on them."""
        max_new_tokens, num_rows = uniforms.shape
        logits, cache = self._prefill(prompts, max_new_tokens)
        uniforms = uniforms.to(self._device)
        tokens = torch.zeros(max_new_tokens, num_rows, dtype=torch.int64, device=self._device)
        logps = torch.zeros(max_new_tokens, num_rows, device=self._device)
        rows = torch.arange(num_rows, device=self._device)  # those still in the batch
        ended = torch.zeros(num_rows, dtype=torch.bool, device=self._device)
        check_every = _CHECK_EVERY.get(self._device.type, 1)
        num_left = num_rows
        for step in range(max_new_tokens):
            drawn, drawn_logps = draw_tokens(logits, uniforms[step, rows], temperature)
            tokens[step, rows], logps[step, rows] = drawn, drawn_logps
            ended |= self._is_stop[drawn]
            if step + 1 == max_new_tokens:
                break
            if (step + 1) % check_every == 0:
                still = rows.numel() - int(ended.sum())
                bar.update(num_left - still)
                num_left = still
                if num_left == 0:
                    break
                if num_left <= _COMPACT_BELOW * rows.numel():
                    left = (~ended).nonzero().flatten()
                    rows, drawn, ended = rows[left], drawn[left], ended[left]
                    cache.select(left)
            logits = self._decoder.step(drawn, cache)
        bar.update(num_left)
        return tokens.t().tolist(), logps.t().tolist()

    def _prefill(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
        """Logits [N, V] and cache of N prompts, each distinct one computed once."""
        distinct: dict[tuple[int, ...], int] = {}
        owner = [distinct.setdefault(tuple(tokens), len(distinct)) for tokens in prompts]
        logits, cache = self._decoder.prefill([list(tokens) for tokens in distinct])
        rows = torch.tensor(owner, device=self._device)
        cache.select(rows, room=max_new_tokens)
        return logits[rows], cache

    def _completion(
        self, tokens: list[int], logps: list[float], params: SamplingParams
    ) -> Completion:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._stops), None)
        tokens, logps = tokens[:end], logps[:end]
        return Completion(
            tokens=tokens,
            logps=logps,
            text=self._tokenizer.decode([token for token in tokens if token in self._text_tokens]),
            finish_reason="length" if end is None else "stop",
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            logps_of="raw" if params.temperature == 0 else "processed",
            policy_version=self._version,
            tokenizer=self._fingerprint,
        )

    def _check(self, prompts: list[Prompt], group_size: int, params: SamplingParams) -> None:
        for key, value, off in (("top_p", params.top_p, 1.0), ("top_k", params.top_k, 0)):
            if value != off:
                raise InputError(
                    f"{key}: the in-process sampler draws from the full distribution, got {value}. Set {key}: {off}."
                )
        if not 0.0 <= params.temperature < float("inf"):
            raise InputError(f"temperature: must be 0 (greedy) or more, got {params.temperature}.")
        if params.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: must be at least 1, got {params.max_new_tokens}.")
        if group_size < 1:
            raise InputError(f"group_size: must be at least 1, got {group_size}.")
        room = self._model.max_seq_len - params.max_new_tokens
        for prompt in prompts:
            if not 0 < len(prompt.tokens) <= room:
                raise InputError(
                    f"prompt {prompt.id}: has {len(prompt.tokens)} tokens; from 1 to {room} fit beside "
                    f"max_new_tokens {params.max_new_tokens} in the model's max_seq_len {self._model.max_seq_len}. "
                    "Drop the prompt, lower max_new_tokens, or raise max_seq_len."
                )
            self._check_tokens(f"prompt {prompt.id}", prompt.tokens)

    def _check_tokens(self, what: str, tokens: list[int]) -> None:
        vocab_size = self._model.tok_embeddings.num_embeddings
        outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise InputError(
                f"{what}: token id {outside} is outside the model's vocabulary of {vocab_size}. "
                "Use the tokenizer that belongs to the model."
            )


def draw_tokens(
    logits: Tensor,  # [N, V] float32
    uniforms: Tensor,  # [N] float64 in [0, 1)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N] int64, [N] float32 nats
    """One token per row by inversion of the distribution function, and its log-probability; temperature 0 is greedy."""
    if temperature == 0:
        logps = torch.log_softmax(logits, -1)
        tokens = logits.argmax(-1, keepdim=True)
    else:
        logps = torch.log_softmax(logits / temperature, -1)
        # float64: in float32 the sum over a large vocabulary loses tokens rarer than 6e-8.
        cumulative = logps.exp().cumsum(-1, dtype=torch.float64)
        targets = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, targets, right=True).clamp_(
            max=logits.shape[-1] - 1
        )
    return tokens.squeeze(-1), logps.gather(-1, tokens).squeeze(-1)


def _uniforms(seeds: Sequence[int], group_size: int, num_steps: int) -> Tensor:
    """[num_steps, prompts * group_size] float64 in [0, 1), made on the CPU so that every device gets the same."""
    found = torch.empty(len(seeds), group_size, num_steps, dtype=torch.float64)
    generator = torch.Generator()
    for seed, numbers in zip(seeds, found, strict=True):
        numbers.uniform_(generator=generator.manual_seed(seed))
    return found.flatten(0, 1).t()


def _stop_tokens(tokenizer: Any) -> set[int]:
    stops = getattr(tokenizer, "stop_tokens", None) or [getattr(tokenizer, "eos_id", None)]
    return {int(token) for token in stops if token is not None}


def _special_tokens(tokenizer: Any) -> set[int]:
    named = getattr(tokenizer, "special_tokens", None)
    ids = list(named.values()) if isinstance(named, dict) else []
    ids += [getattr(tokenizer, name, None) for name in ("bos_id", "eos_id", "pad_id")]
    return {int(token) for token in ids if token is not None}
