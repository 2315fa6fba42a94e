import os
import shutil
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import pytest
import torchtune._recipe_registry as registry

import gspo.__main__
from gspo import plugin

ROOT = Path(__file__).parent.parent
TUNE = ("-m", "torchtune._cli.tune")
STUB = """
import os, sys
words = ["rank", str(os.environ.get("RANK")), "got", *sys.argv[1:]]
sys.stdout.write(" ".join(words) + chr(10))  # one write: two ranks share the pipe
"""


@pytest.fixture(scope="session")
def installed_stub(installed, tmp_path_factory):
    """The same with a recipe that only says what it was called with."""
    folder = tmp_path_factory.mktemp("stub")
    shutil.copytree(installed, folder, dirs_exist_ok=True)
    (folder / "gspo" / "recipes" / f"{plugin.RECIPE}.py").write_text(STUB)
    return folder


@pytest.fixture
def recipes(monkeypatch):
    """torchtune's registry as it is without the plugin, restored afterwards."""
    registered = [
        recipe for recipe in deepcopy(registry._ALL_RECIPES) if recipe.name != plugin.RECIPE
    ]
    for recipe in registered:
        recipe.configs = [
            config for config in recipe.configs if config.name not in plugin.shipped_configs()
        ]
    monkeypatch.setattr(registry, "_ALL_RECIPES", registered)
    return registered


def python(*arguments, path, cwd, **environment):
    environment = os.environ | {"PYTHONPATH": str(path)} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def config_names(recipes, name):
    return [config.name for recipe in recipes if recipe.name == name for config in recipe.configs]


def files(folder, pattern):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(pattern)}


def test_wheel_holds_every_module_recipe_and_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs, modules = files("configs", "*.yaml"), files("gspo", "*.py")
    assert "tiny/gspo.yaml" in configs
    assert {f"gspo/{name}" for name in modules} <= names
    assert {f"gspo/configs/{name}" for name in configs} <= names
    assert {f"gspo/recipes/{plugin.RECIPE}.py", "_gspo_torch_plugin.py"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "gspo",
        "_gspo_torch_plugin.py",
    }


def test_tune_lists_the_recipe_and_its_configs(installed, tmp_path):
    lines = python(*TUNE, "ls", path=installed, cwd=tmp_path).stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(plugin.RECIPE))
    listed = [line.split()[-1] for line in lines[first:]]
    expected = [
        name for name in plugin.shipped_configs() if name not in plugin.CONFIGS_OF_OTHER_RECIPES
    ]
    assert listed == expected
    assert sum(line.startswith(plugin.RECIPE) for line in lines) == 1


def test_tune_copies_prints_and_validates(installed, tmp_path):
    script = """
import sys
from torchtune._cli.tune import main
for command in ("cp gspo_full_finetune my_recipe.py", "cp tiny/gspo my_config.yaml",
                "cat tiny/gspo", "validate my_config.yaml"):
    sys.argv = ["tune", *command.split()]
    main()
"""
    result = python("-c", script, path=installed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "my_recipe.py").read_bytes() == (
        ROOT / "recipes" / f"{plugin.RECIPE}.py"
    ).read_bytes()
    assert (tmp_path / "my_config.yaml").read_bytes() == (
        ROOT / "configs" / "tiny" / "gspo.yaml"
    ).read_bytes()
    assert "docs_per_step:" in result.stdout
    assert result.stdout.endswith("Config is well-formed!\n")


def test_tune_runs_the_recipe_by_name(installed_stub, tmp_path):
    command = ("run", plugin.RECIPE, "--config", "tiny/gspo", "seed=3")
    result = python(*TUNE, *command, path=installed_stub, cwd=tmp_path)
    config = installed_stub / "gspo" / "configs" / "tiny" / "gspo.yaml"
    assert result.stdout == f"rank None got --config {config} seed=3\n", result.stderr


