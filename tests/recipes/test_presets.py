"""Short runs whose objective is named by `preset:`, without a `loss` section."""

import logging
import math

import pytest

from gspo.commands.validate import read_checked
from gspo.config.command_line import read_command_line
from tests.recipes.runs import ROOT, steps

NO_LOSS = ("~loss", "~advantages")


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("verl", "0.25, 0.25, 0.25, 0.25"),
        ("cispo", "0.00592, 0.0473, 0.189, 0.757"),
        ("dr_grpo", "0.2, 1.6, 6.4, 25.6"),  # by a length of sampling.max_new_tokens, 10
        ("pipelinerl", "0.25, 2, 8, 32"),  # by docs_per_step, 32
    ],
)
def test_run_with_a_preset_says_what_a_document_weighs(run, caplog, name, weights):
    with caplog.at_level(logging.INFO):
        code, output = run(*NO_LOSS, f"preset={name}")
    assert code is None
    said = f"In a step of documents of 8, 64, 256, 1024 tokens, each weighs {weights}."
    assert [m for m in caplog.messages if "each weighs" in m] == [said]
    (logged,) = [m for m in caplog.messages if "_component_: gspo.losses." in m]
    assert f"preset: {name}" in logged and "clip_high" in logged
    records = steps(output)
    assert len(records) == 2
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)


def test_preset_on_the_command_line_replaces_the_files_objective(run, caplog):
    with caplog.at_level(logging.INFO):
        code, _ = run("preset=dapo", "loss.clip_high=0.3", "advantages.refill_dead_groups=false")
    assert code is None
    (logged,) = [m for m in caplog.messages if "_component_: gspo.losses." in m]
    assert (
        "gspo.losses.GRPOLoss" in logged
        and "clip_low: 0.2\n" in logged
        and "clip_high: 0.3\n" in logged
    )
    assert "aggregation: token\n" in logged and "refill_dead_groups: false\n" in logged


@pytest.mark.parametrize("preset_in_file", [False, True])
def test_a_loss_named_beside_a_preset_stands(base, tmp_path, monkeypatch, preset_in_file):
    text = (ROOT / "configs" / "tiny" / "gspo.yaml").read_text()
    before, _, rest = text.partition("loss:\n")
    text = before + "preset: dapo\n" + rest[rest.index("\n\n") :] if preset_in_file else text
    file = tmp_path / "my.yaml"
    file.write_text(text)
    more = () if preset_in_file else ("preset=dapo",)
    monkeypatch.setattr("sys.argv", ["recipe"])
    cfg = read_checked([str(file), *more, "loss=gspo.losses.FSPOLoss", "loss.clip_high=0.7"])
    assert cfg.loss == {"_component_": "gspo.losses.FSPOLoss", "clip_high": 0.7}


def test_penalties_of_the_file_stay_with_a_preset(base, tmp_path, monkeypatch):
    file = tmp_path / "my.yaml"
    text = (ROOT / "configs" / "tiny" / "gspo.yaml").read_text()
    file.write_text(
        text.replace("  aggregation: document\n", "  aggregation: document\n  kl_coef: 0.01\n", 1)
    )
    monkeypatch.setattr("sys.argv", ["recipe", "--config", str(file), "preset=dapo"])
    loss = read_command_line().loss
    assert loss == {"kl_coef": 0.01}
