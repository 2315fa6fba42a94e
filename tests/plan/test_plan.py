"""A plan against arithmetic by hand, over ranks, and its command line."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from gspo.commands.plan import main, parse_memory, report
from gspo.commands.validate import read_checked
from gspo.errors import InputError
from gspo.plan import dry_run
from gspo.plan import memory_tracker as labels
from gspo.plan.estimate import GAPS, IN_SAMPLING, SAMPLER_CACHE, SAMPLER_COPY, Planner
from gspo.plan.machine import DEFAULT_RATES, Machine
from gspo.plan.remedies import remedies
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, shipped_configs
from tests.test_configs import STATING

# tiny/gspo by hand: tied embedding, final norm, and in each layer q, k, v with bias, the output,
# the MLP and two norms.
VOCAB, LAYERS, WIDTH, KV_WIDTH, INNER = 272, 3, 128, 64, 256
LAYER = (WIDTH + 1) * (WIDTH + 2 * KV_WIDTH) + WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
PARAMETERS = VOCAB * WIDTH + WIDTH + LAYERS * LAYER
SMALL = (
    "packing.tokens_per_microbatch=128",
    "packing.bin_length=64",
    "docs_per_step=32",
    "prompts_per_rollout=8",
    "sampling.max_new_tokens=40",
    "head_chunk_size=32",
    "kernel=compile",
)

OURS = [name for name in shipped_configs() if name not in CONFIGS_OF_OTHER_RECIPES]
FOR_80_GB = {  # ranks and parameters
    "deepseek_r1_distill_qwen_1_5b/gspo_math": (1, 1_777_088_000),
    "qwen2_5/7B_gspo_math": (32, 7_615_616_512),
}


def machine(memory=2**33):
    return Machine(memory=memory, ranks_per_node=8, **DEFAULT_RATES["cpu"])


@cache
def plan(world_size, *overrides):
    return Planner(read_checked(["tiny/gspo", *SMALL, *overrides]), machine()).plan(world_size)


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gspo"])


def test_parameters_gradients_and_adamw_state_are_those_by_hand():
    found = plan(1)
    always = found["memory"]["always"]
    assert found["layout"]["parameters"] == PARAMETERS == 478_848
    assert always[labels.WEIGHTS] == always[labels.GRADIENTS] == 4 * PARAMETERS
    num_tensors = 2 + 12 * LAYERS  # each with a float32 count of its steps
    assert always[labels.OPTIMIZER] == 8 * PARAMETERS + 4 * num_tensors


def test_gradients_of_bf16_weights_are_bf16():
    always = plan(1, "device=cuda", "dtype=bf16")["memory"]["always"]
    assert always[labels.WEIGHTS] == always[labels.GRADIENTS] == 2 * PARAMETERS


def test_8bit_state_is_that_by_hand():
    optimizer = ("optimizer._component_=torchao.optim.AdamW8bit", "~optimizer.fused")
    always = plan(1, *optimizer)["memory"]["always"]
    large = VOCAB * WIDTH + LAYERS * (
        LAYER - (WIDTH + 2 * KV_WIDTH) - 2 * WIDTH
    )  # matrices; vectors stay float32
    small = PARAMETERS - large
    num_matrices = 1 + 7 * LAYERS
    moments = 2 * (
        large + 4 * large // 256 + 4 * 256 * num_matrices
    )  # codes, a scale a block of 256, a table each
    num_tensors = 2 + 12 * LAYERS
    assert always[labels.OPTIMIZER] == moments + 8 * small + 4 * num_tensors


ON_GPU = ("device=cuda", "dtype=bf16")


def test_block_mask_has_its_tables_and_what_it_looks_up():
    """Two bins of 64 slots, which one block of queries and one of keys cover."""
    training = plan(1, *ON_GPU)["memory"]["moments"]["the loss head"]
    tables = 2 * 8 * 4  # int32 counts and indices, of keys and queries, partial and full
    # Documents, prefixes and positions of queries; slots, documents and positions of keys.
    looked_up = 128 * 5 * 8
    assert looked_up < training[labels.MASK] <= looked_up + tables + 64


def test_a_gpu_s_norm_keeps_its_input_and_a_number_a_row():
    kept, kept_wide = (
        plan(1, *ON_GPU, f"model._component_={builder}")["memory"]["activations"]
        for builder in ("gspo.tiny.tiny_qwen2", "tests.plan.norms.wide_norms")
    )
    saved = kept_wide["kept_without_checkpointing"] - kept["kept_without_checkpointing"]
    one_copy = 128 * LAYERS * 2 * WIDTH * 4  # in float32, of both norms' inputs in each layer
    assert one_copy / 2 < saved < 4 * one_copy


def test_loops_take_time_in_layers_that_are_not_compiled():
    compiled, plain = (plan(1, *ON_GPU, f"compile={on}") for on in ("true", "false"))
    assert compiled["time"]["loops"] == 0 < plain["time"]["loops"]
    moved = plain["work"]["moved"]
    assert plain["time"]["loops"] == moved / (machine().memory_gbytes * 1e9)
    assert plain["time"]["update"] == pytest.approx(
        compiled["time"]["update"] + plain["time"]["loops"], rel=1e-6
    )
    # SwiGLU alone: the activation reads and writes, the product reads two and writes one, and twice
    # that in the backward.
    least = 3 * 5 * 128 * INNER * 2 * LAYERS * plain["work"]["microbatches"]
    assert least < moved < 20 * least


def test_gaps_of_the_allocator_are_planned_on_a_gpu_alone():
    on_gpu, on_cpu = plan(1, *ON_GPU)["memory"], plan(1)["memory"]
    assert all(GAPS in parts for name, parts in on_gpu["moments"].items() if name != IN_SAMPLING)
    assert not any(GAPS in parts for parts in on_cpu["moments"].values())


def test_a_token_takes_no_less_than_its_launches():
    def seconds(launch_us, *overrides):
        rates = DEFAULT_RATES["cpu"] | {"launch_us": launch_us, "memory_gbytes": 1e9}
        cfg = read_checked(["tiny/gspo", *SMALL, *overrides])
        planner = Planner(cfg, Machine(memory=2**33, ranks_per_node=8, **rates))
        return planner.plan(1)["time"]["sampling"]

    rollouts_a_step = 32 / 64 / 2  # docs_per_step of a rollout's documents, ppo_epochs
    expected = 40 * 16 * LAYERS * 5e-6 * rollouts_a_step
    assert seconds(5.0) == pytest.approx(expected)
    assert seconds(0.0) < expected / 1e3


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_are_a_rank_s_part(world_size):
    alone, shared = (plan(n)["memory"]["always"] for n in (1, world_size))
    for label in (labels.WEIGHTS, labels.GRADIENTS):
        assert shared[label] == alone[label] / world_size
    assert shared[SAMPLER_COPY] == alone[SAMPLER_COPY]


def test_replicas_do_not_shard():
    always = plan(4, "data_parallel_replicate_size=2")["memory"]["always"]
    assert always[labels.WEIGHTS] == 4 * PARAMETERS / 2


def test_context_parallelism_halves_activations_and_gathers_keys_and_values():
    whole, half = plan(2), plan(2, "context_parallel_size=2")
    kept = [found["memory"]["activations"]["kept_with_checkpointing"] for found in (whole, half)]
    assert kept == [LAYERS * 128 * WIDTH * 4, LAYERS * 64 * WIDTH * 4]
    rows = [row for row in half["transfers"] if row["purpose"] == "keys and values"]
    gathered = (
        2 * 128 * KV_WIDTH * 4 * LAYERS * half["work"]["microbatches"]
    )  # of both ranks; half of it is here
    assert {row["kind"]: row["received"] for row in rows} == {
        "all-gather": gathered / 2,
        "reduce-scatter": gathered / 2,
    }
    assert not [row for row in whole["transfers"] if row["purpose"] == "keys and values"]


def test_checkpointing_keeps_one_hidden_state_a_layer():
    plans = [plan(1, f"enable_activation_checkpointing={on}")["memory"] for on in ("true", "false")]
    checkpointed, plain = (
        memory["moments"]["the loss head"][labels.ACTIVATIONS] for memory in plans
    )
    hidden = 128 * WIDTH * 4
    assert LAYERS * hidden <= checkpointed <= (LAYERS + 5) * hidden
    kept = plans[1]["activations"]["kept_without_checkpointing"]
    assert kept <= plain <= kept + 5 * hidden


def test_head_holds_a_chunk_of_logits_and_its_gradients():
    head = plan(1)["memory"]["moments"]["the loss head"]
    num_rows = 20  # of a document, as two do not fit into a chunk of 32
    assert num_rows * VOCAB * 4 <= head[labels.HEAD_LOGITS] <= num_rows * (VOCAB + 64) * 4
    assert head[labels.HEAD_WEIGHT] == VOCAB * WIDTH * 4


def test_operations_are_those_by_hand():
    work = plan(1)["work"]
    per_slot = 2 * (LAYER - (WIDTH + 2 * KV_WIDTH) - 2 * WIDTH) * LAYERS
    assert work["operations"]["decoder forward"] == 128 * per_slot * work["microbatches"]
    assert work["operations"]["decoder backward"] == 2 * work["operations"]["decoder forward"]
    assert work["head_units"] == pytest.approx(3)
    spanning = plan(2, "context_parallel_size=2")["work"]
    assert spanning["head_units"] == pytest.approx(4)


def test_more_layers_are_worked_out_from_few(monkeypatch):
    options = [
        "sampler.max_batch_size=2",
        "model._component_=torchtune.models.qwen2.qwen2",
        "model.num_layers=7",
    ]
    options += [
        "model.vocab_size=272",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.embed_dim=64",
    ]
    options += [
        "model.intermediate_dim=96",
        "model.max_seq_len=128",
        "model.tie_word_embeddings=true",
    ]
    few = plan(2, *options)
    monkeypatch.setattr(dry_run, "_MAX_LAYERS", 7)
    plan.cache_clear()
    every = plan(2, *options)
    assert few["memory"]["always"] == every["memory"]["always"]
    assert few["memory"]["peak"] == every["memory"]["peak"]
    assert few["work"] == every["work"]
    assert few["transfers"] == every["transfers"]


def test_bins_without_a_length_are_filled_as_the_packer_fills_them():
    fitted = plan(1, "packing.bin_length=null", "packing.tokens_per_microbatch=1024")["layout"]
    num_slots = fitted["prompt_tokens"] + fitted["completion_tokens"] - 1
    used = fitted["documents_per_microbatch"] * num_slots
    slots = fitted["bins"] * fitted["bin_length"]
    assert fitted["bin_length"] % 8 == 0 and fitted["bin_length"] <= fitted["max_seq_len"]
    assert 0.85 * slots <= used <= slots == fitted["slots"] <= 1024


def test_sampler_cache_is_that_of_the_longest_completions():
    moment = plan(1, "sampler.max_batch_size=8")["memory"]["moments"][IN_SAMPLING]
    columns = 40 + 40  # a guess for prompts that state no length
    assert moment[SAMPLER_CACHE] == (2 * LAYERS + 1) * 8 * columns * KV_WIDTH * 4


def test_reference_policy_and_prefetch_are_counted():
    reference = ("reference_checkpointer=${checkpointer}", "advantages.drop_dead_groups=false")
    alone, both = (
        plan(1, *more)["memory"]["moments"]["the loss head"]
        for more in ((), (*reference, "prefetch=1"))
    )
    sampling = plan(1)["memory"]["moments"][IN_SAMPLING]
    extra = sum(both.values()) - sum(alone.values())
    assert (
        extra == 4 * PARAMETERS + sampling[SAMPLER_CACHE] + sampling["the sampler's distribution"]
    )


def test_what_does_not_fit_comes_with_remedies_that_were_planned():
    few = "sampler.max_batch_size=2"  # so that the peak is not sampling's
    small = plan(1, few)["memory"]["peak"]["bytes"] - 1
    cfg = read_checked(["tiny/gspo", *SMALL, few])
    planner = Planner(cfg, machine(small))
    assert planner.plan(1)["memory"]["fits"] is False
    assert Planner(cfg, machine(small + 1)).plan(1)["memory"]["fits"] is True
    by_change = {remedy["change"]: remedy for remedy in remedies(planner, 1)}
    found = by_change["enable_activation_checkpointing=true"]
    again = plan(1, few, "enable_activation_checkpointing=true")["memory"]["peak"]["bytes"]
    assert found["peak"] == again == small + 1 - found["saves"]
    assert found["fits"] is True
    assert "--world-size 2" in by_change


def test_command_prints_one_json_object_alone():
    arguments = [
        "--config",
        "tiny/gspo",
        "--world-size",
        "2",
        *SMALL,
        "--json",
        "-",
        "--gpu-memory",
        "1GiB",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "gspo", "plan", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert set(found) == {
        *("config", "world_size", "device", "layout", "memory", "work", "transfers", "time"),
        *("machine", "assumptions", "remedies"),
    }
    assert found["world_size"] == 2
    assert found["memory"]["fits"] is True
    assert found["memory"]["peak"]["bytes"] == sum(found["memory"]["peak"]["parts"].values())
    assert found["time"]["update"] > 0


@pytest.mark.parametrize(
    ("name", "world_size", "parameters"),
    [(name, *sizes) for name, sizes in FOR_80_GB.items()],
)
def test_shipped_config_for_80_gb_fits(name, world_size, parameters, capsys):
    main(["--config", name, "--world-size", str(world_size), "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    always = found["memory"]["always"]
    assert found["layout"]["parameters"] == parameters
    assert found["memory"]["fits"] is True
    assert always[labels.WEIGHTS] == pytest.approx(2 * parameters / world_size, rel=1e-3)
    assert always[SAMPLER_COPY] > 2 * parameters
    text = report(found)
    assert f"{name} on {world_size} ranks: fits. Expected, nothing here is measured." in text
    assert all(f"- {line}" in text for line in found["assumptions"])


@pytest.mark.parametrize("name", ["llama3_2/1B_grpo", "tiny/grpo", "tiny/gspo"])
def test_every_shipped_config_is_planned(name):
    cfg = read_checked([name])
    planned = Planner(cfg, machine(80 * 2**30)).plan(8)
    parameters = {"llama3_2/1B_grpo": 1_235_814_400}.get(name, PARAMETERS)
    assert planned["layout"]["parameters"] == parameters
    assert planned["memory"]["fits"] is True
    here = {"llama3_2/1B_grpo", "tiny/grpo", "tiny/gspo", *FOR_80_GB}
    assert set(OURS) == here | set(STATING)  # whose plans are compared with what they state


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("141 GB", 141 * 10**9), ("1.5tib", 3 * 2**39)]
)
def test_memory_is_read_with_its_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "-1GiB", "0GiB", "80 apples", "80KiB"])
def test_memory_without_a_unit_is_refused(text):
    with pytest.raises(
        InputError,
        match=f"--gpu-memory: {text!r} is not an amount of memory; write one such as 80GiB",
    ):
        parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "nowhere.yaml"],
            "nowhere.yaml' is no file and no registered config; see `tune ls`",
        ),
        (["--config", "tiny/sft"], "--config: 'tiny/sft' is for a recipe of torchtune's own"),
        (["--config", "tiny/gspo", "--world-size", "0"], "--world-size: 0 must be at least 1"),
        (
            ["--config", "tiny/gspo", "--ranks-per-node", "0"],
            "--ranks-per-node: 0 must be at least 1",
        ),
        (["--config", "tiny/gspo", "--tflops", "-3"], "--tflops: -3.0 must be above 0"),
        (
            ["--config", "tiny/gspo", "--mean-document-tokens", "2"],
            "--mean-document-tokens: 2 must be at least 3",
        ),
        (
            ["--config", "tiny/gspo", "context_parallel_size=2"],
            "which does not divide the 1 ranks of this run",
        ),
        (
            ["--config", "tiny/gspo", "--world-size", "5"],
            "prompts_per_rollout: 32 must be a multiple of the 5",
        ),
        (["--config", "tiny/gspo", "groop_size=2"], "groop_size: unknown key"),
        (
            ["--config", "tiny/gspo", "--json", "/nowhere/plan.json"],
            "--json: '/nowhere/plan.json' cannot be written",
        ),
        (["--config", "tiny/gspo", "model.dim=3"], "model.dim: unknown"),
        (
            ["--config", "tiny/gspo", "--mean-document-tokens", "99999"],
            "packing.tokens_per_microbatch: 8192 is too small for documents of 99999 tokens",
        ),
    ],
)
def test_bad_input_is_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*([] if "--world-size" in arguments else ["--world-size", "1"]), *arguments])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_nothing_is_left_behind():
    resize = torch.UntypedStorage.resize_
    plan.cache_clear()
    plan(2)
    assert torch.UntypedStorage.resize_ is resize
    assert not torch.distributed.is_initialized()
