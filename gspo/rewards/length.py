"""Length shaping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def overlong_penalty(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    max_tokens: int,
    buffer_tokens: int,
) -> float:
    """Soft punishment of over-long answers, in [-1, 0] (DAPO, arXiv 2503.14476, equation 13).

    0 up to ``max_tokens - buffer_tokens``, falling linearly to -1 at ``max_tokens`` and beyond. A completion cut at
    ``max_tokens`` therefore gets -1.

    Args:
        prompt: not used.
        completion: not used, the length is counted in tokens.
        answer: not used.
        metadata: ``num_tokens``, which :class:`gspo.data.score.Score` adds, is the completion's length.
        max_tokens: the length that gets -1, usually the sampler's ``max_new_tokens``.
        buffer_tokens: the width of the slope, in tokens.

    Raises:
        ValueError: the buffer is not within 1 and ``max_tokens``.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens: {buffer_tokens} must be from 1 to max_tokens: {max_tokens}"
        )
    over = metadata["num_tokens"] - (max_tokens - buffer_tokens)
    return -min(max(over / buffer_tokens, 0.0), 1.0)


overlong_penalty.max_value = 0.0  # type: ignore[attr-defined]  # a full reward does not count on this one
