import threading
from types import SimpleNamespace

import pytest
import torch
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm
from torchtune.modules.peft import LoRALinear

from gspo.errors import InputError
from gspo.sampling import cached_decoder, kv_cache, local
from gspo.sampling.local import LocalSampler, draw_tokens
from gspo.types import Prompt, SamplingParams

VOCAB, MAX_SEQ_LEN = 40, 64
STOP, PAD = 39, 0


class Letters:
    """One character per id; brackets are special."""

    eos_id, pad_id = STOP, PAD
    stop_tokens = [STOP]
    special_tokens = {"]": STOP, "[": PAD}

    def get_vocab(self):
        return {chr(96 + i): i for i in range(VOCAB)}

    def decode(self, tokens):
        return "".join({STOP: "]", PAD: "["}.get(token, chr(96 + token)) for token in tokens)


def build(
    builder=qwen2,
    *,
    num_heads=4,
    num_kv_heads=2,
    seed=0,
    dtype=torch.float32,
    qk_norm=False,
    num_layers=2,
    max_seq_len=MAX_SEQ_LEN,
    **options,
):
    """Make a small decoder whose every parameter matters, with no flat or peaked distribution."""
    torch.manual_seed(seed)
    model = builder(
        vocab_size=VOCAB,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=32,
        intermediate_dim=48,
        max_seq_len=max_seq_len,
        **options,
    )
    for layer in model.layers if qk_norm else []:
        layer.attn.q_norm, layer.attn.k_norm = RMSNorm(8), RMSNorm(8)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model.to(dtype).eval()


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(f"test:{i}", "", torch.randint(1, STOP, (n,), generator=generator).tolist())
        for i, n in enumerate(lengths)
    ]


def seeds_of(prompts, seed=0):
    return [1000 * seed + i for i in range(len(prompts))]


def sample(model, prompts, *, group_size=3, temperature=0.7, max_new_tokens=12, seed=5, **options):
    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    return LocalSampler(lambda: model, Letters(), **options).sample(
        prompts, group_size=group_size, params=params, seeds=seeds_of(prompts, seed)
    )


@torch.no_grad()
def full_logits(model, prompt, tokens):
    """[N, V]: logits before each completion token, from one forward without a cache."""
    logits = model(torch.tensor([prompt.tokens + tokens]))[0].float()
    return logits[len(prompt.tokens) - 1 : -1]


def full_logps(model, prompt, completion, temperature):
    logps = torch.log_softmax(full_logits(model, prompt, completion.tokens) / temperature, -1)
    return logps.gather(-1, torch.tensor(completion.tokens)[:, None]).squeeze(-1)


def tokens_of(groups):
    return [[completion.tokens for completion in group] for group in groups]


RAGGED, EQUAL = [3, 9, 1, 4, 4, 14], [5, 5, 5, 5]
MODELS = {
    "qwen2-tied": dict(builder=qwen2, tie_word_embeddings=True),
    "qwen2-untied": dict(builder=qwen2, tie_word_embeddings=False),
    "llama3_2": dict(builder=llama3_2),
    "llama3_2-untied": dict(builder=llama3_2, tie_word_embeddings=False),
    "one-kv-head": dict(num_kv_heads=1),
    "all-kv-heads": dict(num_kv_heads=4),
    "qk-norm": dict(qk_norm=True),
}


@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_logps_match_a_full_forward(options, lengths):
    model, prompts = build(**options), prompts_of(lengths)
    groups = sample(model, prompts)
    assert [len(group) for group in groups] == [3] * len(lengths)
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            assert len(completion.logps) == len(completion.tokens) > 0
            expected = full_logps(model, prompt, completion, 0.7)
            difference = expected - torch.tensor(completion.logps)
            assert difference.abs().max() < 1e-5
            assert (torch.expm1(difference) - difference).mean() <= 1e-6
    assert max(len(c.tokens) for group in groups for c in group) == 12


def test_logps_at_another_temperature_do_not_match():
    model, (prompt,) = build(), prompts_of([4])
    (group,) = sample(model, [prompt])
    assert (
        full_logps(model, prompt, group[0], 1.0) - torch.tensor(group[0].logps)
    ).abs().max() > 1e-2


def test_logps_in_bfloat16_are_close_to_float32():
    model, prompts = build(dtype=torch.bfloat16), prompts_of(RAGGED)
    exact = build(dtype=torch.bfloat16).float()
    for prompt, group in zip(prompts, sample(model, prompts), strict=True):
        for completion in group:
            difference = full_logps(exact, prompt, completion, 0.7) - torch.tensor(completion.logps)
            assert difference.abs().max() < 0.3
            assert difference.abs().mean() < 0.05


