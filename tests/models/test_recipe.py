"""The recipe with a model of transformers: the same run as with torchtune's builder of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo.commands.validate import read_checked
from gspo.errors import InputError
from gspo.models.huggingface import causal_lm, tokenizer
from gspo.plan import memory_tracker as labels
from gspo.plan.estimate import Planner
from gspo.plan.machine import DEFAULT_RATES, Machine
from gspo.sampling.local import LocalSampler
from gspo.tiny import make_untrained
from gspo.types import Prompt, SamplingParams
from tests.models import families
from tests.recipes.runs import ROOT, overrides

HUGGING_FACE = {
    "model": {"_component_": "gspo.models.huggingface.causal_lm", "path": "${base_dir}"},
    "tokenizer": {"_component_": "gspo.models.huggingface.tokenizer", "path": "${base_dir}"},
    "checkpointer": {
        "_component_": "gspo.models.huggingface.Checkpointer",
        "path": "${base_dir}",
        "output_dir": "${output_dir}",
    },
}
SHORT = ("num_steps=3", "sampler.stop_token_ids=[269,271]", "optimizer.lr=1e-3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_untrained(folder / "base", folder / "data", seed=0, num_train=200, num_heldout=20)
    config = OmegaConf.load(ROOT / "configs" / "tiny" / "gspo.yaml")
    config.update(HUGGING_FACE)
    OmegaConf.save(config, folder / "hf.yaml")
    return folder


def run(base, output_dir, config, *more, num_ranks=1):
    """Rows of metrics of a run through the command line of ``tune``."""
    arguments = overrides(base, output_dir, *SHORT, *more)
    if "checkpoint_files" not in OmegaConf.load(config).checkpointer:
        arguments = [text for text in arguments if "checkpoint_files" not in text]
    ranks = ["--nproc_per_node", str(num_ranks)] if num_ranks > 1 else []
    command = ["-m", "torchtune._cli.tune", "run", *ranks, "gspo_full_finetune"]
    done = subprocess.run(
        [sys.executable, *command, "--config", str(config), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


def test_a_run_is_that_of_torchtune_s_builder_and_transformers_reads_its_model(base, tmp_path):
    rows = run(base, tmp_path / "hf", base / "hf.yaml")
    expected = run(base, tmp_path / "tune", ROOT / "configs" / "tiny" / "gspo.yaml")
    assert len(rows) == len(expected) == 4
    for row, want in zip(rows, expected, strict=True):
        for key, value in want.items():
            if not key.startswith(("time/", "tokens_per_second", "mismatch/", "kl_new_old")):
                assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        assert row.get("mismatch/rms_token", 0) < 1e-5
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "epoch_3")
    before = AutoModelForCausalLM.from_pretrained(base / "base")
    moved = [
        not torch.equal(one, other)
        for one, other in zip(written.parameters(), before.parameters(), strict=True)
    ]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf" / "epoch_3")("12 + 3")["input_ids"]


def test_context_ranks_with_a_reference_and_compiled_checkpointed_layers(base, tmp_path):
    config = OmegaConf.load(base / "hf.yaml")
    config.reference_checkpointer = config.checkpointer
    OmegaConf.save(config, base / "reference.yaml")
    rows = run(
        base,
        tmp_path / "out",
        base / "reference.yaml",
        "context_parallel_size=2",
        "loss.kl_coef=0.1",
        "advantages.drop_dead_groups=false",
        "enable_activation_checkpointing=true",
        "compile=true",
        "num_steps=2",
        num_ranks=2,
    )
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows[1:])
    assert rows[1]["mismatch/rms_token"] < 1e-5


@pytest.mark.parametrize("name", families.FAMILIES)
def test_sampler_draws_from_the_model_s_own_distribution(tmp_path, name):
    """Ragged prompts, some of them repeated, and completions longer than a window."""
    source = families.build(name)
    source.save_pretrained(tmp_path)
    decoder = causal_lm(str(tmp_path))
    decoder.load_state_dict(source.state_dict(), strict=False)
    decoder.init_buffers()
    sampler = LocalSampler(lambda: decoder, Ids(), max_prefill_tokens=16)
    prompts = [Prompt(f"p{n}", "", list(range(3, 3 + n))) for n in (1, 4, 11)]
    params = SamplingParams(temperature=0.7, max_new_tokens=12)
    groups = sampler.sample(prompts, group_size=3, params=params, seeds=[1, 2, 3])
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            tokens = torch.tensor([prompt.tokens + completion.tokens])
            logps = (source(tokens).logits[0] / 0.7).log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            expected = logps.gather(-1, torch.tensor(completion.tokens)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=2e-5)


class Ids:
    """A tokenizer of ids without text."""

    stop_tokens = [0]

    def get_vocab(self):
        return {f"<{i}>": i for i in range(families.SHAPE["vocab_size"])}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_the_plan_counts_what_torchtune_s_builder_has(base):
    def plan(config):
        arguments = [str(config), f"base_dir={base / 'base'}", "output_dir=out", "data_dir=data"]
        machine = Machine(memory=2**33, ranks_per_node=8, **DEFAULT_RATES["cpu"])
        return Planner(read_checked(arguments), machine).plan(2)

    found, expected = plan(base / "hf.yaml"), plan(ROOT / "configs" / "tiny" / "gspo.yaml")
    assert found["layout"]["parameters"] == expected["layout"]["parameters"]
    always, expected_always = found["memory"]["always"], expected["memory"]["always"]
    for label in (labels.WEIGHTS, labels.GRADIENTS, labels.OPTIMIZER):
        assert always[label] == expected_always[label], label
    for name, count in expected["work"]["operations"].items():
        assert found["work"]["operations"][name] == pytest.approx(count, rel=0.01), name


def test_tokenizer_takes_its_stop_tokens_from_the_generation_config(base, tmp_path):
    assert tokenizer(str(base / "base")).stop_tokens == [271]
    for file in (base / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [271, 269]}')
    assert tokenizer(str(tmp_path)).stop_tokens == [271, 269]


@pytest.mark.parametrize("text", ["{", "[271]", '{"eos_token_id": "x"}'])
def test_a_broken_generation_config_is_named(base, tmp_path, text):
    for file in (base / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config.json: .*; get the file again"):
        tokenizer(str(tmp_path))


def test_a_model_that_cannot_be_packed_is_refused_by_name(tmp_path):
    def refused(kind, **options):
        config = {"model_type": kind} | options
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError) as error, torch.device("meta"):
            causal_lm(str(tmp_path))
        return str(error.value)

    assert refused("mamba", num_hidden_layers=2).startswith(f"path: '{tmp_path}' is of mamba, ")
    assert "has linear_attention layers" in refused("qwen3_next", num_hidden_layers=4)
    assert "has chunked_attention layers" in refused("llama4_text", num_hidden_layers=4)
    assert "does not take" in refused("no_such_model")
