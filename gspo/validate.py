"""``python -m gspo validate``: what the recipe refuses in a config before anything is loaded, without a run.

``tune validate`` tries the arguments of each component and passes a misspelt key. Not here: whether files exist.
"""

from __future__ import annotations

import runpy
import sys

from omegaconf import OmegaConf
from torchtune import config

from gspo.config import check_config, read_command_line, show_errors
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, RECIPE, shipped_configs, shipped_folder


@show_errors
def main(arguments: list[str]) -> None:
    """Check a config, a file or a registered name, with the ``key=value`` overrides that follow it.

    Raises:
        ConfigError: from torchtune, in a config that is for a recipe of its own.
    """
    files = shipped_configs()
    paths = [str(files.get(argument, argument)) for argument in arguments]
    if not CONFIGS_OF_OTHER_RECIPES.keys().isdisjoint(arguments):
        config.validate(OmegaConf.load(paths[0]))
    else:
        recipe = runpy.run_path(str(shipped_folder("recipes") / f"{RECIPE}.py"))
        sys.argv[1:] = ["--config", *paths]
        cfg = check_config(
            read_command_line(),
            required=recipe["REQUIRED_KEYS"],
            optional=recipe["OPTIONAL_KEYS"],
            sections=recipe["SECTIONS"],
            passed=recipe["PASSED"],
        )
        recipe["GSPOFullFinetuneRecipe"]._check_values(cfg)
    print("Config is well-formed!")
