"""Length shaping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.errors import require
from gspo.rewards.options import require_whole


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
        InputError: The numbers are not whole, or the buffer is not from 1 to ``max_tokens``.
    """
    _check_options(max_tokens=max_tokens, buffer_tokens=buffer_tokens)
    num_over = metadata["num_tokens"] - (max_tokens - buffer_tokens)
    share = num_over / buffer_tokens
    return -min(max(share, 0.0), 1.0)


def _check_options(*, max_tokens: int, buffer_tokens: int) -> None:
    require_whole("max_tokens", max_tokens, least=1)
    require_whole("buffer_tokens", buffer_tokens, least=1)
    require(
        buffer_tokens <= max_tokens,
        "buffer_tokens",
        buffer_tokens,
        f"must be from 1 to max_tokens: {max_tokens}",
        "shorten it, or raise max_tokens",
    )


overlong_penalty.check_options = _check_options  # type: ignore[attr-defined]
# A full reward does not count on this one.
overlong_penalty.max_value = 0.0  # type: ignore[attr-defined]
