"""Make items ahead on a thread."""

from __future__ import annotations

from typing import Any

from torchdata.nodes import BaseNode, Prefetcher

from gspo.data.node import TransformNode
from gspo.errors import require


def prefetched(node: BaseNode[Any], num_items: int) -> BaseNode[Any]:
    """Return a node that runs ``node`` up to ``num_items`` ahead on a thread.

    An exception of ``node`` arrives in ``next`` as it was raised. The Prefetcher alone would put
    the thread's stack into its message, which a user's typo does not deserve, and would wait for
    ever where code of the user's exits.

    Raises:
        InputError: ``num_items`` is less than 1.
    """
    require(num_items >= 1, "num_items", num_items, "must be at least 1")
    return _RaiseErrors(Prefetcher(_CatchErrors(node), num_items, snapshot_frequency=1))


class _CatchErrors(TransformNode[Any]):
    """A node that yields an exception of its source as the last item."""

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
        except BaseException as error:  # SystemExit too, which would end the thread in silence
            self._failed = True
            return error


class _RaiseErrors(TransformNode[Any]):
    """A node that raises an item that is an exception, on the thread that asks for it."""

    def next(self) -> Any:
        item = next(self.source)
        if isinstance(item, BaseException):
            raise item
        return item
