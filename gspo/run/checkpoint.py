"""The saving of a model, which a full disk must not lose.

Not here: when a model is saved.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torchtune import training, utils

from gspo.compat import with_output_dir
from gspo.errors import InputError, first_line
from gspo.parallel.mesh import Ranks

log = utils.get_logger("INFO")

MODEL_PREFIX = "epoch"  # as torchtune's checkpointers name folders, before the number
NUM_TRIES = 3  # to save the last model of a run
SECONDS_BETWEEN_TRIES = 10.0  # in which a user or a clean-up may make room

# What writers raise where the system gives an OSError: torch.save a RuntimeError.
_WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)


def on_first(weights: Iterable[tuple[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Collect whole weights in the host's memory of the first rank; none elsewhere. Collective.

    Args:
        weights: by name, gathered one by one as they are asked for.
        ranks: of the run.
    """
    kept = {}
    for name, weight in weights:
        if ranks.is_first:
            kept[name] = weight.cpu()
    return kept


class ModelWriter:
    """Models in the format that they were read in, whole or not at all.

    Args:
        checkpointer: torchtune's, which has loaded the base model.
        folder: where it saves ``epoch_N/``.
        dtype: of the weights.
        prefix: of the names of the folders that it saves, before the step.
    """

    def __init__(
        self, checkpointer: Any, folder: Path, dtype: torch.dtype, *, prefix: str = MODEL_PREFIX
    ) -> None:
        self._checkpointer = checkpointer
        self._folder = folder
        self._dtype = dtype
        self._prefix = prefix

    def try_to_save(self, weights: dict[str, Tensor], step: int) -> Path | None:
        """Save the model of a step that others follow; a failure is a warning.

        Args:
            weights: whole, by torchtune's names.
            step: that they are of.

        Returns:
            The model's folder; None if it could not be written.
        """
        try:
            return self._save(self._checkpointer, self._folder, weights, step)
        except _WRITE_ERRORS as error:
            log.warning(
                "The model of step %d could not be saved in %s: %s. The run goes on.",
                step,
                self._folder,
                _line(error),
            )
            return None

    def save_last(self, weights: dict[str, Tensor], step: int) -> Path:
        """Save the last model of a run: try again, then keep it in the system's temporary folder.

        Args:
            weights: whole, by torchtune's names.
            step: that they are of.

        Returns:
            The model's folder.

        Raises:
            InputError: The model is not in its place; the message says where it is.
        """
        for i in range(NUM_TRIES):
            if i > 0:
                time.sleep(SECONDS_BETWEEN_TRIES)
            try:
                return self._save(self._checkpointer, self._folder, weights, step)
            except _WRITE_ERRORS as error:
                cause = _line(error)
                log.warning("The model could not be saved (try %d): %s.", i + 1, cause)
        raise InputError(
            "output_dir",
            str(self._folder),
            f"could not take the model of step {step} in {NUM_TRIES} tries: {cause}",
            self._keep_elsewhere(weights, step),
        )

    def _keep_elsewhere(self, weights: dict[str, Tensor], step: int) -> str:
        """Save the model in a temporary folder, and return what to tell the user."""
        elsewhere = Path(tempfile.gettempdir())
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="gspo_model_"))
            checkpointer = with_output_dir(self._checkpointer, elsewhere)
            path = self._save(checkpointer, elsewhere, weights, step)
        except _WRITE_ERRORS as error:
            return f"it is lost, {elsewhere} could not take it either: {_line(error)}"
        return f"it is kept in {path}, move it from there"

    def _save(self, checkpointer: Any, folder: Path, weights: dict[str, Tensor], step: int) -> Path:
        """Save a model, or leave no part of it behind."""
        path = folder / f"{self._prefix}_{step}"
        try:
            checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=step)
            _name_dtype(path / "config.json", self._dtype)
        except _WRITE_ERRORS:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return path


def _line(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Name the weights' dtype in a saved ``config.json``, which is a copy of the base model's."""
    if not file.exists():  # torchtune's and Meta's formats have none
        return
    config = json.loads(file.read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    file.unlink()  # it was copied with its permissions, which may forbid writing
    file.write_text(json.dumps(config, indent=2))
