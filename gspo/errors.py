"""The one exception that a user's input can cause; the recipe shows it as a message, without a stack."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a config value, a file, a record.

    The message names the key or the file and line, the value, and the remedy.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error message: the closest choices, or some of what there is, or nothing where there is nothing."""
    choices = sorted(set(choices))
    if close := difflib.get_close_matches(name, choices, n=3, cutoff=0.7):
        return f" Did you mean {' or '.join(map(repr, close))}?"
    listed = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else ".")
    return f" There are: {listed}" if choices else ""
