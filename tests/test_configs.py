"""Every shipped config: its commands, its keys, its model, and whether its numbers fit together."""

import copy
import itertools
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune._cli.tune import TuneCLIParser
from torchtune.config._utils import _get_component_from_path
from torchtune.models.llama3._tokenizer import LLAMA3_SPECIAL_TOKENS
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS
from torchtune.training import DummyProfiler

from gspo.adapters import remove_adapters
from gspo.advantages import check_group_size, get_estimator
from gspo.commands.validate import read_checked
from gspo.config import build, build_loss
from gspo.data import Advantage, Pack, check_bin_length, check_params
from gspo.losses import GRPOLoss, GSPOLoss
from gspo.plan.estimate import Planner
from gspo.plan.machine import DEFAULT_RATES, GIB, RESERVE, Machine
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, RECIPE, shipped_configs
from gspo.rewards.reward import parse_reward
from gspo.rewards.worker import resolve
from gspo.run import build_profiler
from gspo.types import SamplingParams

CONFIGS = shipped_configs()
OURS = [name for name in CONFIGS if name not in CONFIGS_OF_OTHER_RECIPES]
REAL = [name for name in OURS if not name.startswith("tiny/")]
every_config = pytest.mark.parametrize("name", CONFIGS)
every_gspo_config = pytest.mark.parametrize("name", OURS)
every_real_config = pytest.mark.parametrize("name", REAL)

# The model cards' counts, tied embeddings once.
NUM_PARAMETERS = {
    "tiny/gspo": 478_848,
    "tiny/grpo": 478_848,
    "tiny/sft": 478_848,
    "deepseek_r1_distill_qwen_1_5b/gspo_math": 1_777_088_000,
    "llama3_2/1B_grpo": 1_235_814_400,
    "qwen2_5/7B_gspo_math": 7_615_616_512,
    "qwen2_5/0.5B_gspo": 494_032_768,
    "qwen2_5/1.5B_gspo": 1_543_714_304,
    "qwen2_5/3B_gspo_math": 3_085_938_688,
    "qwen3/0.6B_gspo": 596_049_920,
    "qwen3/0.6B_lora": 596_049_920,
    "qwen3/1.7B_lora_math": 1_720_574_976,
    "qwen3/4B_lora_math": 4_022_468_096,
    "qwen3/8B_qlora_math": 8_190_735_360,
    "qwen3/0.6B_gspo_mixture": 596_049_920,
    "qwen3/1.7B_gspo_math": 1_720_574_976,
    "qwen3/1.7B_gspo_zebra": 1_720_574_976,
    "qwen3/4B_gspo_math": 4_022_468_096,
    "qwen3/8B_gspo_math": 8_190_735_360,
    "smollm2/135M_gspo": 134_515_008,
    "smollm2/1.7B_gspo": 1_711_376_384,
    "smollm3/3B_gspo_math": 3_075_098_624,
    "gemma3/1B_gspo": 999_885_952,
}
FACTS = Path(__file__).parent / "models" / "configs"  # the models' own config.json, by folder
DEEPSEEK_TOKENS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
]
SPECIAL_TOKENS = {
    "torchtune.models.llama3.llama3_tokenizer": LLAMA3_SPECIAL_TOKENS,
    "torchtune.models.qwen2.qwen2_tokenizer": QWEN2_5_SPECIAL_TOKENS,
    "torchtune.models.qwen2_5.qwen2_5_tokenizer": QWEN2_5_SPECIAL_TOKENS,
    "torchtune.modules.transforms.tokenizers.HuggingFaceBaseTokenizer": DEEPSEEK_TOKENS,
}
# A row with the columns of each dataset, and what a model would have to box.
ROWS = {
    "openai/gsm8k": (
        {"question": "6 * 7?", "answer": "6 * 7 = <<6*7=42>>42 of $5\n#### 1,042"},
        "1042",
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": (
        {"problem": "Half?", "answer": "\\frac{1}{2}", "solution": "Easy."},
        "0.5",
    ),
    "HuggingFaceH4/MATH-500": (
        {
            "problem": "3?",
            "solution": "Easy.",
            "answer": "\\left( 3, 1 \\right)",
            "subject": "A",
            "level": 1,
        },
        "(3,1)",
    ),
}


