import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import pytest
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor

from gspo.config import BaseSettings, Given, Section, parse, read_command_line, show_errors
from gspo.config import check as check_config
from gspo.config import command_line as module
from gspo.config.checks import component_problems, refusals
from gspo.config.value_types import AboveZero, CountOrZero, OptionalComponent
from gspo.errors import NO_VALUE, DataError, InputError, require


class TinyOptimizer:
    def __init__(self, params, lr, *, weight_decay=0.0): ...


def annotated(
    lr,
    whole: int = 1,
    either: Optional[int] = 1,  # noqa: UP045 - as libraries write it
    *,
    late: "float | Tensor" = 1.0,
    unset: float = None,
    text: int | str = 1,
    pair: tuple[float, float] = (0.0, 1.0),
): ...


class Knobs(Section):
    temperature: AboveZero = Field(1.0)
    top_p: AboveZero = Field(1.0)


class Evaluation(Section):
    every_n_steps: CountOrZero = Field(0)
    num_samples: CountOrZero = Field(4)


class Depth(Section):
    depth: Any = None


class Small(BaseSettings):
    seed: CountOrZero
    group_size: CountOrZero
    optimizer: Annotated[OptionalComponent, Given(("params",))] = None
    readers: Any = None
    sampling: Knobs = Field(Knobs())
    eval: Evaluation = Field(Evaluation())
    output_dir: Any = None
    extra: Depth = Field(Depth())


def any_arguments(**kwargs): ...


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "config_components", sys.modules[__name__])


def check(text):
    return check_config(OmegaConf.create("seed: 1\ngroup_size: 4\n" + text), Small)


def optimizer(path="config_components.TinyOptimizer", **arguments):
    return json.dumps({"optimizer": {"_component_": path, "lr": 0.1, **arguments}})[1:-1] + "\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        optimizer(),
        optimizer(weight_decay=0.1),
        optimizer("config_components.any_arguments", whatever=1),
        optimizer(
            "config_components.annotated",
            whole=1,
            either=None,
            late=1e-5,
            unset=None,
            text="a",
            pair=[0, 1],
        ),
        "sampling: {temperature: 0.7}",
        "extra: {depth: 2}",
        "readers: [{_component_: gspo.errors.did_you_mean, name: a, choices: [b]}]",
        "output_dir: /x/${seed}",
    ],
)
def test_check_config_accepts_what_fits(text):
    check(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "clip: 4",
            (
                "clip: unknown key; there are: eval, "
                "extra, group_size, optimizer, output_dir, readers, sampling, seed."
            ),
        ),
        (
            "grupo_size: 8",
            "grupo_size: unknown key; did you mean 'group_size'?",
        ),  # also where the right one is given
        ("outputdir: x", "outputdir: unknown key; did you mean 'output_dir'?"),
        (
            "output_dir: ${sead}",
            "output_dir: Interpolation key 'sead' not found; set or correct it",
        ),
        (
            "sampling: {temprature: 0.7}",
            "sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        ("sampling: 0.7", "sampling: 0.7 must be a mapping of keys to values"),
        ("eval: null", "eval: None must be a mapping of keys to values"),
        ("extra: {dept: 2}", "extra.dept: unknown key; did you mean 'depth'?"),
        (
            "eval: {every_n_step: 2}",
            "eval.every_n_step: unknown key; did you mean 'every_n_steps'?",
        ),
        (
            optimizer("config_components.TinyOptimiser"),
            (
                "optimizer._component_: 'config_components.TinyOptimiser' does not exist: "
                "config_components has no 'TinyOptimiser'; did you mean 'TinyOptimizer'?"
            ),
        ),
        (
            optimizer("gspo.config_.check_config"),
            (
                "optimizer._component_: 'gspo.config_.check_config' does not exist: "
                "gspo has no 'config_'; did you mean 'config'?"
            ),
        ),
        (
            optimizer("torhc.optim.AdamW"),
            (
                "optimizer._component_: 'torhc.optim.AdamW' does not exist: "
                f"no module 'torhc' is installed or in {os.getcwd()}; "
                "did you mean 'torch'? Else run from its folder or set PYTHONPATH"
            ),
        ),
        (
            optimizer("my_own_file.Loss"),
            "optimizer._component_: 'my_own_file.Loss' does not exist: no module 'my_own_file' is "
            f"installed or in {os.getcwd()}; run from its folder or set PYTHONPATH",
        ),
        (
            optimizer("torch.optim"),
            (
                "optimizer._component_: 'torch.optim' is a module, "
                "but it must be a class or a function;"
            ),
        ),
        (
            optimizer(""),
            "optimizer._component_: '' must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(".a"),
            "optimizer._component_: '.a' must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(3),
            "optimizer._component_: 3 must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(weight_decya=0.1),
            (
                "optimizer.weight_decya: unknown, TinyOptimizer takes no such argument; "
                "did you mean 'weight_decay'?"
            ),
        ),
        *(
            (
                optimizer("config_components.annotated", **{name: value}),
                (
                    f"optimizer.{name}: {value!r} is no number, as annotated takes; "
                    "write one like 1e-5, unq"
                ),
            )
            for name, value in (
                ("whole", "1"),
                ("whole", None),
                ("either", "1e-5x"),
                ("late", "inf"),
                ("unset", "x"),
            )
        ),
        (
            optimizer(weight_decay="1e-5"),
            "optimizer.weight_decay: '1e-5' is no number, as TinyOptimizer takes;",
        ),
        ("sampling: {temperature: hot}", "sampling.temperature: 'hot' must be a number above 0;"),
        (
            "optimizer: {_component_: config_components.TinyOptimizer}",
            "optimizer.lr: missing, but TinyOptimizer needs it; set it in the config",
        ),
        (
            "readers: [{_component_: gspo.errors.did_you_mean, name: a}]",
            "readers.0.choices: missing, but did_you_mean needs it; set it in the config",
        ),
    ],
)
def test_check_config_names_the_key_the_value_and_the_remedy(text, message):
    with pytest.raises(InputError) as caught:
        check(text)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 500


