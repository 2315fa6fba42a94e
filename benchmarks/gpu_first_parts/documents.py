"""Prompts and documents of realistic lengths with random tokens, packed as a run's rollouts are."""

from __future__ import annotations

from typing import Any

import torch
from torchdata.nodes import BaseNode

from gspo.config import Settings
from gspo.data import Pack
from gspo.types import Completion, Group, GroupBatch, PackedBatch, Prompt

# Log-normal, with the shape of a reasoning model's completions: the median 0.37 of the longest one
# allowed, a sixth of them more than twice as long.
_MEDIAN_SHARE = 0.37
_PROMPT_MEDIAN_SHARE = 0.15
_SPREAD = 0.8


class Texts:
    """A tokenizer without text or stop token, as far as the sampler asks."""

    stop_tokens: tuple[int, ...] = ()

    def decode(self, tokens: list[int], **_: Any) -> str:
        """Return no text."""
        return ""

    def get_vocab(self) -> dict[str, int]:
        """Return one token."""
        return {"": 0}


def draw_lengths(count: int, longest: int, share: float, seed: int) -> list[int]:
    """Draw log-normal lengths of at most ``longest``; the first is that long."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.exp(_SPREAD * torch.randn(count, generator=generator))
    lengths = (share * longest * factors).long().clamp(2, longest).tolist()
    lengths[0] = longest
    return lengths


def draw_prompts(cfg: Settings, count: int, *, seed: int = 0) -> list[Prompt]:
    """Draw prompts, the first as long as the config allows."""
    longest = cfg.prompts["max_prompt_tokens"]
    prompts = []
    for number, length in enumerate(draw_lengths(count, longest, _PROMPT_MEDIAN_SHARE, seed)):
        tokens = draw_tokens(cfg, length, seed=number)
        prompts.append(Prompt(str(number), "", tokens))
    return prompts


def draw_tokens(cfg: Settings, count: int, *, seed: int) -> list[int]:
    """Draw tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.model["vocab_size"], (count,), generator=generator).tolist()


def draw_groups(cfg: Settings, num_documents: int) -> GroupBatch:
    """Draw groups of completions with advantages, as a rollout gives them."""
    size = cfg.group_size
    prompts = draw_prompts(cfg, num_documents // size)
    lengths = draw_lengths(num_documents, cfg.sampling.max_new_tokens, _MEDIAN_SHARE, seed=1)
    groups = []
    for number, prompt in enumerate(prompts):
        completions = []
        for member, length in enumerate(lengths[number * size : (number + 1) * size]):
            tokens = draw_tokens(cfg, length, seed=1000 + number * size + member)
            completions.append(_completion(cfg, tokens, advantage=1.0 - 2.0 * (member % 2)))
        groups.append(Group(number, prompt, completions))
    return GroupBatch(groups)


def _completion(cfg: Settings, tokens: list[int], *, advantage: float) -> Completion:
    return Completion(
        tokens=tokens,
        logps=[0.0] * len(tokens),
        text="",
        finish_reason="length",
        temperature=cfg.sampling.temperature,
        advantage=advantage,
    )


class _Once(BaseNode[GroupBatch]):
    """A node of one rollout."""

    def __init__(self, rollout: GroupBatch) -> None:
        super().__init__()
        self._rollout = rollout

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over."""
        super().reset(initial_state)
        self._is_left = True

    def next(self) -> GroupBatch:
        """Return the rollout."""
        if not self._is_left:
            raise StopIteration
        self._is_left = False
        return self._rollout

    def get_state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def pack(cfg: Settings, rollout: GroupBatch) -> list[PackedBatch]:
    """Pack a rollout into microbatches by the config's settings, all of one shape."""
    options = cfg.pack_options | {"fixed_shape": True}
    return list(Pack(_Once(rollout), max_seq_len=cfg.model["max_seq_len"], **options))


def mean_tokens(batches: list[PackedBatch]) -> int:
    """Return the mean length of a document's completion and its share of its prompt."""
    num_slots = sum(batch.stats["packing_efficiency"].value for batch in batches)
    num_documents = sum(batch.num_documents for batch in batches)
    return round(float(num_slots) / num_documents)
