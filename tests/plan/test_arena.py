"""The gaps that an allocator leaves, against a plain map of its bytes."""

import random

from gspo.plan.arena import Arena

UNIT = 512


def test_a_block_goes_into_the_smallest_gap_that_holds_it():
    arena = Arena()
    addresses = [arena.take(size * UNIT) for size in (4, 1, 2, 1)]
    assert addresses == [0, 4 * UNIT, 5 * UNIT, 7 * UNIT] and arena.end == 8 * UNIT
    arena.give(0)
    arena.give(5 * UNIT)
    assert arena.take(UNIT + 1) == 5 * UNIT  # two units, not into the gap of four
    assert arena.take(3 * UNIT) == 0
    assert arena.take(2 * UNIT) == 8 * UNIT and arena.end == 10 * UNIT


def test_gaps_side_by_side_are_one_and_the_last_grows_at_the_end():
    arena = Arena()
    first, second, third = (arena.take(2 * UNIT) for _ in range(3))
    for address in (first, third, second):
        arena.give(address)
    assert arena.take(7 * UNIT) == 0 and arena.end == 7 * UNIT


def test_blocks_never_overlap_and_the_end_is_theirs():
    rng, arena = random.Random(0), Arena()
    owner: dict[int, int] = {}  # unit -> block
    blocks: dict[int, int] = {}  # address -> units
    furthest = 0
    for number in range(2000):
        if blocks and rng.random() < 0.48:
            address = rng.choice(list(blocks))
            arena.give(address)
            for unit in range(blocks.pop(address)):
                del owner[address // UNIT + unit]
        else:
            num_units = rng.choice([1, 1, 2, 3, 8, 21])
            address = arena.take(num_units * UNIT - rng.randrange(UNIT))
            places = range(address // UNIT, address // UNIT + num_units)
            assert not any(place in owner for place in places)
            owner |= dict.fromkeys(places, number)
            blocks[address] = num_units
            furthest = max(furthest, places[-1] + 1)
        assert arena.end == furthest * UNIT
