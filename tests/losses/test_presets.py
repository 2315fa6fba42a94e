"""Each preset against its formula, and what `preset: NAME` makes of a config."""

import json
import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

import gspo.__main__
from gspo.commands import validate
from gspo.config import Settings, build, check
from gspo.config.merge import preset_keys
from gspo.errors import InputError
from gspo.losses import GSPOLoss, presets
from gspo.losses.presets import PRESETS, effective_weights, token_gradient
from gspo.metrics import NotFinite
from gspo.plugin import shipped_configs
from tests.losses import objectives
from tests.losses.test_components import expected_gradients

MAX_NEW_TOKENS, DOCS_PER_STEP = 300, 64
each_preset = pytest.mark.parametrize("name", PRESETS)


def count(documents):
    return len(documents)


def tokens(documents):
    return sum(int(d["mask"].sum()) for d in documents)


PAPER = partial(objectives.gspo, low=3e-4, high=4e-4)
WIDE = partial(objectives.gspo, low=0.2, high=0.2)
RESTATED = {  # the sum, and what it is divided by
    "gspo": (PAPER, count),
    "gspo_token": (partial(objectives.mix, low=3e-4, high=4e-4), count),
    "fast_llm_502": (partial(WIDE, aggregation="token"), tokens),
    "fast_llm_head": (partial(WIDE, aggregation="token"), count),
    "pipelinerl": (partial(WIDE, aggregation="token"), lambda documents: DOCS_PER_STEP),
    "trl_sequence_grpo": (WIDE, count),
    "trl_sequence_dapo": (partial(WIDE, aggregation="token"), tokens),
    "luspo": (partial(WIDE, aggregation="token"), count),
    "verl": (partial(objectives.mix, low=0.2, high=0.2, below=False), count),
    "grpo": (partial(objectives.grpo, low=0.2, high=0.2), count),
    "dr_grpo": (
        partial(objectives.grpo, low=0.2, high=0.2, aggregation="token"),
        lambda documents: len(documents) * MAX_NEW_TOKENS,
    ),
    "dapo": (partial(objectives.grpo, low=0.2, high=0.28, aggregation="token"), tokens),
    "cispo": (partial(objectives.cispo, low=None, high=5.0), tokens),
    "blog_gspo": (partial(objectives.gspo, low=0.002, high=0.002), count),
    "fspo": (partial(objectives.fspo, low=0.2, high=0.2), count),
    "multi_scale": (partial(objectives.mix, low=0.2, high=0.2, share=0.5), count),
}


