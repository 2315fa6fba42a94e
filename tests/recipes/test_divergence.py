"""A run that diverges says where, at once, and a run that has stopped learning says so."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo.data.advantage import Advantage
from tests.recipes.runs import lines, steps

PARTLY_HUGE = "tests.recipes.divergence.partly_huge"


@pytest.fixture
def spoiled_checkpoint(base, tmp_path):
    """A copy of the tiny model with three values of a layer that are not finite."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for file in (base / "base").iterdir():
        if file.is_file():  # other tests leave folders there
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    values = weights["model.layers.1.mlp.up_proj.weight"].view(-1)
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(
    run, spoiled_checkpoint, capsys
):
    code, _ = run(f"checkpointer.checkpoint_dir={spoiled_checkpoint}")
    message = capsys.readouterr().err.split("error: ")[-1]
    assert code == 1
    assert message.startswith("checkpointer: 'layers.1.mlp.w3.weight' has 3 of "), message
    assert "values that are not finite, in the checkpoint; load weights that are finite" in message


def test_a_reference_that_is_not_finite_is_told_from_the_policy(
    run, tmp_path, spoiled_checkpoint, capsys
):
    code, _ = run(
        "reference_checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
        f"reference_checkpointer.checkpoint_dir={spoiled_checkpoint}",
        "reference_checkpointer.checkpoint_files=[model.safetensors]",
        f"reference_checkpointer.output_dir={tmp_path / 'out'}",
        "reference_checkpointer.model_type=QWEN2",
    )
    assert code == 1
    assert "error: reference_checkpointer: 'layers.1.mlp.w3.weight' has 3 of" in (
        capsys.readouterr().err
    )


def test_quarantined_documents_count_as_drawn(run, monkeypatch):
    """Half of the completions leave, and yet a rollout of 32 is a step of 32."""
    sizes = []
    next_of = Advantage.next

    def counted(self):
        batch = next_of(self)
        sizes.append(batch.quarantined_documents)
        return batch

    monkeypatch.setattr(Advantage, "next", counted)
    code, output = run(reward=PARTLY_HUGE)
    rows = steps(output)
    assert not code and len(sizes) == len(rows) == 2
    assert [row["quarantined_documents"] for row in rows] == sizes
    assert all(0 < size < 32 for size in sizes)


def test_the_first_quarantined_documents_are_logged_with_their_file(run, caplog):
    with caplog.at_level(logging.WARNING, logger="gspo.diagnosis"):
        _, output = run(reward=PARTLY_HUGE)
    messages = [m for m in caplog.messages if m.startswith("Quarantined documents so far")]
    assert "quarantine_rank<r>.jsonl in output_dir" in messages[0]
    assert len(lines(output / "quarantine_rank0.jsonl")) >= 2