@cache
def load(name):
    return OmegaConf.load(CONFIGS[name])


@cache
def checked(name):
    """The settings that the recipe starts with."""
    return read_checked([name])


def of_transformers(name):
    return load(name).model["_component_"].startswith("gspo.models.huggingface")


def has_chats(name):
    return "chat" in checked(name).prompts


@cache
def with_facts(name):
    """The settings, with the folder of a transformers model where its config.json is."""
    if not of_transformers(name):
        return checked(name)
    return read_checked([name, f"model_dir={FACTS / Path(load(name).model_dir).name}"])


@cache
def model(name):
    cfg = with_facts(name) if of_transformers(name) else load(name)
    with torch.device("meta"):
        return config.instantiate(OmegaConf.create(cfg.model))


def commands(name):
    """The commands in the comment that opens the file, as words."""
    lines = []
    for line in CONFIGS[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    indented = [line.strip() for line in joined.splitlines() if line.startswith("   ")]
    parts = [part for line in indented for part in re.sub(r"\s{3,}#.*", "", line).split(" && ")]
    return [shlex.split(part) for part in parts if part.startswith(("tune ", "python "))]


def parse_tune(words, monkeypatch):
    """What torchtune's own command line makes of a command."""
    monkeypatch.setattr(sys, "argv", words)
    return TuneCLIParser().parse_args()


@every_config
def test_config_opens_with_the_command_that_runs_it(name, monkeypatch):
    runs = [
        parse_tune(words, monkeypatch) for words in commands(name) if words[:2] == ["tune", "run"]
    ]
    copies = [
        parse_tune(words, monkeypatch) for words in commands(name) if words[:2] == ["tune", "cp"]
    ]
    assert runs[0].recipe_args == ["--config", name]
    assert {run.recipe for run in runs} == {CONFIGS_OF_OTHER_RECIPES.get(name, RECIPE)}
    assert {copy.file for copy in copies} <= {name}
    assert {run.recipe_args[1] for run in runs} <= {
        name,
        *(str(copy.destination) for copy in copies),
    }


@every_real_config
def test_config_opens_with_the_commands_that_download_what_it_reads(name, monkeypatch):
    cfg = load(name)
    (download,) = [
        parse_tune(words, monkeypatch)
        for words in commands(name)
        if words[:2] == ["tune", "download"]
    ]
    folder = cfg.checkpointer.get("checkpoint_dir", cfg.checkpointer.get("path"))
    assert str(download.output_dir) == folder == cfg.model_dir
    assert download.ignore_patterns is None or "safetensors" not in download.ignore_patterns
    scripts = [words[2] for words in commands(name) if words[:2] == ["python", "-c"]]
    loaded = []
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *args: loaded.append(args))
        for script in scripts:
            exec(script, {})
    wanted = [
        (node.source, *([node.subset] if "subset" in node else []))
        for node in (cfg.prompts, cfg.eval_prompts)
        if "source" in node  # or the rows are made here
    ]
    assert set(loaded) == set(wanted)


def test_multi_node_config_runs_on_four_nodes_of_eight(monkeypatch):
    (words, *_) = [
        words for words in commands("qwen2_5/7B_gspo_math") if words[:2] == ["tune", "run"]
    ]
    run = parse_tune(words, monkeypatch)
    assert (run.nnodes, run.nproc_per_node, run.rdzv_backend) == ("4", "8", "c10d")
    assert checked("qwen2_5/7B_gspo_math").prompts_per_rollout % 32 == 0


def test_tiny_configs_differ_in_the_objective_alone():
    gspo, grpo = (OmegaConf.to_container(load(f"tiny/{name}")) for name in ("gspo", "grpo"))
    assert {key for key in gspo | grpo if gspo.get(key) != grpo.get(key)} == {"loss", "output_dir"}


@every_gspo_config
def test_recipe_accepts_the_config(name):
    assert checked(name).output_dir


