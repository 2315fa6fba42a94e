"""Rewards of runs that go wrong."""

from tests.recipes.rewards import variety


def huge(prompt, completion, answer, metadata, *, marker="="):
    """Finite in float64, and infinite in float32."""
    return 1e308


def partly_huge(prompt, completion, answer, metadata, *, marker="="):
    """Too large on every second completion or so."""
    return 1e300 if len(completion) % 2 else variety(prompt, completion, answer, metadata)