def test_temperature_0_takes_the_argmax_and_gives_raw_logps():
    model, prompts = build(), prompts_of(RAGGED)
    for prompt, (completion,) in zip(
        prompts, sample(model, prompts, group_size=1, temperature=0.0), strict=True
    ):
        assert (
            completion.tokens == full_logits(model, prompt, completion.tokens).argmax(-1).tolist()
        )
        expected = full_logps(model, prompt, completion, 1.0)
        assert (expected - torch.tensor(completion.logps)).abs().max() < 1e-5
        assert (completion.temperature, completion.logps_of) == (0.0, "raw")


def test_first_token_follows_the_softmax():
    model, (prompt,) = build(), prompts_of([6])
    draws = 20_000
    (group,) = sample(model, [prompt], group_size=draws, max_new_tokens=1, seed=11)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=VOCAB)
    expected = draws * torch.softmax(full_logits(model, prompt, [0])[0].double() / 0.7, -1)
    often = expected >= 5
    # The rare tokens share one cell. The 99.9 % point of chi square with 39 degrees of freedom is
    # 73.
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    assert often.sum() > 15
    assert ((observed - expected) ** 2 / expected).sum() < 73


def test_draw_tokens_never_takes_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(4, -1)
    uniforms = torch.tensor(
        [0.0, 0.2689, 0.2690, 1 - 2**-53], dtype=torch.float64
    )  # softmax: 0.26894, 0.73106
    tokens, logps = draw_tokens(logits, uniforms, 1.0)
    assert tokens.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(
        logps, torch.tensor([-1.3132617, -1.3132617, -0.3132617, -0.3132617])
    )