@every_config
def test_torchtune_validates_the_config(name):
    config.validate(load(name))


@every_config
def test_model_has_the_parameters_of_its_name(name):
    decoder = copy.deepcopy(model(name))
    remove_adapters(decoder)
    assert sum(p.numel() for p in decoder.parameters()) == NUM_PARAMETERS[name]


@every_gspo_config
def test_lengths_fit_the_model_and_the_bins(name):
    cfg, max_seq_len = checked(name), model(name).max_seq_len
    check_bin_length(cfg.packing.bin_length, max_seq_len)
    longest = cfg.prompts.get("max_prompt_tokens", 0) + cfg.sampling.max_new_tokens
    assert longest <= max_seq_len
    assert longest <= cfg.packing.longest_document


@every_gspo_config
def test_nodes_accept_their_sections(name):
    cfg = checked(name)
    check_group_size(get_estimator(cfg.advantages.estimator), cfg.group_size)
    check_params(SamplingParams(**cfg.sampling.model_dump()))
    node = Advantage(None, **cfg.advantages.model_dump())
    Pack(node, max_seq_len=model(name).max_seq_len, **cfg.packing.model_dump())


@every_gspo_config
def test_loss_and_optimizer_are_built(name):
    cfg = checked(name)
    assert isinstance(build_loss(cfg), GRPOLoss if "grpo" in name else GSPOLoss)
    optimizer = build(cfg, "optimizer", model(name).parameters())
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(cfg.optimizer["lr"])
    # At these learning rates, round-to-nearest loses nearly every update.
    rounds = cfg.optimizer.get("bf16_stochastic_round", False)
    assert rounds is (cfg.dtype == "bf16")


@every_gspo_config
def test_profiler_block_gives_a_profiler_that_is_off(name):
    assert type(build_profiler(checked(name).profiler)) is DummyProfiler


@every_gspo_config
def test_rewards_resolve(name):
    for key, entry in checked(name).rewards.items():
        parse_reward(key, entry)


READING = [name for name in REAL if "source" in checked(name).prompts]
MAKING = [name for name in REAL if name not in READING and name != "smollm2/135M_gspo"]


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("split", ["prompts", "eval_prompts"])
def test_prompts_read_their_dataset_and_are_scored_by_its_answers(name, split, monkeypatch):
    cfg = checked(name)
    row, boxed = ROWS[getattr(cfg, split)["source"]]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [row])
    prompt = next(iter(build(cfg, split, CharTokenizer(), num_epochs=1)))
    assert prompt.text.count(row.get("problem", row.get("question"))) == 1
    assert "within \\boxed{}." in prompt.text
    (reward,) = [parse_reward(key, entry) for key, entry in cfg.rewards.items()]
    thinking = "hm\n</think>\n" if prompt.text.endswith("<think>\n") else ""
    scores = []
    for answer in (boxed, "43"):
        text = f"{thinking}so \\boxed{{{answer}}}"
        function = resolve(reward.path)
        scores.append(function(prompt.text, text, prompt.answer, prompt.metadata, **reward.options))
    assert scores == [1, 0]


@pytest.mark.parametrize("name", MAKING)
@pytest.mark.parametrize("split", ["prompts", "eval_prompts"])
def test_prompts_are_made_and_scored_by_their_tasks(name, split):
    cfg = checked(name)
    (reward,) = [parse_reward(key, entry) for key, entry in cfg.rewards.items()]
    function = resolve(reward.path)
    form = "\\boxed{{{}}}" if reward.options.get("extraction") == "boxed" else "<answer>{}</answer>"
    if "max_prompt_tokens" in getattr(cfg, split):
        cfg = cfg.changed({f"{split}.max_prompt_tokens": 8192})  # of single characters
    prompts = list(itertools.islice(build(cfg, split, CharTokenizer(), num_epochs=1), 12))
    tasks = cfg.prompts.get("tasks", {})
    if tasks:
        assert {prompt.metadata["task"] for prompt in prompts} == set(tasks)
    for prompt in prompts:
        assert prompt.text.count(prompt.metadata["question"]) == 1
        assert form.format("").removesuffix("}").split("<")[-1] in prompt.text
        scores = []
        for answer in (prompt.answer, "Mr. Nobody"):
            text = "so " + form.format(answer)
            scores.append(function(prompt.text, text, None, prompt.metadata, **reward.options))
        assert scores[0] == 1 and scores[1] < 0.1