def test_module_runs_the_recipe_on_two_ranks_without_the_plugin(installed_stub, tmp_path):
    command = ("run", "--nproc_per_node", "2", plugin.RECIPE, "--config", "tiny/gspo")
    result = python(
        "-m", "gspo", *command, path=installed_stub, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    config = installed_stub / "gspo" / "configs" / "tiny" / "gspo.yaml"
    ranks = sorted(line for line in result.stdout.splitlines() if line.startswith("rank"))
    assert ranks == [f"rank {rank} got --config {config}" for rank in (0, 1)], result.stderr


def test_switch_turns_the_plugin_off(installed, tmp_path):
    result = python(*TUNE, "ls", path=installed, cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "full_finetune_single_device" in result.stdout
    assert plugin.RECIPE not in result.stdout


@pytest.mark.parametrize("imports", ["torch, torchtune", "torchtune, torch"])
def test_import_survives_a_file_that_hides_the_package(installed, tmp_path, imports):
    (tmp_path / "gspo.py").write_text("raise RuntimeError('this is my own file')\n")
    (tmp_path / "script.py").write_text(f"import {imports}\nprint('imported')\n")
    result = python("script.py", path=installed, cwd=tmp_path)
    assert result.stdout == "imported\n", result.stderr
    assert ("my own file" in result.stderr) == imports.startswith("torchtune")


def test_plugin_imports_the_standard_library_only(tmp_path):
    script = """
import sys
before = set(sys.modules)
import _gspo_torch_plugin
_gspo_torch_plugin.register()
assert "gspo" not in sys.modules, "gspo is loaded although torchtune is not"
import gspo.plugin
gspo.plugin.register()
print(*{name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    result = python("-c", script, path=ROOT, cwd=tmp_path)
    assert set(result.stdout.split()) == {"_gspo_torch_plugin", "gspo"}, result.stderr


def test_register_swallows_and_tells_what_goes_wrong(recipes, monkeypatch, capsys):
    def fail(name):
        raise FileNotFoundError(f"no folder {name}")

    monkeypatch.setattr(plugin, "shipped_folder", fail)
    plugin.register()
    assert (
        capsys.readouterr().err
        == "gspo: not registered with tune: FileNotFoundError('no folder recipes')\n"
    )


def test_register_does_nothing_until_torchtune_is_imported(recipes, monkeypatch):
    monkeypatch.delitem(sys.modules, "torchtune")
    plugin.register()
    assert plugin.RECIPE not in [recipe.name for recipe in recipes]


def test_add_recipes_is_idempotent_and_absolute(recipes):
    plugin.add_recipes()
    once = deepcopy(recipes)
    plugin.add_recipes()
    assert recipes == once
    recipe = recipes[-1]
    assert recipe.name == plugin.RECIPE and recipe.supports_distributed
    for path in (recipe.file_path, *(config.file_path for config in recipe.configs)):
        assert Path(path).is_absolute() and Path(path).is_file()


def test_configs_go_to_the_recipe_that_they_are_for(recipes, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for name in ("tiny/gspo", "tiny/sft", "a/b/c"):
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(plugin, "shipped_folder", lambda name: tmp_path / name)
    plugin.add_recipes()
    assert config_names(recipes, plugin.RECIPE) == ["a/b/c", "tiny/gspo"]
    assert config_names(recipes, "full_finetune_single_device")[-1] == "tiny/sft"


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["tiny/gspo"], ""),
        (["tiny/sft"], ""),  # for a recipe of torchtune's own
        (["my.yaml", "loss.clip_low=0.1", "~eval_prompts"], ""),
        (
            ["my.yaml", "docs_per_stepp=3"],
            "error: docs_per_stepp: unknown key; did you mean 'docs_per_step'?\n",
        ),
        (
            ["my.yaml", "num_steps=0"],
            "error: num_steps: 0 must be a whole number of 1 or more, at most 2,147,483,647; "
            "change it\n",
        ),
        (
            ["nowhere.yaml"],
            "error: --config: 'nowhere.yaml' is no file and no registered config; see `tune ls`\n",
        ),
    ],
    ids=["registered", "other_recipe", "overrides", "misspelt_key", "bad_value", "no_file"],
)
def test_module_validates_a_config(monkeypatch, capsys, tmp_path, arguments, refused):
    shutil.copy(plugin.shipped_configs()["tiny/gspo"], tmp_path / "my.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gspo", "validate", "--no-files", *arguments])
    with pytest.raises(SystemExit) as stopped:
        gspo.__main__.main()
    shown = capsys.readouterr()
    assert (stopped.value.code, shown.out) == (
        (1, "") if refused else (None, "Config is well-formed!\n")
    )
    assert shown.err.replace(f"{tmp_path}/", "") == refused


def test_module_runs_a_command_of_the_pack(monkeypatch):
    monkeypatch.setitem(gspo.__main__.COMMANDS, "shout", "tests_shout:main")
    monkeypatch.setitem(
        sys.modules,
        "tests_shout",
        type("shout", (), {"main": staticmethod(lambda words: words[0])}),
    )
    monkeypatch.setattr(sys, "argv", ["gspo", "shout", "loud"])
    with pytest.raises(SystemExit, match="loud"):
        gspo.__main__.main()


INTERRUPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(("name", "shown"), [("tune", True), ("mine", False)])
def test_tune_ends_an_interrupted_import_with_one_line(installed, tmp_path, name, shown):
    (tmp_path / name).write_text(f"import torchtune\n{INTERRUPT}")
    result = python(name, path=installed, cwd=tmp_path)
    assert (result.returncode == 130) == shown
    assert result.stderr.endswith("Interrupted.\n") == shown
    assert ("Traceback" in result.stderr) != shown


def test_module_ends_an_interrupted_import_with_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(INTERRUPT)
    script = "from gspo import __main__ as m; m.COMMANDS['slow'] = 'slow:main'; m.main()"
    result = python("-c", script, "slow", path=f"{ROOT}:{tmp_path}", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("arguments", "code"), [([], None), (["--help"], None), (["lss"], 1)], ids=str
)
def test_module_lists_its_commands(monkeypatch, capsys, arguments, code):
    monkeypatch.setattr(sys, "argv", ["gspo", *arguments])
    if code is None:
        gspo.__main__.main()
        assert "{download,ls,cp,cat,run,validate," in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="unknown command 'lss'"):
            gspo.__main__.main()
