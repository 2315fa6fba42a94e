"""Put the recipe and its configs into torchtune's registry, so that plain ``tune`` knows them.

torchtune has no plugin hook, but torch calls the entry points of its group ``torch.backends`` at
the end of its import, and ``tune`` imports torchtune first, which imports torch: at that moment
``torchtune`` is in ``sys.modules``. In a process that imports torch first it is not, and nothing is
registered: call :func:`add_recipes` there.

The module imports the standard library only, because it is a part of every ``import torch``; so
torchtune's registry is named here and not in ``gspo.compat``. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``
switches the entry point off; ``python -m gspo`` opens the same doors without it.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

from _gspo_torch_plugin import hide_torchao_note

__all__ = [
    "add_recipes",
    "hide_torchao_note",
    "register",
    "shipped_configs",
    "shipped_folder",
    "shorten_interrupts",
]

RECIPE = "gspo_full_finetune"

# Configs for recipes of torchtune's own; every other file in the folder is one for RECIPE.
CONFIGS_OF_OTHER_RECIPES = {"tiny/sft": "full_finetune_single_device"}


def register() -> None:
    """Register if torchtune is being imported.

    Never raises: an exception here would break ``import torch``.
    """
    if "torchtune" not in sys.modules:
        return
    try:
        hide_torchao_note()
        if Path(sys.argv[0]).name == "tune":  # and not a script of the user's
            shorten_interrupts()
        add_recipes()
    except Exception as error:
        print(f"gspo: not registered with tune: {error!r}", file=sys.stderr)


def shorten_interrupts() -> None:
    """Show Ctrl-C as one line with exit code 130 where no command catches it, as while it imports.

    :func:`gspo.config.show_errors` does the same for a command that has begun.
    """
    show = sys.excepthook

    def show_briefly(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            show(kind, error, traceback)
            return
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("Interrupted.\n")
        sys.exit(130)

    sys.excepthook = show_briefly


def add_recipes() -> None:
    """Add the recipe and the configs to torchtune's registry; a second call changes nothing.

    Paths are absolute. The registry is a private module of torchtune's, seen in 0.6.1.

    Raises:
        FileNotFoundError: The installation lacks the recipes or the configs.
    """
    from torchtune._recipe_registry import Config, Recipe, get_all_recipes

    script = shipped_folder("recipes") / f"{RECIPE}.py"
    recipes = {recipe.name: recipe for recipe in get_all_recipes()}
    if RECIPE not in recipes:
        recipes[RECIPE] = Recipe(
            name=RECIPE, file_path=str(script), configs=[], supports_distributed=True
        )
        get_all_recipes().append(recipes[RECIPE])
    for name, path in shipped_configs().items():
        configs = recipes[CONFIGS_OF_OTHER_RECIPES.get(name, RECIPE)].configs
        if all(config.name != name for config in configs):
            configs.append(Config(name=name, file_path=str(path)))


def shipped_configs() -> dict[str, Path]:
    """Return the configs by name, e.g. ``tiny/gspo``.

    A name is the path below the folder of configs, without its suffix.
    """
    folder = shipped_folder("configs")
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def shipped_folder(name: str) -> Path:
    """Return the folder ``recipes`` or ``configs``.

    It is inside the package in a wheel, and beside it in a checkout.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"no folder {name!r} in {package} or beside it; install the package again"
    )