@pytest.mark.parametrize("name", MAKING)
def test_prompts_to_evaluate_on_are_others_than_those_to_train_on(name):
    cfg = checked(name)
    seeds = cfg.eval_prompts["dataset_seed"] - cfg.prompts.get("dataset_seed", 0)
    assert seeds >= cfg.prompts["size"] >= cfg.prompts_per_rollout


def test_mixture_becomes_harder_until_the_run_s_last_prompt():
    cfg = checked("qwen3/0.6B_gspo_mixture")
    num_rollouts = cfg.num_steps * cfg.docs_per_step // (cfg.prompts_per_rollout * cfg.group_size)
    assert cfg.prompts["shuffle"] is False
    assert cfg.prompts["size"] == num_rollouts * cfg.prompts_per_rollout


PLANNED_FIGURES = r"([\d.]+) GiB while sampling, ([\d.]+) in an update"
STATING = [name for name in REAL if re.search(PLANNED_FIGURES, CONFIGS[name].read_text())]


@pytest.mark.parametrize("name", STATING)
def test_header_states_what_the_plan_says(name):
    text = CONFIGS[name].read_text()
    stated = re.search(PLANNED_FIGURES, text)
    world_size = int(re.search(r"--world-size (\d+)", text)[1])
    machine = Machine(memory=80 * GIB, ranks_per_node=8, **DEFAULT_RATES["cuda"])
    moments = Planner(with_facts(name), machine).plan(world_size)["memory"]["moments"]
    sizes = {moment: sum(parts.values()) / GIB for moment, parts in moments.items()}
    sampling = sizes.pop("sampling")
    assert (f"{sampling:.1f}", f"{max(sizes.values()):.1f}") == stated.groups()
    if not checked(name).on_cuda:
        return
    first = text.partition("\n")[0]
    of_gpu = int(re.search(r"(\d+) GB", first)[1])
    assert max(sampling, *sizes.values()) + RESERVE / GIB < of_gpu * 1e9 / GIB


@pytest.mark.parametrize("name", [name for name in OURS if has_chats(name)])
def test_chats_go_through_the_chat_template_of_transformers_tokenizer(name):
    cfg = checked(name)
    assert cfg.tokenizer["_component_"] == "gspo.models.huggingface.tokenizer"
    for key in ("chat", "chat_template_arguments"):
        assert cfg.eval_prompts.get(key) == cfg.prompts.get(key)


@pytest.mark.parametrize("name", [name for name in OURS if not has_chats(name)])
def test_template_uses_special_tokens_of_its_tokenizer(name):
    cfg = checked(name)
    tokens = re.findall(r"<[|｜].*?[|｜]>|<think>", cfg.prompts["prompt_template"])
    assert tokens
    assert set(tokens) <= set(SPECIAL_TOKENS[cfg.tokenizer["_component_"]])
    for key in ("prompt_template", "add_bos"):
        assert cfg.eval_prompts[key] == cfg.prompts[key]


@every_config
def test_every_dotted_path_exists(name):
    """Those in comments and reward options, too, which no component check sees."""
    paths = set(
        re.findall(r"(?<![\w./])(?:gspo|torchtune|torchao)(?:\.\w+)+", CONFIGS[name].read_text())
    )
    assert paths
    for path in paths:
        if path != "gspo.demo":  # a module that is run
            _get_component_from_path(path)


class CharTokenizer:
    """One token per character, and chats as the text of their messages."""

    chat_template = "{{ messages }} {{ enable_thinking }}"

    def render_chat(self, messages, **arguments):
        return "".join(message["content"] for message in messages)

    def encode(self, text, *, add_bos, add_eos):
        return [ord(character) for character in text]