def test_check_config_fills_in_defaults_key_by_key():
    given = OmegaConf.create(
        {"seed": 1, "group_size": 4, "eval": {"num_samples": 9}, "output_dir": "/x/${seed}"}
    )
    settings = check_config(given, Small)
    assert settings.eval == Evaluation(every_n_steps=0, num_samples=9)
    assert settings.optimizer is None
    assert settings.output_dir == "/x/1"
    assert "optimizer" not in given


def test_missing_arguments_are_left_alone_unless_told_which_are_passed():
    values = {"optimizer": {"_component_": "config_components.TinyOptimizer"}}
    assert not list(component_problems(values, None))
    keys = [problem.key for problem in component_problems(values, {})]
    assert keys == ["optimizer.params", "optimizer.lr"]


def test_settings_of_a_copied_recipe_add_keys():
    class Mine(Small):
        floor: CountOrZero = Field(3)

    text = OmegaConf.create({"seed": 1, "group_size": 4, "floor": 5})
    assert check_config(text, Mine).floor == 5
    with pytest.raises(InputError, match="^floor: unknown key"):
        check_config(text, Small)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "group_size: missing, but the recipe needs a value; set it in the config"),
        (
            {"group_size": None},
            "group_size: null, but the recipe needs a value; set it in the config",
        ),
        (
            {"group_size": "???"},
            "group_size: Missing mandatory value: group_size; set or correct it",
        ),
    ],
    ids=["absent", "null", "mandatory"],
)
def test_check_config_names_a_required_key_without_a_value(values, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_config(OmegaConf.create({"seed": 1, **values}), Small)


def test_check_config_tells_a_broken_module_from_a_wrong_path(tmp_path, monkeypatch):
    (tmp_path / "broken_components.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="No module named 'surely_not_installed'"):
        check(optimizer("broken_components.Optimizer"))


def test_check_config_finds_components_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "folder_components.py").write_text("def build(params, lr): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    check(optimizer("folder_components.build"))


def test_check_config_shows_all_problems_up_to_a_screen():
    with pytest.raises(InputError) as caught:
        check("\n".join(f"wrong_{i}: 1" for i in range(20)) + "\nsampling: 1")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"wrong_{i}" for i in range(8)]
    assert lines[-1] == "and 13 more problems in the config"


def test_require_says_key_value_rule_and_remedy():
    require(True, "group_size", 4, "must be at least 2", "set it to 8")
    with pytest.raises(InputError, match="^group_size: 1 must be at least 2; set it to 8$"):
        require(False, "group_size", 1, "must be at least 2", "set it to 8")


def test_a_message_is_a_screen_without_control_characters():
    error = InputError("a", "\x1b", "\x1b[2J\r" + "line\n" * 100, "\ud800")
    first, *lines, last = str(error).split("\n")
    assert first == "a: '\\x1b' \\x1b[2J" and lines == ["line"] * 7
    assert last == "... and 94 more lines"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("source", "a", "does not exist"), "prompts.source: 'a' does not exist"),
        (DataError("train.jsonl:2", "{", "is not JSON"), "train.jsonl:2: '{' is not JSON"),
        (KeyError("a"), "prompts: KeyError: 'a'; correct it"),
    ],
    ids=["argument", "place", "library"],
)
def test_refusals_name_the_key(error, message):
    with pytest.raises(InputError) as caught, refusals("prompts", "correct it"):
        raise error
    assert str(caught.value) == message


