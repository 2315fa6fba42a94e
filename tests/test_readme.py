"""The README's snippets, as a reader would use them."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune._cli.tune import TuneCLIParser

from gspo import plugin
from gspo.commands import validate
from gspo.data.segments import Segment
from gspo.losses.inputs import LossInputs
from gspo.rewards.pool import _parse_reward
from gspo.tiny import make_untrained
from tests.data.fakes import Items, completion, rollout

TEXT = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


FILES = {
    code.split()[1]: code for code in blocks("python") if code.startswith("# my_")
}  # by the name they open with
SCRIPTS = [code for code in blocks("python") if code not in FILES.values()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder with the modules of the README in it."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gspo"])  # which a validation replaces
    return tmp_path


def commands():
    text = re.sub(r"\\\n\s*", "", "".join(blocks("sh")))
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words[:1] == ["tune"]]


def test_script_ends_with_a_gradient(folder):
    make_untrained(
        Path("runs/demo/base"), Path("runs/demo/data"), seed=0, num_train=64, num_heldout=64
    )
    Path("runs/demo/base/model.safetensors").rename(
        "runs/demo/base/model-00001-of-00001.safetensors"
    )
    (script,) = SCRIPTS
    found = {}
    exec(script, found)
    gradients = [parameter.grad for parameter in found["policy"].parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients) and any(
        g.abs().max() > 0 for g in gradients
    )
    assert found["metrics"]["kl_new_old"][0] < 1e-4


def test_own_loss_is_the_importance_weighted_policy_gradient(folder):
    import my_losses

    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1, 1]),
        loss_mask=torch.tensor([True, True, True, False]),
        old_logps=torch.tensor([-1.0, -2.0, -3.0, 0.0]),
        advantages=torch.tensor([2.0, -1.0]),
        label_counts=torch.tensor([2, 1]),
    )
    logps = torch.tensor([-1.0, -2.0, -3.0, -torch.inf], requires_grad=True)
    loss, metrics = my_losses.PolicyGradient()(logps, torch.zeros(4), inputs)
    loss.backward()
    assert loss.item() == -3.0 and logps.grad.tolist() == [-2.0, -2.0, 1.0, 0.0]
    assert [value.item() for value in metrics["own/drift"]] == [0.0, 3]


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_own_splitter_cuts_in_two(folder, num_tokens):
    import my_segments

    given = completion(num_tokens, advantage=0.5)
    (group,) = next(Segment(Items(lambda _: rollout([given]), 1), my_segments.Halves(None))).groups
    (found,) = group.completions
    assert found.segments == [0] * (num_tokens // 2) + [1] * (num_tokens - num_tokens // 2)
    assert found.segment_advantages == [0.5, 1.0]


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.partition(":")[0])
def test_yaml_fits_into_a_config(folder, block):
    own = OmegaConf.create(block)
    tiny = OmegaConf.load(plugin.shipped_configs()["tiny/gspo"])
    OmegaConf.save(
        dict(tiny.items_ex(resolve=False)) | dict(own.items_ex(resolve=False)), "my.yaml"
    )
    validate.main(["my.yaml"])
    for name, spec in OmegaConf.to_container(own).get("rewards", {}).items():
        _parse_reward(name, spec)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_is_understood(folder, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", [*words])
    arguments = TuneCLIParser().parse_args()
    if "my.yaml" not in words and words[1] == "run":
        assert arguments.recipe == plugin.RECIPE and arguments.recipe_args[0] == "--config"
        validate.main(arguments.recipe_args[1:])