def loss_of(name):
    keys = {
        **PRESETS[name].config,
        "docs_per_step": DOCS_PER_STEP,
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    return config.instantiate(OmegaConf.create(keys).loss)


def drifted(lengths, shifts, scale=0.01):
    """Documents of both signs of the advantage whose log-ratios lie around each of the shifts."""
    documents = objectives.random_documents(
        [n for n in lengths for _ in shifts for _ in "+-"], scale=scale
    )
    cases = [(shift, sign) for _ in lengths for shift in shifts for sign in (1, -1)]
    for d, (shift, sign) in zip(documents, cases, strict=True):
        d["new"] = d["new"] + shift
        d["advantage"] = sign * d["advantage"].abs()
    return documents


@each_preset
@pytest.mark.parametrize("shift", [0.0, 1e-3, 0.5, 11.0], ids=str)
def test_preset_equals_its_formula(name, shift):
    """Inside the clip range, beyond each side with each sign, and beyond the exponent's bound."""
    documents = drifted([1, 7, 33, 33], [shift, -shift], scale=2e-4 if shift < 0.1 else 0.01)
    new, entropy, inputs = objectives.pack(documents)
    loss = loss_of(name)
    value, _, not_finite = loss(new.requires_grad_(), entropy, inputs)
    assert not_finite == NotFinite(0, 0)
    (grad,) = torch.autograd.grad(value, new)
    denominator = loss.denominator(len(documents), int(inputs.loss_mask.sum()))
    restated, over = RESTATED[name]
    expected, expected_grads = expected_gradients(restated, documents)
    torch.testing.assert_close(
        value.detach() / denominator, expected / over(documents), rtol=1e-12, atol=1e-12
    )
    wanted = torch.cat([*expected_grads, torch.zeros(3, dtype=torch.float64)]) / over(documents)
    torch.testing.assert_close(grad / denominator, wanted, rtol=1e-10, atol=1e-14)


def test_every_preset_is_restated_and_has_a_source():
    assert RESTATED.keys() == PRESETS.keys()
    assert all(preset.source for preset in PRESETS.values())


def test_table_by_hand():
    """Weights of documents of 8, 64, 256 and 1,024 tokens, and norms of the coefficients."""
    table = {row["preset"]: row for row in presets.rows()}
    equal, by_tokens = [1 / 4] * 4, [n / 4 for n in (8, 64, 256, 1024)]
    weights = {name: row["weights"] for name, row in table.items()}
    for name in (
        "gspo",
        "gspo_token",
        "trl_sequence_grpo",
        "verl",
        "grpo",
        "blog_gspo",
        "multi_scale",
    ):
        assert weights[name] == pytest.approx(equal)
        assert (
            table[name]["gradient_aligned"]
            == table[name]["gradient_independent"]
            == pytest.approx(1)
        )
    for name in ("fast_llm_head", "pipelinerl", "luspo", "fspo"):
        assert weights[name] == pytest.approx(by_tokens)
        assert table[name]["gradient_aligned"] == pytest.approx(1352 / 4)
        assert table[name]["gradient_independent"] == pytest.approx(
            (1352 / (1 / 8 + 1 / 64 + 1 / 256 + 1 / 1024)) ** 0.5
        )
    for name in ("fast_llm_502", "trl_sequence_dapo", "dapo", "cispo"):
        assert weights[name] == pytest.approx([4 * w / 1352 for w in by_tokens])
        assert table[name]["gradient_aligned"] == pytest.approx(1)
    assert weights["dr_grpo"] == pytest.approx([w / 1024 for w in by_tokens])


def test_token_gradient_is_per_token_and_of_the_losses_own_length():
    gradient = token_gradient(GSPOLoss(), [2, 5])
    torch.testing.assert_close(
        -gradient, torch.tensor([1 / 4] * 2 + [1 / 10] * 5, dtype=torch.float64)
    )
    assert effective_weights(GSPOLoss(length_exponent=0.5), [4, 9]) == pytest.approx([1.0, 1.5])


def write(tmp_path, text="", source="tiny/gspo", drop=("loss", "advantages")):
    """A shipped config without some sections, with more text."""
    cfg = OmegaConf.load(shipped_configs()[source])
    for key in drop:
        del cfg[key]
    path = tmp_path / "my.yaml"
    path.write_text(OmegaConf.to_yaml(cfg) + text)
    return path


def check_file(path):
    return check(OmegaConf.load(path), Settings)


@each_preset
def test_config_with_a_preset_validates_without_a_loss(name, tmp_path, capsys):
    path = write(tmp_path, f"preset: {name}\n")
    validate.main([str(path), "--no-files"])
    assert capsys.readouterr().out == "Config is well-formed!\n"
    config.validate(OmegaConf.load(path))  # `tune validate`


def test_preset_is_expanded_to_explicit_keys(tmp_path):
    cfg = check_file(write(tmp_path, "preset: dr_grpo\n"))
    assert cfg.loss == {
        "_component_": "gspo.losses.GRPOLoss",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "constant",
        "constant_length": 10,  # sampling.max_new_tokens
    }
    assert cfg.advantages.estimator == "group_mean"
    assert build(cfg, "loss").denominator(3, 100) == 30
    assert check_file(write(tmp_path, "preset: dapo\n")).advantages.refill_dead_groups is True
    pipelinerl = check_file(write(tmp_path, "preset: pipelinerl\n"))
    assert build(pipelinerl, "loss").denominator(3, 100) == 256


def test_the_configs_own_keys_win_and_are_named(tmp_path, caplog):
    path = write(
        tmp_path,
        "preset: blog_gspo\nloss: {clip_high: 0.01, kl_coef: 0.0}\n"
        "advantages: {estimator: leave_one_out}\n",
    )
    with caplog.at_level(logging.WARNING):
        cfg = check_file(path)
    widths = [cfg.loss[key] for key in ("clip_low", "clip_high", "kl_coef")]
    assert widths == [0.002, 0.01, 0.0]
    assert (cfg.advantages.estimator, cfg.group_size, cfg.optimizer["lr"]) == (
        "leave_one_out",
        8,
        3e-4,
    )
    own = "loss.clip_high, advantages.estimator, group_size, optimizer.lr"
    rest = "loss._component_, loss.aggregation, loss.clip_low, loss.log_ratio_bound"
    assert caplog.messages == [
        f"preset: blog_gspo gives way to the config's own {own}; it sets {rest}."
    ]


def test_a_preset_fills_in_what_the_config_leaves_out(tmp_path, caplog):
    path = write(tmp_path, "preset: blog_gspo\n", drop=("loss", "advantages", "group_size"))
    cfg = OmegaConf.load(path)
    del cfg.optimizer["lr"]
    assert preset_keys(cfg)["optimizer"] == {"lr": 1e-7} and preset_keys(cfg)["group_size"] == 4
    del cfg["optimizer"]
    assert "optimizer" not in preset_keys(cfg)  # it would have no component
    assert not caplog.messages


def test_a_loss_of_another_component_stands_alone(tmp_path, caplog):
    cfg = check_file(write(tmp_path, "preset: cispo\n", drop=()))
    assert cfg.loss == {**OmegaConf.load(shipped_configs()["tiny/gspo"]).loss}
    assert "preset: cispo gives way to the config's own loss._component_" in caplog.messages[0]


def test_presets_do_not_change_each_other_or_the_table(tmp_path):
    before = json.dumps({name: preset.config for name, preset in PRESETS.items()})
    cfg = check_file(write(tmp_path, "preset: gspo\n"))
    cfg.loss["clip_low"] = 0.5
    assert json.dumps({name: preset.config for name, preset in PRESETS.items()}) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gspo_tokn", "preset: 'gspo_tokn' is not known; did you mean 'gspo_token'"),
        ("reinforce", "preset: 'reinforce' is not known; there are: blog_gspo, cispo, dapo, "),
        (3, "preset: 3 is not known; there are: "),
        ("{a: 1}", "preset: {'a': 1} is not known;"),
    ],
)
def test_unknown_preset_is_refused(name, message, tmp_path):
    with pytest.raises(InputError) as caught:
        check_file(write(tmp_path, f"preset: {name}\n"))
    assert str(caught.value).startswith(message)


