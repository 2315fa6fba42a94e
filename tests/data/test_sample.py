import math
from dataclasses import replace

import pytest

from gspo.data.sample import Sample, check_completion, prompt_seed
from gspo.errors import InputError
from gspo.metrics import Max, Mean, Time
from gspo.types import Prompt, SamplingParams
from tests.data.fakes import PARAMS, FakeSampler, Items, completion, exact, prompt
from tests.data.law import assert_resumes_anywhere


def make(num_prompts=7, sampler=None, make_prompt=prompt, **changes):
    arguments = dict(prompts_per_rollout=3, group_size=4, params=PARAMS, seed=5, rank=0) | changes
    return Sample(Items(make_prompt, num_prompts), sampler or FakeSampler(), **arguments)


def test_sample_groups_prompts_in_order_and_ends_with_a_short_rollout():
    rollouts = list(make(num_prompts=7))
    assert [[g.prompt.id for g in r.groups] for r in rollouts] == [
        ["p:0", "p:1", "p:2"],
        ["p:3", "p:4", "p:5"],
        ["p:6"],
    ]
    assert all(len(g.completions) == 4 for r in rollouts for g in r.groups)


def test_sample_resumes_anywhere():
    assert_resumes_anywhere(make, 3, key=exact)


def seeds(**changes):
    sampler = FakeSampler()
    list(make(sampler=sampler, **changes))
    return [seed for _, of_call in sampler.calls for seed in of_call]


def test_a_prompts_seed_depends_on_the_seed_and_its_number_only():
    plain = seeds()
    assert plain == seeds(prompts_per_rollout=2) == [prompt_seed(5, k) for k in range(7)]
    assert len({*plain, *seeds(seed=6)}) == 14


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_draw_with_the_seeds_of_one(world_size):
    parts = [seeds(num_prompts=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [part[i] for i in (0, 1) for part in parts] == seeds(num_prompts=2 * world_size)


def test_prompt_seed_is_the_same_on_every_machine():
    assert prompt_seed(0, 0) == 4334430513956379144
    assert 0 <= prompt_seed(2**40, 10**9) < 2**63


def test_group_ids_are_unique_over_rollouts_and_ranks():
    ids = [g.id for rank in range(3) for r in make(rank=rank) for g in r.groups]
    assert len(set(ids)) == len(ids) == 21


def test_sample_counts_lengths():
    rollout = next(make())
    completions = [c for g in rollout.groups for c in g.completions]
    lengths = [len(c.tokens) for c in completions]
    assert rollout.stats["length/mean"] == Mean(sum(lengths), 12)
    assert rollout.stats["length/max"] == Max(max(lengths))
    assert rollout.stats["length/truncated"] == Mean(lengths.count(PARAMS.max_new_tokens), 12)
    seconds = rollout.stats["time/sample"]
    assert isinstance(seconds, Time) and seconds.value > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, needed: above 0"),
        ({"temperature": float("nan")}, "temperature is nan, needed: above 0"),
        ({"top_p": 0.9}, "top_p is 0.9, needed: 1.0"),
        ({"top_k": 50}, "top_k is 50, needed: 0"),
        (
            {"logps_of": "raw", "temperature": 0.7},
            "logps_of is 'raw', needed: 'processed' at temperature 0.7",
        ),
        ({"logps_of": "top"}, "logps_of is 'top', needed: 'processed' or 'raw'"),
        ({"tokenizer": "abc"}, "tokenizer is 'abc', needed: 'def'"),
        ({"logps": [-1.0]}, "logps are 1 values, needed: 3 values"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort', needed: 'stop' or 'length'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_check_completion_names_field_value_and_need(changes, message):
    good = completion(3, tokenizer="def")
    check_completion(good, "p:0", tokenizer="def")
    with pytest.raises(InputError, match="prompt p:0.*" + message):
        check_completion(replace(good, **changes), "p:0", tokenizer="def")


def test_check_completion_takes_raw_logps_at_temperature_one_and_any_tokenizer_unless_told():
    check_completion(completion(3, logps_of="raw", tokenizer="abc"), "p:0")


def test_sample_refuses_what_the_sampler_got_wrong():
    with pytest.raises(InputError, match="top_p is 0.5"):
        next(make(sampler=FakeSampler(top_p=0.5)))
    with pytest.raises(InputError, match="tokenizer is '', needed: 'def'"):
        next(make(tokenizer="def"))
    short = FakeSampler()
    short.sample = lambda prompts, **_: [[completion(1)]] * len(prompts)
    with pytest.raises(
        InputError,
        match=r"sampler: .*4 completions of each of 3 prompts and gave groups of \[1, 1, 1\]",
    ):
        next(make(sampler=short))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_rollout": 0}, "prompts_per_rollout: 0"),
        ({"group_size": 0}, "group_size: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"params": SamplingParams(temperature=0.0)}, "^temperature: 0.0 must be above 0"),
        ({"params": SamplingParams(temperature=math.nan)}, "^temperature: nan must be above 0"),
        ({"params": SamplingParams(temperature=math.inf)}, "^temperature: inf must be above 0"),
        ({"params": SamplingParams(max_new_tokens=0)}, "^max_new_tokens: 0 is too small"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_sample_refuses_arguments_before_drawing(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_sample_refuses_prompts_before_sampling():
    sampler = FakeSampler()
    with pytest.raises(
        InputError, match="prompt p:2: has 3 tokens.*max_new_tokens 9 is more than the 11"
    ):
        next(make(sampler=sampler, max_tokens=11))
    with pytest.raises(InputError, match="prompt empty: has no tokens"):
        next(make(sampler=sampler, make_prompt=lambda i: Prompt("empty", "", [])))
    assert sampler.calls == []
    assert exact(next(make(max_tokens=12)).groups) == exact(next(make()).groups)
