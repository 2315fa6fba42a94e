"""The scorers of reasoning-gym's tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import reasoning_gym as gym

from gspo.rewards.extraction import without_thinking
from gspo.rewards.options import check_place, is_cut, require_pattern, require_truncated
from gspo.rewards.restating import is_part_of, repeats_prompt, same_number, split_words
from gspo.rewards.text import stated_answer


def reasoning_gym(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    extraction: str | None = None,
    marker: str | None = None,
    last_line: bool = False,
    tag: str | None = None,
    truncated: str = "zero",
) -> float:
    """Return the score that the task's own verifier gives the final answer, usually in [0, 1].

    Some verifiers pay for the question itself, or for a piece of it. An answer that stands in the
    question, or that repeats the question, earns 0 unless it is the task's own answer.

    Args:
        prompt: tells whether the completion begins inside ``<think>``.
        completion: the sampled text.
        answer: not used; the verifier reads the entry.
        metadata: ``entry``, as :func:`gspo.data.readers.reasoning_gym_prompts` leaves it:
            ``question``, ``answer`` and ``metadata`` with the ``source_dataset`` whose verifier
            scores. ``finish_reason``, which :class:`gspo.data.score.Score` adds; without it the
            completion counts as finished.
        extraction: see :func:`gspo.rewards.text.stated_answer`; ``anywhere`` gives the verifier the
            completion as it is, which can be gamed.
        marker: see :func:`gspo.rewards.text.stated_answer`; a completion without it earns 0.
        last_line: see :func:`gspo.rewards.text.stated_answer`.
        tag: score the text of the last such element instead, e.g. ``answer`` for
            ``<answer>42</answer>``; the library finds it.
        truncated: ``zero``, or ``score`` to score completions that were cut, too.

    Raises:
        ValueError: The metadata has no entry.
    """
    entry = metadata.get("entry")
    if entry is None:
        raise ValueError(
            "reasoning_gym scores prompts of gspo.data.readers.reasoning_gym_prompts only"
        )
    if is_cut(metadata, truncated):
        return 0.0
    if tag is not None:
        text = without_thinking(completion, prompt)
        stated = gym.utils.extract_answer(text, tag_name=tag)
    else:
        stated = stated_answer(
            prompt, completion, extraction=extraction, marker=marker, last_line=last_line
        )
    if not stated:
        return 0.0
    if extraction != "anywhere" and _says_question_again(stated, entry):
        return 0.0
    scorer = _scorer(entry["metadata"]["source_dataset"])
    return scorer(stated, entry)


def _says_question_again(stated: str, entry: Mapping[str, Any]) -> bool:
    """Whether an answer stands in the question or repeats it, and is not the task's own."""
    question = entry["question"]
    oracle = str(entry["answer"])
    if split_words(stated) == split_words(oracle) or same_number(stated, oracle):
        return False
    return is_part_of(question, stated) or repeats_prompt(question, stated)


def _check_options(
    *,
    extraction: str | None = None,
    marker: str | None = None,
    last_line: bool = False,
    tag: str | None = None,
    truncated: str = "zero",
) -> None:
    check_place(extraction, marker, last_line, tag)
    require_truncated(truncated)
    if tag is not None:
        require_pattern("tag", tag)  # the library puts it into one as it is


reasoning_gym.check_options = _check_options  # type: ignore[attr-defined]


@functools.cache
def _scorer(source_dataset: str) -> Callable[[str | None, Mapping[str, Any]], float]:
    return gym.get_score_answer_fn(source_dataset)