def test_a_prompts_completions_do_not_depend_on_the_others():
    sampler, prompts, seeds = (
        LocalSampler(build, Letters()),
        prompts_of([4, 7, 4]),
        [3, 1, 4],
    )
    options = dict(group_size=4, params=SamplingParams(0.7, 12))
    together = tokens_of(sampler.sample(prompts, seeds=seeds, **options))
    apart = [
        tokens_of(sampler.sample([p], seeds=[s], **options))[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == apart
    assert len({tuple(c) for group in together for c in group}) > 8


def test_sampler_builds_one_decoder():
    built = []
    sampler = LocalSampler(lambda: built.append(build()) or built[-1], Letters())
    sampler.update(policy_of(build(seed=1)), 1)
    sampler.sample(prompts_of([3]), group_size=1, params=SamplingParams(1.0, 2), seeds=[0])
    assert len(built) == 1


def test_every_prompt_needs_a_seed():
    with pytest.raises(InputError, match="seeds: there are 1 for 2 prompts"):
        LocalSampler(build, Letters()).sample(
            prompts_of([4, 7]), group_size=1, params=SamplingParams(1.0, 2), seeds=[0]
        )


def test_distinct_prompts_are_prefilled_once(monkeypatch):
    seen = []
    prefill = cached_decoder.CachedDecoder.prefill
    counted = lambda self, prompts: seen.append(len(prompts)) or prefill(self, prompts)  # noqa: E731
    monkeypatch.setattr(cached_decoder.CachedDecoder, "prefill", counted)
    prompts = prompts_of([4, 7])
    sample(build(), [*prompts, prompts[0]], group_size=4)
    assert seen == [2]


def test_stop_token_ends_a_completion_and_is_kept():
    stops = [7, 8, 9, 10, STOP]
    groups = sample(
        build(), prompts_of(RAGGED), group_size=8, max_new_tokens=10, stop_token_ids=stops
    )
    completions = [c for group in groups for c in group]
    for completion in completions:
        ended = completion.tokens[-1] in stops
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.tokens) == 10
        assert not set(completion.tokens[:-1]) & set(stops)
        assert len(completion.logps) == len(completion.tokens)
        assert completion.text == Letters().decode(
            [t for t in completion.tokens if t not in {PAD, *stops}]
        )
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_stop_tokens_default_to_the_tokenizers():
    model = build()
    with torch.no_grad():
        model.output.weight[STOP] = 0.0
        model.output.weight[STOP] += 4 * model.output.weight[7]
    ends = [c.tokens[-1] for group in sample(model, prompts_of(EQUAL), group_size=8) for c in group]
    assert ends.count(STOP) > 4
    plain = SimpleNamespace(eos_id=7, get_vocab=Letters().get_vocab, decode=Letters().decode)
    assert LocalSampler(lambda: model, plain)._stops == {7}


VARIANTS = {
    "small-batches": dict(max_batch_size=4),
    "one-prompt-prefills": dict(max_prefill_tokens=1),
    "no-compaction": dict(_COMPACT_BELOW=-1.0),
    "compaction-at-once": dict(_COMPACT_BELOW=1.0),
    "rare-checks": dict(_CHECK_EVERY={"cpu": 4}),
    "small-cache": dict(_FIRST_COLUMNS=2),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_completions_do_not_depend_on_how_rows_are_batched(monkeypatch, variant):
    options = dict(group_size=6, max_new_tokens=16, stop_token_ids=[7, 8, 9, 10])
    prompts = prompts_of(RAGGED)
    expected = sample(build(), prompts, **options)
    for name in [name for name in variant if name.startswith("_")]:
        monkeypatch.setattr(local if hasattr(local, name) else kv_cache, name, variant[name])
    options |= {name: value for name, value in variant.items() if not name.startswith("_")}
    found = sample(build(), prompts, **options)
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        torch.testing.assert_close(
            torch.tensor(one.logps), torch.tensor(other.logps), atol=1e-5, rtol=0
        )


def test_finished_rows_leave_the_batch(monkeypatch):
    rows = []
    step = cached_decoder.CachedDecoder.step
    monkeypatch.setattr(
        cached_decoder.CachedDecoder,
        "step",
        lambda self, t, cache: rows.append(t.numel()) or step(self, t, cache),
    )
    sample(
        build(),
        prompts_of(RAGGED),
        group_size=6,
        max_new_tokens=30,
        stop_token_ids=list(range(1, 13)),
    )
    assert 30 < rows[0] <= 36 and rows[-1] < 9
    assert rows == sorted(rows, reverse=True)


def test_seed_decides_and_global_generator_is_untouched():
    model, prompts = build(), prompts_of(RAGGED)
    sampler = LocalSampler(lambda: model, Letters())
    options = dict(group_size=2, params=SamplingParams(1.0, 8))
    before = torch.get_rng_state()
    first = sampler.sample(prompts, seeds=seeds_of(prompts, 1), **options)
    torch.rand(3)
    state = torch.get_rng_state()
    assert not torch.equal(before, state)
    assert sampler.sample(prompts, seeds=seeds_of(prompts, 1), **options) == first
    assert torch.equal(state, torch.get_rng_state())
    assert tokens_of(sampler.sample(prompts, seeds=seeds_of(prompts, 2), **options)) != tokens_of(
        first
    )


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_only_the_first_rank_shows_a_bar(monkeypatch, capsys, rank):
    if rank is not None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    sample(build(), prompts_of([3]), progress=True)
    assert ("sample:" in capsys.readouterr().err) == (rank != 1)
    sample(build(), prompts_of([3]))
    assert "sample:" not in capsys.readouterr().err


def policy_of(model, **changes):
    state = {**model.state_dict(), **changes}
    return SimpleNamespace(
        full_state_dict=lambda: ((k, v) for k, v in state.items() if v is not None)
    )


@pytest.mark.parametrize(
    "options", [MODELS["qwen2-tied"], MODELS["llama3_2-untied"]], ids=["tied", "untied"]
)
def test_update_takes_every_weight_and_the_version(options):
    prompts, params = prompts_of(RAGGED), SamplingParams(0.7, 12)
    sampler, other = LocalSampler(lambda: build(**options), Letters()), build(**options, seed=1)
    before = sampler.sample(prompts, group_size=2, params=params, seeds=seeds_of(prompts))
    sampler.update(policy_of(other), 7)
    after = sampler.sample(prompts, group_size=2, params=params, seeds=seeds_of(prompts))
    assert tokens_of(after) != tokens_of(before)
    assert {c.policy_version for group in before for c in group} == {0}
    assert {c.policy_version for group in after for c in group} == {7}
    for prompt, group in zip(prompts, after, strict=True):
        for completion in group:
            difference = full_logps(other, prompt, completion, 0.7) - torch.tensor(completion.logps)
            assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.scale": None}, "norm.scale"),
        ({"extra": torch.zeros(2)}, "extra"),
        ({"norm.scale": torch.zeros(2)}, r"norm.scale \[2\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_update_refuses_another_models_weights(changes, message):
    sampler = LocalSampler(build, Letters())
    with pytest.raises(InputError, match=message):
        sampler.update(policy_of(build(), **changes), 1)


def test_update_waits_for_a_running_sample():
    decoding, release, events = threading.Event(), threading.Event(), []

    class Slow(Letters):
        def decode(self, tokens):
            decoding.set()
            assert release.wait(30)
            return ""

    def weights():
        events.append("update")
        return iter(build().state_dict().items())

    sampler = LocalSampler(build, Slow())
    options = dict(group_size=1, params=SamplingParams(1.0, 2), seeds=[0])
    drawing = threading.Thread(
        target=lambda: events.append(sampler.sample(prompts_of([3]), **options)[0][0])
    )
    drawing.start()
    assert decoding.wait(30)
    updating = threading.Thread(
        target=sampler.update, args=(SimpleNamespace(full_state_dict=weights), 1)
    )
    updating.start()
    updating.join(0.2)
    assert events == []
    release.set()
    drawing.join(30)
    updating.join(30)
    assert "update" in events and sampler._version == 1
    assert next(e for e in events if e != "update").policy_version == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature=-0.1), "^temperature: -0.1"),
        (SamplingParams(temperature=float("nan")), "^temperature: nan"),
        (SamplingParams(max_new_tokens=0), "^max_new_tokens: 0"),
        (SamplingParams(max_new_tokens=MAX_SEQ_LEN - 2), "test:0.*3 tokens.*max_seq_len 64"),
    ],
    ids=["temperature", "nan", "max_new_tokens", "too-long"],
)
def test_sample_refuses_params_naming_the_key(params, message):
    with pytest.raises(InputError, match=message):
        LocalSampler(build, Letters()).sample(
            prompts_of([3]), group_size=1, params=params, seeds=[0]
        )


