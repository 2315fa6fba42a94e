"""Group advantages: a completion's reward beside those of the others drawn for the same prompt.

Each estimator takes the rewards of one group and returns its advantages in the same order, in
float64, unitless for :func:`group_mean_std` and in units of reward otherwise. A group whose rewards
are exactly equal gets exact zeros: the mean of equal numbers is not always that number in floating
point, and what remains must not become an advantage.

Not here: dropping such groups and putting non-finite rewards aside, see :mod:`gspo.data.advantage`;
per-turn advantages, which go through ``segment_index``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from gspo.errors import InputError, exits_raise, require

Estimator = Callable[[Sequence[float]], Sequence[float]]


def group_mean_std(rewards: Sequence[float], *, std_floor: float = 1e-4) -> list[float]:
    """Return ``(reward - mean) / max(std, std_floor)``: GRPO, arXiv 2402.03300, section 4.1.2.

    The std is the sample's (divided by G - 1), as in the implementations that published learning
    rates come from (TRL, verl); the population's would make every advantage sqrt(G / (G - 1)) times
    larger.

    Args:
        rewards: [G], of one group, finite.
        std_floor: In units of reward. With it, rewards that differ by a rounding, 1e-17, give
            advantages of 1e-13.

    Raises:
        InputError: The group has fewer than two rewards.
    """
    deviations = group_mean(rewards)
    sum_of_squares = sum(d * d for d in deviations)
    variance = sum_of_squares / (len(deviations) - 1)
    std = variance**0.5
    scale = max(std, std_floor)
    return [d / scale for d in deviations]


def group_mean(rewards: Sequence[float]) -> list[float]:
    """Return ``reward - mean``: Dr. GRPO, arXiv 2503.20783, section 3.2.

    It has no std, so that hard and easy prompts weigh the same.

    Raises:
        InputError: The group has fewer than two rewards; the advantage would always be 0.
    """
    values = [float(reward) for reward in rewards]
    group_size = len(values)
    check_group_size(group_mean, group_size)
    if all_equal(values):
        return [0.0] * group_size
    mean = sum(values) / group_size
    return [value - mean for value in values]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return ``reward - mean of the others``: RLOO, arXiv 2402.14740, equation 7.

    It is :func:`group_mean` times G / (G - 1).

    Raises:
        InputError: The group has fewer than two rewards.
    """
    deviations = group_mean(rewards)
    group_size = len(deviations)
    scale = group_size / (group_size - 1)
    return [d * scale for d in deviations]


ESTIMATORS: dict[str, Estimator] = {
    "group_mean_std": group_mean_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
}


def get_estimator(estimator: str | Estimator) -> Estimator:
    """Return the estimator of a name or of a dotted path; a callable is its own.

    Args:
        estimator: A name in :data:`ESTIMATORS`, or a function ``[G] rewards -> [G] advantages``,
            itself or by its dotted path.

    Raises:
        InputError: No estimator has that name, or the path leads to no function.
    """
    if callable(estimator):
        return estimator
    if isinstance(estimator, str) and "." in estimator:
        return _import(estimator)
    is_known = isinstance(estimator, str) and estimator in ESTIMATORS
    if not is_known:
        names = ", ".join(ESTIMATORS)
        remedy = f"use one of {names}, or the dotted path of a function"
        raise InputError("estimator", estimator, "is not known", remedy)
    return ESTIMATORS[estimator]


def _import(path: str) -> Estimator:
    module, _, name = path.rpartition(".")
    try:
        with exits_raise():
            function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module does
        problem = f"cannot be imported: {type(error).__name__}: {error}"
        raise InputError("estimator", path, problem, "correct the path or the module") from error
    must = f"is a {type(function).__name__}, not a function of a group's rewards"
    is_function = callable(function) and not isinstance(function, type)
    require(is_function, "estimator", path, must)
    return function


def check_group_size(estimator: str | Estimator, group_size: int) -> None:
    """Refuse a group size with which an estimator of this module has nothing to compare with.

    A callable of the user's decides for itself.

    Raises:
        InputError: Naming ``group_size``.
    """
    is_ours = get_estimator(estimator) in ESTIMATORS.values()
    require(
        group_size >= 2 or not is_ours,
        "group_size",
        group_size,
        "leaves the advantage nothing to compare a completion with",
        "set it to 2 or more",
    )


def all_equal(rewards: Sequence[float]) -> bool:
    """Return whether a group carries no signal.

    Its rewards are exactly equal, or there are fewer than two.
    """
    if len(rewards) < 2:
        return True
    first = rewards[0]
    return all(reward == first for reward in rewards)
