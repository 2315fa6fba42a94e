import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest
from omegaconf import OmegaConf
from torch import Tensor

from gspo.config.checks import check_config, refusals, require
from gspo.config.command_line import parse, read_command_line, show_errors
from gspo.errors import InputError


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


@dataclass
class Knobs:
    temperature: float = 1.0
    top_p: float = 1.0


def any_arguments(**kwargs): ...


ROOT = Path(__file__).parents[2]
REQUIRED = ("seed", "group_size")
OPTIONAL = {
    "optimizer": None,
    "readers": None,
    "sampling": {},
    "eval": {"every_n_steps": 0, "num_samples": 4},
    "output_dir": None,
}


@pytest.fixture(autouse=True)
def importable_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "config_components", sys.modules[__name__])


def check(text, **kwargs):
    options = {
        "required": REQUIRED,
        "optional": OPTIONAL | {"extra": None},
        "sections": {"sampling": Knobs, "extra": ("depth",)},
        "passed": {"optimizer": ("params",), "readers.0": ("weight",)},
    }
    return check_config(OmegaConf.create("seed: 1\ngroup_size: 4\n" + text), **(options | kwargs))


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
        "readers: [{_component_: gspo.errors.did_you_mean, name: a, choices: [b], weight: 2}]",
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
            "clip: unknown key. There are: eval, extra, group_size, optimizer, output_dir, readers, sampling, seed.",
        ),
        (
            "grupo_size: 8",
            "grupo_size: unknown key. Did you mean 'group_size'?",
        ),  # also where the right one is given
        ("outputdir: x", "outputdir: unknown key. Did you mean 'output_dir'?"),
        (
            "output_dir: ${sead}",
            "output_dir: Interpolation key 'sead' not found; set or correct the value",
        ),
        (
            "sampling: {temprature: 0.7}",
            "sampling.temprature: unknown, Knobs takes no such argument. Did you mean 'temperature'?",
        ),
        ("sampling: 0.7", "sampling: 0.7, but it must be a mapping of keys to values"),
        ("eval: null", "eval: None, but it must be a mapping of keys to values"),
        ("extra: {dept: 2}", "extra.dept: unknown key. Did you mean 'depth'?"),
        (
            "eval: {every_n_step: 2}",
            "eval.every_n_step: unknown key. Did you mean 'every_n_steps'?",
        ),
        (
            optimizer("config_components.TinyOptimiser"),
            "optimizer._component_: 'config_components.TinyOptimiser', but config_components has no 'TinyOptimiser'. "
            "Did you mean 'TinyOptimizer'?",
        ),
        (
            optimizer("gspo.config_.check_config"),
            "optimizer._component_: 'gspo.config_.check_config', but gspo has no 'config_'. Did you mean 'config'?",
        ),
        (
            optimizer("torhc.optim.AdamW"),
            "optimizer._component_: 'torhc.optim.AdamW', but there is no module 'torhc' installed or in "
            f"{os.getcwd()}; run from its folder or set PYTHONPATH. Did you mean 'torch'?",
        ),
        (
            optimizer("my_own_file.Loss"),
            "optimizer._component_: 'my_own_file.Loss', but there is no module 'my_own_file' installed or in "
            f"{os.getcwd()}; run from its folder or set PYTHONPATH.",
        ),
        (
            optimizer("torch.optim"),
            "optimizer._component_: 'torch.optim' is a module, but it must be a class or a function.",
        ),
        (
            optimizer(""),
            "optimizer._component_: '', but it must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(".a"),
            "optimizer._component_: '.a', but it must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(3),
            "optimizer._component_: 3, but it must be a dotted path such as gspo.losses.GSPOLoss",
        ),
        (
            optimizer(weight_decya=0.1),
            "optimizer.weight_decya: unknown, TinyOptimizer takes no such argument. Did you mean 'weight_decay'?",
        ),
        *(
            (
                optimizer("config_components.annotated", **{name: value}),
                f"optimizer.{name}: {value!r}, but annotated takes a number; write one like 1e-5, unquoted",
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
            "optimizer.weight_decay: '1e-5', but TinyOptimizer takes a number;",
        ),
        ("sampling: {temperature: hot}", "sampling.temperature: 'hot', but Knobs takes a number;"),
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
    merged = check_config(given, required=REQUIRED, optional=OPTIONAL)
    assert merged.eval == {"every_n_steps": 0, "num_samples": 9}
    assert merged.optimizer is None
    assert OmegaConf.to_container(merged)["output_dir"] == "/x/${seed}"
    assert "optimizer" not in given


def test_check_config_leaves_missing_arguments_alone_unless_told_which_are_passed():
    text = "optimizer: {_component_: config_components.TinyOptimizer}"
    check(text, passed=None)
    with pytest.raises(InputError, match=r"optimizer\.params: missing, .*\noptimizer\.lr: missing"):
        check(text, passed={})


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
            "group_size: Missing mandatory value: group_size; set or correct the value",
        ),
    ],
    ids=["absent", "null", "mandatory"],
)
def test_check_config_names_a_required_key_without_a_value(values, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_config(OmegaConf.create({"seed": 1, **values}), required=REQUIRED)


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("source: a does not exist"), "prompts.source: a does not exist"),
        (InputError("train.jsonl:2: not JSON"), "train.jsonl:2: not JSON"),
        (InputError("loss.kl_coef is -1: it must"), "loss.kl_coef is -1: it must"),
        (KeyError("a"), "prompts: KeyError: 'a'; correct it"),
    ],
    ids=["argument", "file", "key", "library"],
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


