import json
import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from gspo.data.bins import (
    Bins,
    DocumentSizes,
    best_fit,
    cheapest_bins,
    dense_cost,
    fill_bins,
    lower_bounds,
    take_long_bins,
    whole_groups,
)
from gspo.data.layout import Document, group_documents, pack_documents
from gspo.data.pack import Pack, check_bin_length
from gspo.errors import InputError
from gspo.metrics import Max, Mean, Sum, merge
from gspo.types import Group, GroupBatch, PackedBatch, Prompt
from tests.data.fakes import Items, completion, exact, rollout
from tests.data.law import assert_resumes_anywhere


def document(num_prompt_tokens: int, num_sampled: int, seed: int = 0) -> Document:
    draw = random.Random(f"{num_prompt_tokens} {num_sampled} {seed}")
    return Document(
        tokens=[draw.randrange(1, 1000) for _ in range(num_prompt_tokens + num_sampled)],
        num_prompt_tokens=num_prompt_tokens,
        logps=[-draw.random() for _ in range(num_sampled)],
        advantage=draw.gauss(0, 1),
        reward=draw.random(),
        temperature=draw.uniform(0.5, 1.5),
        policy_version=draw.randrange(100),
        prompt_id=f"p:{seed}",
        group_id=seed,
    )


def documents(num: int, seed: int = 0, longest: int = 20) -> list[Document]:
    draw = random.Random(seed)
    return [
        document(draw.randint(1, longest // 2), draw.randint(1, longest // 2), i)
        for i in range(num)
    ]


def grouped(num: int, group_size: int, longest: int = 20) -> list[Document]:
    """Groups in turn, the documents of each behind one prompt; rewards tell them apart."""
    found = []
    for i, d in enumerate(documents(num, longest=longest)):
        prompt = document((i // group_size) % (longest // 2) + 1, 1, i // group_size).tokens[:-1]
        sampled = d.tokens[d.num_prompt_tokens :]
        where = {"prompt_id": f"p:{i // group_size}", "group_id": i // group_size}
        found.append(
            replace(d, tokens=prompt + sampled, num_prompt_tokens=len(prompt), reward=i, **where)
        )
    return found


def unpack(batch: PackedBatch) -> list[Document]:
    """The documents, rebuilt slot by slot; every other promise of PackedBatch is checked too."""
    found = []
    num_documents = len(batch.ids)
    prefix_index = (
        range(batch.advantages.numel())
        if batch.prefix_index is None
        else batch.prefix_index.tolist()
    )
    assert list(prefix_index)[num_documents:] == list(
        range(num_documents, batch.advantages.numel())
    )
    for d in range(num_documents):
        pieces = sorted({prefix_index[d], d}, reverse=True)  # the prefix has the higher index
        places = [(batch.document_index == piece).nonzero().flatten() for piece in pieces]
        for at in places:
            assert at.tolist() == list(range(int(at[0]), int(at[0]) + len(at))), "not in one piece"
        assert len({int(at[i]) // batch.bin_length for at in places for i in (0, -1)}) == 1, (
            "over a bin's end"
        )
        assert places[0][0] <= places[-1][0], "before its prefix"
        at = torch.cat(places)
        assert batch.positions[at].tolist() == list(range(len(at)))
        assert not batch.loss_mask[places[0]].any() or len(places) == 1
        tokens = [*batch.tokens[at].tolist(), int(batch.labels[at[-1]])]
        assert batch.labels[at].tolist() == tokens[1:]
        sampled = batch.loss_mask[at]
        num_sampled = int(sampled.sum())
        assert sampled.tolist() == [False] * (len(at) - num_sampled) + [True] * num_sampled
        assert num_sampled == batch.label_counts[d]
        assert not batch.old_logps[at][~sampled].any()
        found.append(
            Document(
                tokens,
                len(tokens) - num_sampled,
                batch.old_logps[at][sampled].tolist(),
                *(float(x[d]) for x in (batch.advantages, batch.rewards, batch.temperature)),
                int(batch.policy_version[d]),
                *batch.ids[d],
            )
        )
    check_padding(batch)
    return found


def check_padding(batch: PackedBatch) -> None:
    last = batch.advantages.numel() - 1
    padding = batch.document_index == last
    for values in (batch.tokens, batch.labels, batch.loss_mask, batch.old_logps):
        assert values.numel() == batch.num_bins * batch.bin_length and not values[padding].any()
    for row, positions in zip(
        padding.view(batch.num_bins, -1), batch.positions.view(batch.num_bins, -1), strict=True
    ):
        assert row.tolist() == sorted(row.tolist()), "padding before a document"
        assert positions[row].tolist() == list(range(int(row.sum())))
    other = slice(len(batch.ids), None)  # prefixes and padding
    for values in (batch.advantages, batch.rewards, batch.label_counts, batch.policy_version):
        assert values.numel() == last + 1 and not values[other].any()
    assert (batch.temperature[other] == 1).all()


def as_float32(d: Document) -> Document:
    def cast(x):
        return float(np.float32(x))

    return replace(
        d,
        logps=[cast(x) for x in d.logps],
        **{k: cast(getattr(d, k)) for k in ("advantage", "reward", "temperature")},
    )


def by_id(found: list[Document]) -> list[Document]:
    return sorted(found, key=lambda d: d.group_id)


def test_pack_documents_lays_out_two_documents_by_hand():
    first = Document([5, 6, 7, 8], 2, [-0.25, -0.5], 1.5, 2.0, 0.5, 3, "a", 11)
    second = Document([9, 4], 1, [-0.75], -1.5, 0.0, 1.0, 4, "b", 12)
    batch = pack_documents([first, second], bin_length=6)
    assert (batch.num_bins, batch.bin_length) == (1, 6)
    assert batch.tokens.tolist() == [5, 6, 7, 9, 0, 0]
    assert batch.labels.tolist() == [6, 7, 8, 4, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.document_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.loss_mask.tolist() == [False, True, True, True, False, False]
    assert batch.old_logps.tolist() == [0, -0.25, -0.5, -0.75, 0, 0]
    assert batch.advantages.tolist() == [1.5, -1.5, 0]
    assert batch.rewards.tolist() == [2, 0, 0]
    assert batch.label_counts.tolist() == [2, 1, 0]
    assert batch.policy_version.tolist() == [3, 4, 0]
    assert batch.temperature.tolist() == [0.5, 1, 1]
    assert (batch.num_documents, batch.num_label_tokens) == (2, 3)
    assert batch.ids == [("a", 11), ("b", 12)]
    assert batch.stats == {"packing_efficiency": Mean(4, 6)}


@pytest.mark.parametrize("bin_length", [None, 19, 20, 64, 10_000], ids=str)
@pytest.mark.parametrize("num", [1, 2, 63, 257])
def test_pack_documents_round_trips(num, bin_length):
    given = documents(num)
    batch = pack_documents(given, bin_length)
    assert by_id(unpack(batch)) == [as_float32(d) for d in given]
    assert bin_length is None or batch.bin_length == bin_length
    assert batch.num_documents == num
    assert batch.num_label_tokens == batch.label_counts.sum() == sum(len(d.logps) for d in given)


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("bin_length", [None, 19, 64, 10_000], ids=str)
@pytest.mark.parametrize("group_size", [2, 8])
def test_pack_documents_round_trips_groups(group_size, bin_length, share_prompts):
    given = grouped(61, group_size)
    batch = pack_documents(given, bin_length, share_prompts=share_prompts)
    assert sorted(unpack(batch), key=lambda d: d.reward) == [as_float32(d) for d in given]
    apart = sum(d.num_slots for d in given)
    used = batch.stats["packing_efficiency"].value
    assert used < apart if share_prompts else used == apart
    assert (batch.prefix_index is not None) == share_prompts
    if bin_length == 10_000 and share_prompts:  # each prompt once
        prefixes = {d.group_id: d.num_prompt_tokens - 1 for d in given}
        assert used == sum(len(d.logps) for d in given) + sum(prefixes.values())
    assert (batch.num_documents, batch.num_label_tokens) == (61, sum(len(d.logps) for d in given))


def test_pack_documents_lays_out_a_group_behind_its_prompt_by_hand():
    prompt = [5, 6, 7]
    group = [
        Document(prompt + s, 3, [-0.5] * len(s), 1.0, r, 1.0, 3, "a", 11)
        for r, s in enumerate(([8, 9], [4]))
    ]
    alone = Document([1, 2, 3], 2, [-0.75], -1.5, 0.0, 1.0, 4, "b", 12)
    batch = pack_documents([*group, alone], bin_length=8)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 7, 1, 2, 0]
    assert batch.labels.tolist() == [6, 7, 8, 9, 4, 2, 3, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 0]
    assert batch.document_index.tolist() == [3, 3, 0, 0, 1, 2, 2, 4]
    assert batch.loss_mask.tolist() == [False, False, True, True, True, False, True, False]
    assert batch.prefix_index.tolist() == [3, 3, 2, 3, 4]
    assert batch.label_counts.tolist() == [2, 1, 1, 0, 0]
    assert batch.ids == [("a", 11), ("a", 11), ("b", 12)]


def test_fill_bins_splits_only_a_group_that_is_longer_than_a_bin():
    sizes = DocumentSizes([9, 8, 7, 6, 5], [4, 4, 4, 4, 0], [0, 0, 0, 0, 1])
    groups = whole_groups(sizes)
    assert [group.num_slots for group in groups] == [18, 5]
    # Behind the prefix of 4 stand 5, 4, 3 and 2: in bins of 13 the first two, then the others.
    assert fill_bins(groups, 13) == Bins(13, [0, 0, 1, 1, 2])
    assert fill_bins(groups, 14) == Bins(14, [0, 0, 1, 1, 1])
    assert fill_bins(groups, 18) == Bins(18, [0, 0, 0, 0, 1])
    assert fill_bins(groups, 23) == Bins(23, [0, 0, 0, 0, 0])


def test_pack_documents_has_the_types_of_packed_batch():
    batch = pack_documents(documents(3))
    int64 = {"tokens", "labels", "positions", "document_index", "label_counts", "policy_version"}
    float32 = {"old_logps", "advantages", "rewards", "temperature"}
    types = {
        f.name: getattr(batch, f.name).dtype
        for f in fields(batch)
        if torch.is_tensor(getattr(batch, f.name))
    }
    expected = {
        **dict.fromkeys(int64, torch.int64),
        **dict.fromkeys(float32, torch.float32),
        "loss_mask": torch.bool,
    }
    assert types == expected


def test_pack_documents_of_nothing_is_one_bin_of_padding():
    batch = pack_documents([])
    assert (batch.num_bins, batch.bin_length, batch.num_documents, batch.num_label_tokens) == (
        1,
        8,
        0,
        0,
    )
    assert batch.document_index.tolist() == [0] * 8
    check_padding(batch)


def test_pack_documents_without_padding_still_has_the_padding_document():
    batch = pack_documents([document(5, 4)], bin_length=8)
    assert batch.document_index.tolist() == [0] * 8 and batch.label_counts.tolist() == [4, 0]


def test_pack_documents_changes_nothing_but_slots_with_the_order():
    given = documents(40)
    shuffled = random.Random(1).sample(given, len(given))
    assert by_id(unpack(pack_documents(shuffled, 64))) == by_id(unpack(pack_documents(given, 32)))


def test_pack_documents_refuses_a_document_longer_than_a_bin():
    with pytest.raises(ValueError, match="9 slots, more than bin_length 8"):
        pack_documents([document(5, 5)], bin_length=8)


def test_best_fit_takes_the_fullest_bin_that_fits():
    # 7 and 6 open bins of 10 with 3 and 4 left: 3 fills the first, 4 the second.
    assert best_fit([3, 6, 4, 7], 10) == [0, 1, 1, 0]


def alone(slots: list[int]) -> DocumentSizes:
    return DocumentSizes(slots, [0] * len(slots), list(range(len(slots))))


def in_groups(num_groups, group_size, prompt, completions, seed) -> DocumentSizes:
    draw = random.Random(seed)
    prefix = prompt - 1
    num = num_groups * group_size
    return DocumentSizes(
        [prefix + draw.randint(*completions) for _ in range(num)],
        [prefix] * num,
        [i // group_size for i in range(num)],
    )


@pytest.mark.parametrize(
    ("slots", "length", "num_bins"),
    [
        ([10] * 256, 40, 64),  # 16 would be 62 % full
        ([7] * 4, 8, 4),  # 88 % full, and one bin of 32 is no fuller
        ([7] * 32, 56, 4),
        ([8] * 5, 8, 5),
        ([100, 50, 50, 30], 232, 1),  # best fit needs two bins of 136
        ([500, 500, 12], 512, 2),  # one of 1,016 costs a seventh more for its mask
        ([60, 1], 64, 1),
        ([], 8, 1),
    ],
    ids=["tiny", "few_sevens", "sevens", "exact", "long", "longer", "one_short_beside", "none"],
)
def test_cheapest_bins_by_hand(slots, length, num_bins):
    bins = cheapest_bins(alone(slots))
    assert (bins.length, bins.num_slots) == (length, length * num_bins)


ROLLOUTS = pytest.mark.parametrize(
    "shape",
    [
        (16, 8, 27, (12, 24)),
        (16, 4, 27, (12, 24)),
        (16, 16, 60, (12, 24)),
        (32, 8, 10, (12, 24)),
        (8, 8, 500, (50, 200)),
        (12, 4, 90, (20, 300)),
        (100, 1, 20, (5, 60)),
        (32, 8, 6, (5, 5)),
    ],
    ids=str,
)


@ROLLOUTS
@pytest.mark.parametrize("max_length", [None, 707])
def test_cheapest_bins_are_about_the_cheapest_of_all_lengths(shape, max_length):
    """The lengths left out untried would not have been chosen."""
    for seed in range(3):
        sizes = in_groups(*shape, seed)
        groups = whole_groups(sizes)
        bins = cheapest_bins(sizes, max_length)
        num_needed = sum(sizes.in_order())
        one_bin = 8 * -(-num_needed // 8)
        longest = max_length or one_bin
        shortest = 8 * -(-max(sizes.slots) // 8)
        every = [fill_bins(groups, length) for length in range(shortest, longest + 1, 8)]
        cheapest = min(other.cost for other in every)
        assert bins.cost <= 1.07 * cheapest
        near = [other for other in every if other.cost <= 1.07 * cheapest]
        full = [other for other in near if num_needed >= 0.93 * other.num_slots]
        assert bins.cost == min(other.cost for other in full or near)
        assert bins.length % 8 == 0 and shortest <= bins.length <= longest


@ROLLOUTS
def test_bins_cost_no_less_than_their_lower_bound(shape):
    sizes = in_groups(*shape, 0)
    groups = whole_groups(sizes)
    shortest = 8 * -(-max(sizes.slots) // 8)
    lengths = np.arange(shortest, 8 * shortest, 8)
    bounds = lower_bounds(groups, lengths)
    for length, bound in zip(lengths.tolist(), bounds.tolist(), strict=True):
        assert bound <= fill_bins(groups, length).cost
    assert bounds.max() > sum(sizes.in_order())


@ROLLOUTS
def test_cheapest_bins_cost_no_more_than_one_long_one_or_one_for_each_document(shape):
    for seed in range(5):
        sizes = in_groups(*shape, seed)
        longest = 8 * -(-max(sizes.slots) // 8)
        needed = 8 * -(-sum(sizes.in_order()) // 8)
        apart = dense_cost(longest * len(sizes.slots), longest)
        cost = cheapest_bins(sizes).cost
        assert cost <= dense_cost(needed, needed) and cost <= apart


def test_dense_cost_counts_slots_and_the_pairs_of_each():
    assert dense_cost(600, 0) == 600
    # A bin of 3,000: its mask costs as much as all else.
    assert dense_cost(3000, 3000) == 2 * 3000
    assert dense_cost(6000, 3000) == 2 * dense_cost(3000, 3000)


def random_rollout(index: int, sizes=(12, 0, 5, 30)) -> GroupBatch:
    """Rollouts of ``sizes`` documents in turn, with one dropped document and stats of their own."""
    num = sizes[index % len(sizes)]
    draw = random.Random(index)
    groups = [
        Group(
            100 * index + i,
            Prompt(f"p:{i}", "", [1] * draw.randint(1, 9)),
            [completion(draw.randint(1, 30), draw.random())],
        )
        for i in range(num)
    ]
    return GroupBatch(
        groups, {"n": Mean(num, 1), "i/max": Max(index)}, dropped_documents=1, dropped_tokens=index
    )


def grouped_rollout(index: int) -> GroupBatch:
    draw = random.Random(index)
    groups = []
    for i in range((3, 0, 7)[index % 3]):
        sampled = [completion(draw.randint(1, 30), draw.random()) for _ in range(6)]
        groups.append(
            Group(100 * index + i, Prompt(f"p:{i}", "", [1] * draw.randint(1, 20)), sampled)
        )
    return GroupBatch(groups)


def pack(num_rollouts=9, make=random_rollout, **options):
    return Pack(Items(make, num_rollouts), **({"tokens_per_microbatch": 128} | options))


LAYOUTS = {
    "short": {},
    "one_bin": {"bin_length": 128},
    "four_bins": {"tokens_per_microbatch": 256, "bin_length": 64},
    "short_buffered": {"flush_every_rollout": False, "buffer_size": 25},
    "one_bin_buffered": {"flush_every_rollout": False, "buffer_size": 25, "bin_length": 128},
}
LAYOUT = pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())


@LAYOUT
def test_pack_gives_every_document_once_and_every_count_once(options):
    batches = list(pack(**options))
    rollouts = [random_rollout(i) for i in range(9)]
    given = [as_float32(d) for r in rollouts for d in group_documents(r)]
    assert by_id([d for b in batches for d in unpack(b)]) == by_id(given)
    assert sum(b.num_documents for b in batches) == len(given) + 9
    assert sum(b.num_label_tokens for b in batches) == sum(len(d.logps) for d in given) + sum(
        range(9)
    )
    totals = merge(batch.stats for batch in batches)
    assert totals["n"] == Mean(len(given), 9) and totals["i/max"] == Max(8)
    assert totals["packing_efficiency"].value == sum(d.num_slots for d in given)


@LAYOUT
def test_pack_of_groups_gives_every_document_once_in_fewer_slots(options):
    given = [as_float32(d) for i in range(9) for d in group_documents(grouped_rollout(i))]
    used = {}
    for share in (True, False):
        batches = list(pack(make=grouped_rollout, share_prompts=share, **options))
        found = [d for b in batches for d in unpack(b)]
        assert sorted(found, key=lambda d: (d.group_id, d.reward)) == sorted(
            given, key=lambda d: (d.group_id, d.reward)
        )
        used[share] = sum(b.stats["packing_efficiency"].value for b in batches)
    assert used[False] == sum(d.num_slots for d in given)
    assert used[True] < 0.85 * used[False]


def test_pack_keeps_short_bins_within_the_model():
    def make(index):
        return GroupBatch(
            [Group(index, Prompt("p", "", [1] * 70), [completion(9, 0.5) for _ in range(8)])]
        )

    for limit, longest in ((None, 144), (104, 96), (80, 80)):
        lengths = {
            b.bin_length for b in pack(3, make, tokens_per_microbatch=1024, max_seq_len=limit)
        }
        assert max(lengths) == longest


def group_rollout(seed, num_groups, group_size, num_prompt_tokens):
    """Groups of completions of 12 to 24 tokens."""
    draw = random.Random(f"{seed} {num_groups} {group_size} {num_prompt_tokens}")
    groups = []
    for i in range(num_groups):
        prompt = Prompt(f"p:{i}", "", [1] * num_prompt_tokens)
        completions = [completion(draw.randint(12, 24), draw.random()) for _ in range(group_size)]
        groups.append(Group(i, prompt, completions))
    return GroupBatch(groups)


def needed_slots(groups: list[Group]) -> int:
    """Slots where each prompt stands once: its last token and each completion make one a label."""
    num_slots = 0
    for group in groups:
        num_slots += len(group.prompt.tokens) - 1
        num_slots += sum(len(one.tokens) for one in group.completions)
    return num_slots


@pytest.mark.parametrize("num_prompt_tokens", [10, 27, 40, 60])
@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_pack_fills_fitted_bins_to_93_percent_of_what_groups_need(group_size, num_prompt_tokens):

    def make(index):
        return group_rollout(index, 16, group_size, num_prompt_tokens)

    batches = list(pack(6, make, tokens_per_microbatch=8192, max_seq_len=2048))
    for index, batch in enumerate(batches):
        assert len(batch.ids) == 16 * group_size
        assert needed_slots(make(index).groups) >= 0.93 * batch.tokens.numel()


def test_a_gap_takes_what_is_longest_behind_its_prefix():
    """A stray document's prefix is a copy that its group will need again."""
    sizes = DocumentSizes([10, 15, 10, 8], [0, 0, 9, 2], [0, 1, 2, 3])
    assert take_long_bins(sizes, 20, 1) == ([0, 3], [0, 0])


@pytest.mark.parametrize("bin_length", [2048, 16384])
def test_pack_fills_long_bins_to_93_percent_of_what_groups_need(bin_length):
    """Of all bins but the last, which the rollout's end leaves empty in part."""

    def make(index):
        return group_rollout(index, 512, 8, 27)

    batches = list(pack(1, make, tokens_per_microbatch=bin_length, bin_length=bin_length))
    num_full = len(batches) - 1
    assert num_full >= 5
    assert needed_slots(make(0).groups) >= 0.93 * bin_length * num_full


@pytest.mark.parametrize("make", [random_rollout, grouped_rollout], ids=["alone", "groups"])
@LAYOUT
def test_pack_keeps_to_the_budget(options, make):
    limit = options.get("tokens_per_microbatch", 128)
    for batch in pack(make=make, **options):
        assert batch.tokens.numel() <= limit
        assert batch.bin_length == options.get("bin_length", batch.bin_length) or not batch.ids
        assert batch.bin_length % 8 == 0


@LAYOUT
def test_pack_resumes_anywhere(options):
    num_batches = len(list(pack(**options)))
    assert num_batches > 4
    assert_resumes_anywhere(lambda: pack(**options), num_batches, key=exact)


def test_pack_state_is_json_and_restores_exactly_through_it():
    node = pack(flush_every_rollout=False, buffer_size=25)
    next(node)
    state = node.state_dict()
    assert state["documents"]
    saved = json.dumps(state)
    rest = [exact(b) for b in node]
    assert json.dumps(state) == saved, "going on changed a state that was taken"
    again = pack(flush_every_rollout=False, buffer_size=25)
    again.reset(json.loads(saved))
    assert [exact(b) for b in again] == rest


def test_pack_flushes_at_the_end_of_each_rollout():
    source = Items(random_rollout, 9)
    drawn = []
    for batch in Pack(source, tokens_per_microbatch=128):
        drawn.append((source.done, {group_id // 100 for _, group_id in batch.ids}))
    assert all(rollouts <= {done - 1} for done, rollouts in drawn)


@LAYOUT
def test_pack_says_whether_more_of_the_rollout_waits(options):
    node = pack(**options)
    continues = [(batch.continues, bool(node.state_dict()["documents"])) for batch in node]
    flush = options.get("flush_every_rollout", True)
    assert {waits for _, waits in continues} == {True, False}
    assert all(says == (flush and waits) for says, waits in continues)


def test_pack_emits_a_rollout_without_live_documents_at_once():
    def make(index):
        return rollout(stats={"n": Sum(1)}, dropped_documents=3, dropped_tokens=8)

    for flush in (True, False):
        batches = list(pack(2, make, flush_every_rollout=flush))
        assert [
            (b.num_documents, b.num_label_tokens, b.num_bins, b.bin_length) for b in batches
        ] == [(3, 8, 1, 8)] * 2
        assert all(b.stats["n"] == Sum(1) and b.advantages.numel() == 1 for b in batches)


def test_pack_with_a_buffer_always_takes_the_oldest_document():
    source = Items(lambda i: random_rollout(i, sizes=(10,)), 30)
    node = Pack(
        source, tokens_per_microbatch=64, bin_length=64, flush_every_rollout=False, buffer_size=40
    )
    gone = set()
    for batch in node:
        oldest = next(g for i in range(30) for g in range(100 * i, 100 * i + 10) if g not in gone)
        ids = {group_id for _, group_id in batch.ids}
        assert oldest in ids
        gone |= ids


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.2])
def test_pack_fills_long_bins_to_97_percent(sigma):
    draw = np.random.default_rng(0)
    sizes = np.clip(np.exp(draw.normal(np.log(400), sigma, 4096)), 2, 4096).astype(int)
    sizes[0] = 4096

    def make(index):
        mine = sizes[64 * index : 64 * index + 64]
        return GroupBatch(
            [Group(0, Prompt("p", "", [1]), [completion(n - 1) for n in mine.tolist()])]
        )

    batches = list(
        pack(64, make, tokens_per_microbatch=8192, bin_length=8192, flush_every_rollout=False)
    )
    assert {b.tokens.numel() for b in batches} == {8192}
    used = sum(b.stats["packing_efficiency"].value for b in batches)
    assert used == (sizes - 1).sum()
    assert used / (8192 * len(batches)) >= 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokens_per_microbatch": 8},
            "tokens_per_microbatch: 8 is too small for a document of prompt p:3, .* has 10 tokens",
        ),
        (
            {"bin_length": 8},
            "bin_length: 8 is too small for a document of prompt p:3, .*; raise bin_length to 9 or",
        ),
    ],
    ids=["tokens_per_microbatch", "bin_length"],
)
def test_pack_refuses_a_document_longer_than_a_bin(options, message):
    def make(index):
        return GroupBatch([Group(0, Prompt("p:3", "", [1] * 4), [completion(5), completion(6)])])

    with pytest.raises(InputError, match=message):
        next(pack(1, make, **options))
    assert next(pack(1, make, tokens_per_microbatch=9)).num_documents == 1


def test_pack_refuses_a_prompt_without_tokens():
    with pytest.raises(InputError, match="^prompt p:3: has no tokens; "):
        next(pack(1, lambda _: GroupBatch([Group(0, Prompt("p:3", "", []), [completion(5)])])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_microbatch": 0}, "tokens_per_microbatch: 0"),
        ({"buffer_size": 0}, "buffer_size: 0"),
        ({"bin_length": 100}, "bin_length: 100 does not divide tokens_per_microbatch: 128"),
        ({"bin_length": 0}, "bin_length: 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_pack_refuses_arguments(options, message):
    with pytest.raises(InputError, match=message):
        pack(**options)


@pytest.mark.parametrize(
    ("bin_length", "message"),
    [
        (129, "^bin_length: 129 is more than the model's max_seq_len 128; lower it"),
        (None, "^bin_length: null makes bins of a multiple of 8 .* max_seq_len is 60; set bin_l"),
    ],
    ids=str,
)
def test_bins_longer_than_the_model_takes_are_refused(bin_length, message):
    with pytest.raises(InputError, match=message):
        check_bin_length(bin_length, 60 if bin_length is None else 128)
    check_bin_length(bin_length, 136)


def test_pack_spreads_dropped_documents_as_the_live_ones():
    def rollout(index):
        groups = [Group(i, Prompt(f"p:{i}", "", [1, 2]), [completion(15, 0.5)]) for i in range(24)]
        return GroupBatch(groups, dropped_documents=40, dropped_tokens=400)

    batches = list(pack(1, rollout, tokens_per_microbatch=64, bin_length=64))
    live = [int((b.label_counts > 0).sum()) for b in batches]
    dropped = [b.num_documents - count for b, count in zip(batches, live, strict=True)]
    assert len(batches) > 3
    assert sum(dropped) == 40
    for count, number in zip(live, dropped, strict=True):
        assert abs(number - 40 * count / 24) <= 1


def test_pack_spreads_quarantined_documents_over_batches_and_no_denominator():
    def rollout(index):
        groups = [Group(i, Prompt(f"p:{i}", "", [1, 2]), [completion(15, 0.5)]) for i in range(24)]
        return GroupBatch(groups, quarantined_documents=40)

    batches = list(pack(1, rollout, tokens_per_microbatch=64, bin_length=64))
    assert len(batches) > 3 and sum(b.num_quarantined for b in batches) == 40
    assert all(b.num_quarantined for b in batches)
    assert sum(b.num_documents for b in batches) == 24


def test_pack_hands_on_that_a_rollout_was_lost():
    rollout = GroupBatch([], quarantined_documents=5, lost_to="reward")
    (batch,) = pack(1, lambda index: rollout)
    assert (batch.num_quarantined, batch.num_documents, batch.lost_to) == (5, 0, "reward")
