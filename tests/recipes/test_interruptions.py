"""A run that is interrupted, that another run disturbs, or whose disk is full."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchtune.training import FullModelHFCheckpointer

from gspo.config import show_errors
from gspo.errors import InputError
from gspo.run import checkpoint, dump
from tests.recipes.runs import ROOT, lines, overrides

FULL = OSError(errno.ENOSPC, "No space left on device")
NO_SAVE = "nothing was saved yet."


@pytest.fixture(autouse=True)
def handler():
    """Ctrl-C as it was: a run that is interrupted takes no second one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def raise_in_step(recipe, monkeypatch, number, error):
    """Raise an error in the update of a step."""
    update = recipe.GSPOFullFinetuneRecipe._update

    def fail_there(self, *args):
        if self._state.step == number - 1:
            raise error
        return update(self, *args)

    monkeypatch.setattr(recipe.GSPOFullFinetuneRecipe, "_update", fail_there)


@pytest.mark.parametrize(
    ("every", "saved"), [(1, "the last saved model is {}/epoch_2."), (0, NO_SAVE)]
)
def test_interrupt_is_one_line_with_the_last_model(run, recipe, monkeypatch, capsys, every, saved):
    raise_in_step(recipe, monkeypatch, 3, KeyboardInterrupt())
    code, output = run("num_steps=9", f"save_every_n_steps={every}")
    shown = capsys.readouterr().err
    assert code == 130
    assert shown.endswith(f"\nInterrupted after step 2; {saved.format(output)}\n")
    assert "Traceback" not in shown


@pytest.mark.parametrize(("rank", "shown"), [("0", "Interrupted.\n"), ("1", "")])
def test_first_rank_alone_tells_of_an_interrupt(monkeypatch, capsys, rank, shown):
    @show_errors
    def main():
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and capsys.readouterr().err == shown


def test_ctrl_c_ends_a_process_with_one_line(base, tmp_path):
    """The signal goes to all processes of a terminal, reward workers too."""
    arguments = overrides(base, tmp_path / "out", "num_steps=5000", "save_every_n_steps=2")
    command = ["-m", "gspo", "run", "gspo_full_finetune", "--config", "tiny/gspo"]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert time.monotonic() - began < 120 and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    last = shown.rstrip("\n").split("\n")[-1]
    assert re.fullmatch(
        r"Interrupted after step \d+; the last saved model is \S+/epoch_\d+\.", last
    )
    assert "Traceback" not in shown


def test_error_in_training_begins_a_line(run, recipe, monkeypatch, capsys):
    raise_in_step(recipe, monkeypatch, 2, InputError("rewards", "mine", "fails"))
    code, _ = run()
    shown = capsys.readouterr().err
    assert code == 1 and "steps:  50%" in shown
    assert shown.endswith("\nerror: rewards: 'mine' fails\n")


def test_held_out_answers_are_written(run):
    code, output = run("eval={every_n_steps: 1, num_samples: 2}")
    assert code is None
    rows = lines(output / "held_out.jsonl")
    assert [row["step"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert rows[0].keys() == {
        *("step", "prompt_id", "prompt", "completion", "answer", "reward", "correct"),
    }
    for metrics in lines(output / "metrics.jsonl"):
        of_step = [row for row in rows if row["step"] == metrics["step"]]
        rewards = [row["reward"] for row in of_step]
        assert sum(rewards) / 8 == pytest.approx(metrics["eval/reward"])
        assert sum(row["correct"] for row in of_step) / 8 == metrics["eval/accuracy"]


def test_groups_that_are_all_dead_are_recorded(run):
    code, output = run("log_completions=3", reward="tests.recipes.rewards.constant")
    assert code is None
    rows = lines(output / "completions.jsonl")
    assert len(rows) == 2 * 3 and all(row["dead"] for row in rows)


@pytest.mark.parametrize("key", ["checkpointer", "reference_checkpointer"])
def test_model_of_its_own_folder_is_refused(run, base, tmp_path, capsys, key):
    model = tmp_path / "out" / "epoch_2"
    shutil.copytree(base / "base", model)
    (tmp_path / "link").symlink_to(model)
    code, _ = run(
        f"{key}._component_=torchtune.training.FullModelHFCheckpointer",
        f"{key}.checkpoint_dir={tmp_path / 'link'}",
        f"{key}.checkpoint_files=[model.safetensors]",
        f"{key}.model_type=QWEN2",
        f"{key}.output_dir={tmp_path / 'out'}",
    )
    assert code == 1
    assert (
        f"error: {key}.checkpoint_dir: '{tmp_path / 'link'}' lies in {tmp_path / 'out'}, where "
        "this run writes its own models and may write over it; set another output_dir"
    ) in capsys.readouterr().err


def test_full_disk_costs_rows_and_no_run(run, monkeypatch, caplog):
    write_text = Path.write_text

    def full(self, *args, **options):
        if self.name == "summary.json":
            raise FULL
        return write_text(self, *args, **options)

    def append(path, text):
        raise FULL

    def write(path, content):
        raise FULL

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("gspo.run.rows._append", append)
    monkeypatch.setattr(dump, "write", write)
    code, output = run("num_steps=3", "dump_every_n_steps=2")
    assert code is None
    shown = [record.getMessage() for record in caplog.records]
    for name in ("metrics.jsonl", "completions.jsonl", "held_out.jsonl", "summary.json"):
        problem = f"{output / name} could not be written: [Errno 28] No space left on device."
        assert sum(message.startswith(problem) for message in shown) == 1
    assert any(message.startswith("The dump of step 2 could not be wr") for message in shown)
    assert f"{output / 'metrics.jsonl'} lacks 4 rows, which could not be written." in shown
    assert (output / "epoch_3" / "model-00001-of-00001.safetensors").exists()


def test_model_that_cannot_be_saved_is_kept(run, monkeypatch, capsys, tmp_path):
    save = FullModelHFCheckpointer.save_checkpoint
    folders = []

    def full(self, state_dict, epoch):
        folders.append(self._output_dir)
        save(self, state_dict, epoch)
        if self._output_dir == tmp_path / "out":
            raise FULL

    monkeypatch.setattr(FullModelHFCheckpointer, "save_checkpoint", full)
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_TRIES", 0.0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    code, output = run("save_every_n_steps=1")
    error = capsys.readouterr().err.split("error: ")[-1]
    assert code == 1
    assert folders[:4] == [output] * 4  # a try after the first step, and three at the end
    kept = re.search(r"it is kept in (\S+), move it from there\n", error)[1]
    assert kept.startswith(str(tmp_path / "tmp")) and Path(kept, "config.json").exists()
    assert len(error.splitlines()) == 1
    assert not list(output.glob("epoch_*")) and (output / "summary.json").exists()
