"""Hand microbatches that one rank draws to the other ranks of its context axis."""

from __future__ import annotations

from typing import Any

from torchdata.nodes import BaseNode

from gspo.parallel.context import ContextAxis
from gspo.types import PackedBatch


class ShareOverContext(BaseNode[PackedBatch]):
    """A node that yields, on every rank of a context axis, the microbatches its first rank draws.

    Args:
        source: where they are drawn; None on the other ranks.
        axis: the context axis.
    """

    def __init__(self, source: BaseNode[PackedBatch] | None, axis: ContextAxis) -> None:
        super().__init__()
        self.source = source
        self.axis = axis

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        if self.source is not None:
            self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """Return the source's state, None where there is no source."""
        return {"source": None if self.source is None else self.source.state_dict()}

    def next(self) -> PackedBatch:
        """Return the next microbatch. Collective over the axis."""
        drawn = None if self.source is None else next(self.source, None)
        batch = self.axis.share(drawn)
        if batch is None:
            raise StopIteration
        return batch
