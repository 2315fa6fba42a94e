"""The scorers of reasoning-gym's tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import reasoning_gym as gym

from gspo.rewards.options import require_mark, require_pattern, require_switch
from gspo.rewards.text import extract_answer


def reasoning_gym(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    marker: str | None = None,
    last_line: bool = False,
    tag: str | None = None,
) -> float:
    """Return the score that the task's own verifier gives the completion, usually in [0, 1].

    Args:
        prompt: not used.
        completion: the sampled text, stripped.
        answer: not used; the verifier reads the entry.
        metadata: ``entry``, as :func:`gspo.data.readers.reasoning_gym_prompts` leaves it:
            ``question``, ``answer`` and ``metadata`` with the ``source_dataset`` whose verifier
            scores.
        marker: see :func:`gspo.rewards.text.extract_answer`; a completion without it is scored as
            no answer.
        last_line: see :func:`gspo.rewards.text.extract_answer`.
        tag: score the text of the last such element instead, e.g. ``answer`` for
            ``<answer>42</answer>``.

    Raises:
        ValueError: The metadata has no entry.
    """
    entry = metadata.get("entry")
    if entry is None:
        raise ValueError(
            "reasoning_gym scores prompts of gspo.data.readers.reasoning_gym_prompts only"
        )
    if tag is not None:
        stated = gym.utils.extract_answer(completion, tag_name=tag)
    else:
        stated = extract_answer(completion, marker=marker, last_line=last_line)
    scorer = _scorer(entry["metadata"]["source_dataset"])
    return scorer(stated, entry)


def _check_options(
    *, marker: str | None = None, last_line: bool = False, tag: str | None = None
) -> None:
    require_mark("marker", marker)
    require_switch("last_line", last_line)
    require_mark("tag", tag)
    if tag is not None:
        require_pattern("tag", tag)  # the library puts it into one as it is


reasoning_gym.check_options = _check_options  # type: ignore[attr-defined]


@functools.cache
def _scorer(source_dataset: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    return gym.get_score_answer_fn(source_dataset)