@pytest.fixture
def command_line(tmp_path, monkeypatch):
    def write(text, *overrides):
        (tmp_path / "c.yaml").write_text(text)
        monkeypatch.setattr(
            sys, "argv", ["recipe", "--config", str(tmp_path / "c.yaml"), *overrides]
        )

    return write


def test_read_command_line_merges_overrides(command_line):
    command_line("a: 1\nb: {_component_: x, c: 2}", "a=3", "b.c=4")
    assert read_command_line() == {"a": 3, "b": {"_component_": "x", "c": 4}}


def test_numbers_without_a_dot_are_numbers_in_file_and_overrides(command_line):
    command_line("a: 1e-6\nb: {c: 1e-6}", "d=1e-6", "e=3E2")
    assert read_command_line() == {"a": 1e-6, "b": {"c": 1e-6}, "d": 1e-6, "e": 300.0}


def test_removed_keys_are_gone_with_or_without_a_component(command_line):
    command_line(
        "a: 1\nb: {_component_: x, c: 2}\nd: {_component_: x, e: 3, f: 4}", "~a", "~b", "~d.e"
    )
    assert read_command_line() == {"d": {"_component_": "x", "f": 4}}


@pytest.mark.parametrize(
    "value",
    ["=", "==", "a=b", "x=${seed}", r"^\s*answer\s*=\s*(\d+)$", "a=b=c"],
)
def test_value_with_an_equals_sign_is_taken_as_it_is(command_line, value):
    command_line("a: {b: 1}\nseed: 3", f"a.b={value}")
    raw = OmegaConf.to_container(read_command_line(), resolve=False)
    assert raw["a"]["b"] == value


def test_mapping_with_an_equals_sign_stays_a_mapping(command_line):
    command_line("a: 1", "c={d: 'x=y', e: 1e-6, f: null}")
    assert read_command_line() == {"a": 1, "c": {"d": "x=y", "e": 1e-6, "f": None}}


def test_component_with_an_equals_sign_in_an_argument(command_line):
    command_line("b: {_component_: x}", "b=y", "b.c==")
    assert read_command_line() == {"b": {"_component_": "y", "c": "="}}


def test_missing_package_is_to_be_installed():
    with pytest.raises(InputError) as caught, refusals("metric_logger"):
        raise ModuleNotFoundError("No module named 'a.b'", name="a.b")
    assert str(caught.value).endswith("No module named 'a.b'; install the package of 'a'")


def test_missing_package_that_a_library_tells_of_is_to_be_installed():
    with pytest.raises(InputError) as caught, refusals("metric_logger"):
        try:
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        except ImportError as error:
            raise ImportError("set metric_logger_type='stdout'") from error
    message = "metric_logger: ModuleNotFoundError: No module named 'wandb'; install the package of"
    assert str(caught.value) == f"{message} 'wandb'"


TEXT_WITH_A_VARIABLE = "seed: 1\ngroup_size: 4\ndata_dir: /x\noutput_dir: ${data_dir}/y"


