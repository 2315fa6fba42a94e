"""The node that most nodes of the data graph are: an item in, an item out, nothing kept between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torchdata.nodes import BaseNode

T = TypeVar("T")


class TransformNode(BaseNode[T]):
    """A node whose only state is that of its source.

    A subclass has :meth:`next`, which takes from ``self.source`` and keeps nothing between items.
    """

    def __init__(self, source: BaseNode[Any]) -> None:
        super().__init__()
        self.source = source

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """Return the source's state."""
        return {"source": self.source.state_dict()}


def as_numbers(values: Any) -> list[float] | None:
    """Return what a function of the user's own has returned as floats; None if it is no numbers."""
    if not isinstance(values, Iterable):
        return None
    numbers = []
    for value in values:
        if not hasattr(value, "__float__"):  # a text has none
            return None
        try:
            numbers.append(float(value))
        except (OverflowError, TypeError, ValueError):  # a huge integer, or an array of several
            return None
    return numbers
