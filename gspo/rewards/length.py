"""Length shaping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.errors import require


def overlong_penalty(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    max_tokens: int,
    buffer_tokens: int,
) -> float:
    """Return the soft penalty of an over-long answer, in [-1, 0] (DAPO, arXiv 2503.14476, eq. 13).

    It is 0 up to ``max_tokens - buffer_tokens`` and falls linearly to -1 at ``max_tokens`` and
    beyond. A completion cut at ``max_tokens`` therefore gets -1.

    Args:
        prompt: not used.
        completion: not used, the length is counted in tokens.
        answer: not used.
        metadata: ``num_tokens``, which :class:`gspo.data.score.Score` adds, is the completion's
            length.
        max_tokens: the length that gets -1, usually the sampler's ``max_new_tokens``.
        buffer_tokens: the width of the slope, in tokens.

    Raises:
        InputError: The buffer is not within 1 and ``max_tokens``.
    """
    require(
        0 < buffer_tokens <= max_tokens,
        "buffer_tokens",
        buffer_tokens,
        f"must be from 1 to max_tokens: {max_tokens}",
    )
    num_over = metadata["num_tokens"] - (max_tokens - buffer_tokens)
    share = num_over / buffer_tokens
    return -min(max(share, 0.0), 1.0)


# A full reward does not count on this one.
overlong_penalty.max_value = 0.0  # type: ignore[attr-defined]
