"""Samplers: what draws completions from the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gspo.types import Completion, Prompt, SamplingParams


class Sampler(Protocol):
    """Draws completions. ``sample`` is local to a rank and makes no collective call; ``update`` is collective.

    That split is what lets one rank draw more groups than its neighbour without a deadlock.
    """

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """``group_size`` completions for each prompt.

        Those of a prompt depend on the weights, the prompt, ``params`` and the prompt's own entry in ``seeds`` only,
        but for rounding: so they are the same however prompts are spread over ranks and calls.
        """
        ...

    def update(self, policy: Any, version: int) -> None:
        """Take the policy's weights; completions carry ``version`` from now on. Every rank calls it."""
        ...