@pytest.mark.parametrize("override", ["output_dir=/z", "output_dir=null", "~output_dir"])
def test_variable_whose_last_use_is_overridden_is_known(command_line, override):
    command_line(TEXT_WITH_A_VARIABLE, override)
    check_config(read_command_line(), Small)
    command_line(TEXT_WITH_A_VARIABLE, override, "data_dri=/z")
    with pytest.raises(InputError, match=r"^data_dri: unknown key;[^\n]*$"):
        check_config(read_command_line(), Small)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("a: [1", "a=1", "--config: cannot be read: while parsing a flow sequence"),
        ("- 1", "a=1", "--config: cannot be read: "),
        (
            "a: 1",
            "a",
            (
                "--config: cannot be read: Command-line overrides must be "
                "in the form of key=value, got a"
            ),
        ),
        ("a: 1", "~b", "--config: cannot be read: Could not find key b in yaml config to remove"),
        (
            "a: 1",
            "--a=1",
            "--config: cannot be read: Additional flag arguments not supported: ['--a=1']",
        ),
    ],
)
def test_read_command_line_explains_bad_input(command_line, text, override, message):
    command_line(text, override)
    with pytest.raises(InputError, match=re.escape(message)):
        read_command_line()


def test_read_command_line_names_a_missing_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", "tiny/gpso"])
    with pytest.raises(
        InputError, match="tiny/gpso' is no file and no registered config; see `tune ls`"
    ):
        read_command_line()


@pytest.mark.parametrize(
    ("rank", "printed"),
    [("0", "error: a: 1\nsecond line\n"), ("3", "[rank 3] error: a: 1\n")],
    ids=["first", "other"],
)
def test_show_errors_prints_the_message_and_exits_with_1(
    monkeypatch, capsys, tmp_path, rank, printed
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    @show_errors
    def main():
        raise InputError("a", NO_VALUE, "1\nsecond line")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == printed
    assert (
        json.loads((tmp_path / "error.json").read_text())["message"]["message"]
        == "a: 1\nsecond line"
    )


GLOO_LOST = "[../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:40181"


def test_a_rank_that_has_lost_another_says_so_in_a_line(monkeypatch, capsys, tmp_path):
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)

    @show_errors
    def main():
        raise RuntimeError(GLOO_LOST)

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    message = "[rank 0] ends, since another rank has ended; its error tells why.\n"
    assert capsys.readouterr().err == message
    assert waits == [module.SECONDS_FOR_TORCHRUN]
    assert not error_file.exists()  # or torchrun could name this rank as the cause


@pytest.mark.parametrize(("world_size", "words"), [("1", GLOO_LOST), ("2", "out of memory")])
def test_other_runtime_errors_pass(monkeypatch, world_size, words):
    monkeypatch.setenv("WORLD_SIZE", world_size)

    @show_errors
    def main():
        raise RuntimeError(words)

    with pytest.raises(RuntimeError):
        main()


def test_show_errors_lets_other_exceptions_and_results_pass():
    assert show_errors(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        show_errors(lambda: 1 / 0)()


def test_parse_gives_main_its_settings_and_exits_with_its_result(command_line):
    command_line("seed: 1\ngroup_size: 4", "group_size=5")
    main = parse(Small)(lambda cfg: cfg.group_size + 1)
    assert main.settings is Small
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 6


RECIPE = """
from gspo.config import BaseSettings, parse
from gspo.errors import require

class Settings(BaseSettings):
    group_size: int

@parse(Settings)
def main(cfg):
    require(cfg.group_size > 1, "group_size", cfg.group_size, "must be at least 2", "set it to 8")

main()
"""


@pytest.mark.parametrize(
    "options", [[], ["--nproc_per_node", "2"]], ids=["one_process", "torchrun"]
)
def test_tune_run_ends_with_the_message_of_an_input_error(tmp_path, options):
    (tmp_path / "my_recipe.py").write_text(RECIPE)
    (tmp_path / "c.yaml").write_text("group_size: 1\n")
    command = [
        sys.executable,
        "-m",
        "torchtune._cli.tune",
        "run",
        *options,
        "my_recipe",
        "--config",
        "c.yaml",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    message = "group_size: 1 must be at least 2; set it to 8"
    assert result.returncode == 1
    # torchrun may end the first rank before it has spoken, when another fails first.
    speakers = ["error"] if not options else ["error", "[rank 1] error"]
    assert any(f"\n{speaker}: {message}" in f"\n{result.stderr}" for speaker in speakers)
    assert "my_recipe.py" not in result.stderr  # no stack of the recipe
    assert message in "".join(result.stderr.splitlines(keepends=True)[-6:])