def test_preset_and_overrides_on_the_command_line(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gspo", "validate"])
    validate.main([str(path), "--no-files", "preset=verl", "loss.clip_high=0.3"])
    assert capsys.readouterr().out == "Config is well-formed!\n"
    with pytest.raises(SystemExit):
        validate.main([str(path), "--no-files", "preset=verl", "loss.clip_hihg=0.3"])
    assert capsys.readouterr().err.startswith(
        "error: loss.clip_hihg: unknown, GSPOTokenLoss takes no such argument"
    )
    with pytest.raises(SystemExit):
        validate.main([str(path), "--no-files", "preset=verl", "loss.clip_low=-1"])
    assert capsys.readouterr().err.startswith("error: loss.clip_low: -1 must lie in [0, 1]")
    with pytest.raises(SystemExit):
        validate.main([str(path), "--no-files"])
    assert capsys.readouterr().err.startswith("error: loss: missing, but the recipe needs a value")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gspo", "presets", *arguments])
    with pytest.raises(SystemExit) as stopped:
        gspo.__main__.main()
    assert stopped.value.code is None


def test_command_prints_the_table(monkeypatch, capsys):
    run(monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(PRESETS) + 1]] == list(PRESETS)
    assert (
        lines[4].split()
        == "fast_llm_head document clipped 0.2, 0.2 token_over_documents group_mean_std "
        "2 16 64 256 338 96.4".split()
    )
    assert "luspo: arXiv 2602.05261" in lines


def test_command_writes_json(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--json", "-")
    table = json.loads(capsys.readouterr().out)
    assert table == presets.rows()
    assert table[12]["clip_low"] is None and table[12]["surrogate"] == "CISPO"
    run(monkeypatch, "--json", str(tmp_path / "presets.json"))
    assert json.loads(Path(tmp_path / "presets.json").read_text()) == table
    assert not capsys.readouterr().out
