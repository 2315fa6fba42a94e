import errno
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gspo.errors import InputError
from gspo.run import checkpoint
from gspo.run.checkpoint import ModelWriter

FULL = OSError(errno.ENOSPC, "No space left on device")


class Checkpointer:
    """Fails in the folders whose disk is full, after a part of the model."""

    def __init__(self, folder, full, num_failures=99, error=FULL):
        self._output_dir = folder
        self.full = full
        self.failures = iter([error] * num_failures)
        self.num_calls = 0

    def save_checkpoint(self, state_dict, epoch):
        self.num_calls += 1
        path = Path(self._output_dir, f"epoch_{epoch}")
        path.mkdir()
        (path / "model-00001-of-00002.safetensors").write_text("weights")
        error = next(self.failures, None) if self._output_dir in self.full else None
        if error is not None:
            raise error
        (path / "config.json").write_text('{"dtype": "float32"}')


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The run's folder, and the system's temporary one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_TRIES", 0.0)
    return tmp_path / "out", tmp_path / "tmp"


def writer(checkpointer, folder):
    return ModelWriter(checkpointer, folder, torch.bfloat16)


ERRORS = [
    FULL,
    SafetensorError("I/O error: No space left on device (os error 28)"),
    RuntimeError("PytorchStreamWriter failed writing file"),  # torch.save's
]


@pytest.mark.parametrize("error", ERRORS, ids=["system", "safetensors", "torch"])
def test_last_model_is_tried_again(folders, error):
    out, _ = folders
    checkpointer = Checkpointer(out, [out], num_failures=2, error=error)
    path = writer(checkpointer, out).save_last({}, 7)
    assert path == out / "epoch_7" and checkpointer.num_calls == 3
    assert "bfloat16" in (path / "config.json").read_text()


def test_last_model_is_kept_elsewhere(folders):
    out, elsewhere = folders
    with pytest.raises(InputError) as refused:
        writer(Checkpointer(out, [out]), out).save_last({}, 7)
    (kept,) = elsewhere.glob("gspo_model_*/epoch_7")
    assert str(refused.value) == (
        f"output_dir: '{out}' could not take the model of step 7 in 3 tries: OSError: [Errno 28] "
        f"No space left on device; it is kept in {kept}, move it from there"
    )
    assert (kept / "model-00001-of-00002.safetensors").exists()
    assert not list(out.iterdir())  # no part of a model


def test_last_model_that_fits_nowhere_is_said_to_be_lost(folders, monkeypatch):
    out, elsewhere = folders

    def fail(prefix):
        raise FULL

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    with pytest.raises(InputError, match=f"it is lost, {elsewhere} could not take it either: OSEr"):
        writer(Checkpointer(out, [out]), out).save_last({}, 7)
    assert not list(out.iterdir())


def test_model_that_others_follow_may_fail_once(folders):
    out, elsewhere = folders
    checkpointer = Checkpointer(out, [out], num_failures=1)
    assert writer(checkpointer, out).try_to_save({}, 5) is None
    assert not list(out.iterdir()) and not list(elsewhere.iterdir())
    assert writer(checkpointer, out).try_to_save({}, 6) == out / "epoch_6"