@pytest.mark.parametrize("tokens", [[], [1, VOCAB], [-1]], ids=["empty", "above", "below"])
def test_sample_refuses_a_prompt_the_model_cannot_read(tokens):
    with pytest.raises(InputError, match="prompt a:1"):
        sample(build(), [Prompt("a:1", "", tokens)])


def test_sample_fills_the_context_to_the_last_position():
    (group,) = sample(build(), prompts_of([3]), max_new_tokens=MAX_SEQ_LEN - 3, stop_token_ids=[])
    assert [len(c.tokens) for c in group] == [MAX_SEQ_LEN - 3] * 3


def test_sampler_without_prompts_or_stop_tokens():
    assert sample(build(), []) == []
    nameless = SimpleNamespace(get_vocab=Letters().get_vocab, decode=Letters().decode)
    with pytest.raises(InputError, match="stop_token_ids"):
        LocalSampler(build, nameless)


def test_sampler_refuses_parts_it_does_not_know():
    adapted = build()
    adapted.layers[1].attn.q_proj = LoRALinear(32, 32, rank=2, alpha=1.0)
    with pytest.raises(InputError, match="LoRALinear as `attn.q_proj`"):
        LocalSampler(lambda: adapted, Letters())
    with pytest.raises(InputError, match="gives a Sequential; .* needs a torchtune TransformerDec"):
        LocalSampler(lambda: torch.nn.Sequential(build()), Letters())

    class Learned(torch.nn.Module):
        def forward(self, x, *, input_pos=None):
            return x + 1.0

    learned = build()
    for layer in learned.layers:
        layer.attn.pos_embeddings = Learned()
    with pytest.raises(InputError, match="Learned"):
        LocalSampler(lambda: learned, Letters())


def test_ids_beyond_the_tokenizer_have_no_text():
    class Short(Letters):
        def get_vocab(self):
            return {chr(96 + i): i for i in range(VOCAB - 10)}

        def decode(self, tokens):
            assert all(token < VOCAB - 10 for token in tokens), "a real tokenizer raises here"
            return super().decode(tokens)

    params = SamplingParams(max_new_tokens=20)
    sampler = LocalSampler(build, Short(), stop_token_ids=[])
    (completions,) = sampler.sample(prompts_of([4]), group_size=8, params=params, seeds=[0])
    padded = [token for c in completions for token in c.tokens if token >= VOCAB - 10]
    assert padded  # they were drawn
    assert all(
        len(c.tokens) == 20 and len(c.text) < 20 for c in completions if max(c.tokens) >= VOCAB - 10
    )
