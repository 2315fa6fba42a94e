"""The law of the data graph: interrupted anywhere and restored, a node yields the same items."""

import itertools
import pickle
from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode


def assert_resumes_anywhere(
    make_node: Callable[[], BaseNode],
    num_items: int,
    *,
    key: Callable[[Any], Any] = lambda item: item,
) -> None:
    """Interrupt after each item, restore into a fresh node, and compare what is left.

    Args:
        make_node: gives a new node, the same each time.
        num_items: how far to look; a node that ends earlier must end at the same item after it was
            restored.
        key: what of an item is compared, for items whose ``==`` is not a truth value.
    """
    expected = _take(make_node(), num_items, key)
    assert expected, "the node yields nothing, so the law is not tested"
    for done in range(len(expected) + 1):
        node = make_node()
        assert _take(node, done, key) == expected[:done], "two fresh nodes differ"
        state = pickle.dumps(node.state_dict())
        left = num_items - done
        assert _take(node, left, key) == expected[done:], (
            f"taking the state after {done} items changed the node"
        )
        for restored in (make_node(), node):
            restored.reset(pickle.loads(state))
            assert _take(restored, left, key) == expected[done:], f"restored after {done} items"


def _take(node: BaseNode, num_items: int, key: Callable[[Any], Any]) -> list[Any]:
    return [key(item) for item in itertools.islice(node, num_items)]