TEXT_WITH_A_VARIABLE = "seed: 1\ngroup_size: 4\ndata_dir: /x\noutput_dir: ${data_dir}/y"


@pytest.mark.parametrize("override", ["output_dir=/z", "output_dir=null", "~output_dir"])
def test_variable_whose_last_use_is_overridden_is_known(command_line, override):
    command_line(TEXT_WITH_A_VARIABLE, override)
    check_config(read_command_line(), required=REQUIRED, optional=OPTIONAL)
    command_line(TEXT_WITH_A_VARIABLE, override, "data_dri=/z")
    with pytest.raises(InputError, match=r"^data_dri: unknown key\.[^\n]*$"):
        check_config(read_command_line(), required=REQUIRED, optional=OPTIONAL)


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("a: [1", "a=1", "cannot read the config: while parsing a flow sequence"),
        ("- 1", "a=1", "cannot read the config: "),
        (
            "a: 1",
            "a",
            "cannot read the config: Command-line overrides must be in the form of key=value, got a",
        ),
        ("a: 1", "~b", "cannot read the config: Could not find key b in yaml config to remove"),
        (
            "a: 1",
            "--a=1",
            "cannot read the config: Additional flag arguments not supported: ['--a=1']",
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
        InputError, match="no such file or registered config: .*tiny/gpso; see `tune ls`"
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
        raise InputError("a: 1\nsecond line")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == printed
    assert (
        json.loads((tmp_path / "error.json").read_text())["message"]["message"]
        == "a: 1\nsecond line"
    )


def test_show_errors_lets_other_exceptions_and_results_pass():
    assert show_errors(lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        show_errors(lambda: 1 / 0)()


def test_parse_gives_main_its_config_and_exits_with_its_result(command_line):
    command_line("a: 1", "a=5")
    with pytest.raises(SystemExit) as caught:
        parse(lambda cfg: cfg.a + 1)()
    assert caught.value.code == 6


RECIPE = """
from gspo.config import parse, require

@parse
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
    assert f"\nerror: {message}" in f"\n{result.stderr}"
    assert "my_recipe.py" not in result.stderr  # no stack of the recipe
    assert message in "".join(result.stderr.splitlines(keepends=True)[-6:])
