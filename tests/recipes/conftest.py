import sys

import pytest
import torch.distributed as dist

from gspo.tiny import make_untrained
from tests.recipes import runs


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """An untrained model in ``base`` and its questions in ``data``."""
    folder = tmp_path_factory.mktemp("tiny")
    make_untrained(folder / "base", folder / "data", seed=0, num_train=64, num_heldout=8)
    return folder


@pytest.fixture(scope="session")
def recipe():
    """The recipe's module."""
    return runs.load_recipe()


@pytest.fixture
def no_group_left():
    """Ends the process group of a run that stopped early."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def run(recipe, base, tmp_path, monkeypatch, no_group_left):
    """Runs the recipe in this process; gives the exit code and the output folder."""

    def of(*more, config="gspo", **options):
        arguments = runs.overrides(base, tmp_path / "out", *more, **options)
        monkeypatch.setattr(sys, "argv", runs.command_line(*arguments, config=config))
        with pytest.raises(SystemExit) as stopped:
            recipe.recipe_main()
        return stopped.value.code, tmp_path / "out"

    return of
