"""Make items ahead on a thread."""

from __future__ import annotations

from typing import Any

from torchdata.nodes import BaseNode, Prefetcher

from gspo.data.node import Stateless


def prefetched(source: BaseNode[Any], num_items: int) -> BaseNode[Any]:
    """``source`` run up to ``num_items`` ahead on a thread; what it raises arrives in ``next`` as it was raised.

    The Prefetcher alone would raise it with the thread's stack in its message, which a user's typo does not deserve.
    """
    return _RaiseErrors(Prefetcher(_CatchErrors(source), num_items, snapshot_frequency=1))


class _CatchErrors(Stateless[Any]):
    """Gives an exception of ``source`` as the last item."""

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._failed = False

    def next(self) -> Any:
        if self._failed:
            raise StopIteration
        try:
            return next(self.source)
        except StopIteration:
            raise
        except Exception as error:
            self._failed = True
            return error


class _RaiseErrors(Stateless[Any]):
    """Raises the item that is an exception, on the thread that asks for it."""

    def next(self) -> Any:
        item = next(self.source)
        if isinstance(item, Exception):
            raise item
        return item
