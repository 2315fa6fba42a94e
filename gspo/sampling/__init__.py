"""Samplers: what draws completions from the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gspo.types import Completion, Prompt, SamplingParams


class Sampler(Protocol):
    """A drawer of completions, local to a rank.

    A config's ``sampler`` component is called with ``(build_decoder, tokenizer)`` and its own
    keywords. ``build_decoder()`` makes an unsharded torchtune decoder without the policy's
    weights, which come with the first :meth:`update`. A sampler that needs a replica of the policy
    calls it once. One in another process ignores it, and so costs no replica.

    ``sample`` makes no collective call and ``update`` is collective. That split is what lets one
    rank draw more groups than its neighbour without a deadlock.
    """

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Draw ``group_size`` completions for each prompt.

        The completions of a prompt depend on the weights, the prompt, ``params`` and the prompt's
        own entry in ``seeds`` only, but for rounding: so they are the same however prompts are
        spread over ranks and calls.
        """
        ...

    def update(self, policy: Any, version: int) -> None:
        """Take the policy's weights; later completions carry ``version``. Every rank calls it."""
        ...
