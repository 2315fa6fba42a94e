"""Settings without executing a recipe, and those of a copied one."""

import subprocess
import sys

import pytest

from gspo.commands import trial, validate
from gspo.commands.validate import read_checked, settings_of
from gspo.config import Settings
from gspo.errors import InputError
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, shipped_configs

OURS = [name for name in shipped_configs() if name not in CONFIGS_OF_OTHER_RECIPES]
RECIPE = """
import sys
from pathlib import Path

from gspo.config import Count, Settings, parse


class MySettings(Settings):
    floor: Count = 3


@parse(MySettings)
def main(cfg):
    Path("started").touch()


if __name__ == "__main__":
    sys.exit(main())
""".replace("Count, Settings, parse", "Settings, parse\nfrom gspo.config.value_types import Count")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gspo", "an argument"])
    return tmp_path


def write(folder, text):
    path = folder / "my_recipe.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "arguments", [["tiny/gspo"], ["--config", "tiny/gspo"], ["seed=3", "--config", "tiny/gspo"]]
)
def test_config_is_the_first_word_or_an_option(arguments, capsys):
    validate.main([*arguments, "--no-files", "num_steps=50"])
    assert capsys.readouterr().out == "Config is well-formed!\n"


def test_command_line_is_left_as_it_was():
    cfg = read_checked(["tiny/gspo", "num_steps=50"])
    assert cfg.num_steps == 50
    assert sys.argv == ["gspo", "an argument"]


def test_recipe_is_imported_and_not_started(folder):
    recipe = write(folder, RECIPE)
    validate.main(["tiny/gspo", "--no-files", "--recipe", recipe, "floor=4"])
    assert not (folder / "started").exists()
    assert settings_of(recipe).__name__ == "MySettings"
    assert issubclass(settings_of(recipe), Settings)


def test_own_keys_are_checked_as_all_are(folder, capsys):
    recipe = write(folder, RECIPE)
    with pytest.raises(SystemExit):
        validate.main(["tiny/gspo", "--recipe", recipe, "floor=0"])
    assert capsys.readouterr().err.startswith("error: floor: 0 must be a whole number of 1 or more")
    with pytest.raises(SystemExit):
        validate.main(["tiny/gspo", "floor=4"])
    assert "floor: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function with settings; decorate the recipe's main with @parse"),
        (
            RECIPE + "\n\n@parse(MySettings)\ndef other(cfg):\n    pass\n",
            "has several functions with settings: main, other; decorate one alone",
        ),
    ],
    ids=["none", "two"],
)
def test_recipe_has_one_decorated_function(folder, text, message):
    with pytest.raises(InputError, match=message):
        settings_of(write(folder, text))


def test_recipe_that_cannot_be_imported_is_one_message(folder):
    with pytest.raises(InputError, match="--recipe: ModuleNotFoundError: .*; correct .*my_recipe"):
        settings_of(write(folder, "import a_module_that_is_not_there"))


def test_recipe_that_is_not_there_is_one_message():
    with pytest.raises(InputError, match="--recipe: 'nowhere.py' is no file"):
        settings_of("nowhere.py")


def test_no_config_is_one_message(capsys):
    with pytest.raises(SystemExit):
        validate.main([])
    assert capsys.readouterr().err.startswith("error: validate: no config; name a file or")


def test_what_a_loss_needs_of_the_config_is_checked(capsys):
    with pytest.raises(SystemExit):
        validate.main(["tiny/gspo", "loss.correction=sequence_geometric"])
    assert "loss.correction: 'sequence_geometric' needs old_logps" in capsys.readouterr().err


def test_files_are_read_and_no_folder_is_left(base, folder):
    files = [f"base_dir={base / 'base'}", f"data_dir={base / 'data'}"]
    weights = "checkpointer.checkpoint_files=[model.safetensors]"
    validate.main(["tiny/gspo", *files, weights, "output_dir=runs/of/mine"])
    assert not (folder / "runs").exists()


def test_prompts_on_a_hub_are_not_fetched(base, monkeypatch):
    monkeypatch.setattr(trial, "build", lambda cfg, key, *_, **__: pytest.fail(key))
    cfg = read_checked(["llama3_2/1B_grpo"])
    _, *prompts = trial._try_prompts(cfg)
    assert not prompts


@pytest.mark.parametrize("name", OURS)
def test_shipped_config_fits_without_its_files(name, capsys):
    validate.main([name, "--no-files"])
    printed = capsys.readouterr()
    assert printed.out == "Config is well-formed!\n"


@pytest.mark.parametrize("command", ["validate", "plan", "presets", "replay"])
def test_every_command_has_help(command):
    shown = subprocess.run(
        [sys.executable, "-m", "gspo", command, "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and f"python -m gspo {command}" in shown.stdout, shown.stderr
    assert not shown.stderr
