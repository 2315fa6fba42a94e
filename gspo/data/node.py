"""The half of a node that holds nothing but its source."""

from __future__ import annotations

from typing import Any, TypeVar

from torchdata.nodes import BaseNode

T = TypeVar("T")


class Stateless(BaseNode[T]):
    """Saves and restores its source; a subclass has :meth:`next`, which takes from ``self.source``."""

    def __init__(self, source: BaseNode[Any]) -> None:
        super().__init__()
        self.source = source

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """The source's state; this node holds nothing."""
        return {"source": self.source.state_dict()}
