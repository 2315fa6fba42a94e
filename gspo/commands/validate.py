"""``python -m gspo validate``: what the recipe refuses in a config before anything is loaded, without a run.

``tune validate`` tries the arguments of each component and passes a misspelt key. Not here: whether files exist.
"""

from __future__ import annotations

import runpy
import sys

from omegaconf import DictConfig, OmegaConf
from torchtune import config

from gspo.config.checks import check_config, refusals
from gspo.config.command_line import read_command_line, show_errors
from gspo.errors import InputError
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, RECIPE, shipped_configs, shipped_folder


@show_errors
def main(arguments: list[str]) -> None:
    """Check a config, a file or a registered name, with the ``key=value`` overrides that follow it.

    Raises:
        ConfigError: from torchtune, in a config that is for a recipe of its own.
    """
    arguments = (
        arguments[1:] if arguments[:1] == ["--config"] else arguments
    )  # as the other commands take it
    if not arguments:
        raise InputError(
            "validate: no config; name a file or a registered config, python -m gspo validate tiny/gspo"
        )
    if not CONFIGS_OF_OTHER_RECIPES.keys().isdisjoint(arguments):
        config.validate(OmegaConf.load(shipped_configs().get(arguments[0], arguments[0])))
    else:
        read_checked(arguments)
    print("Config is well-formed!")


def read_checked(arguments: list[str]) -> DictConfig:
    """The config that ``arguments`` name, as the recipe starts with it: overrides merged, defaults filled in, checked.

    Raises:
        InputError: what the recipe refuses before anything is loaded.
    """
    files = shipped_configs()
    recipe = runpy.run_path(str(shipped_folder("recipes") / f"{RECIPE}.py"))
    sys.argv[1:] = ["--config", *(str(files.get(argument, argument)) for argument in arguments)]
    cfg = check_config(
        read_command_line(),
        required=recipe["REQUIRED_KEYS"],
        optional=recipe["OPTIONAL_KEYS"],
        sections=recipe["SECTIONS"],
        passed=recipe["PASSED"],
    )
    recipe["GSPOFullFinetuneRecipe"]._check_values(cfg)
    with refusals("loss", "correct its arguments"):
        config.instantiate(cfg.loss)
    return cfg
