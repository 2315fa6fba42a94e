"""The snippets and commands of the README and of docs/, as a reader would use them.

A page's files (a Python block that opens with ``# my_NAME.py``) lie in the reader's folder, with
``my.yaml`` and ``my_recipe.py`` as ``tune cp`` makes them. Scripts run, YAML fits into a config,
and each command goes as far as it does without a GPU, a network and minutes of time.
"""

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune._cli.tune import TuneCLIParser

from gspo import plugin
from gspo.commands import plan, presets, replay, validate
from gspo.data.segments import Segment
from gspo.losses.inputs import LossInputs
from gspo.losses.presets import PRESETS
from gspo.metrics import METRICS
from gspo.rewards import RewardPool
from gspo.tiny import make_untrained
from gspo.types import Group, GroupBatch
from tests.data.fakes import Items, completion, prompt

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
OWN_FILE = re.compile(r"# (my_\w+\.py)\b")
NO_FILES = "--no-files"  # models and data are not here
RECIPE_CHANGES = "my_recipe.py"  # not a whole file: what a copied recipe gets


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def own_files(page):
    """A page's Python blocks that are files, by name."""
    named = {}
    for code in blocks(page, "python"):
        if opening := OWN_FILE.match(code):
            assert opening[1] not in named, f"{page} has two of {opening[1]}"
            named[opening[1]] = code
    return named


def scripts(page):
    return [code for code in blocks(page, "python") if not OWN_FILE.match(code)]


def commands(page):
    text = re.sub(r"\\\n\s*", "", "".join(blocks(page, "sh")))
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


def of_all_pages(find, name):
    """Parameters (page, snippet) over all pages."""
    return [
        pytest.param(page, snippet, id=f"{page}: {name(snippet)}")
        for page in PAGES
        for snippet in find(page)
    ]


def first_line(code):
    return next(line for line in code.splitlines() if line.strip())


def page_with(name):
    return next(page for page in PAGES if name in own_files(page))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's empty folder, from which modules are imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gspo"])  # which a validation replaces
    plugin.add_recipes()
    return tmp_path


@pytest.fixture
def open_page(folder, monkeypatch):
    """Puts a page's files into the folder, with the copies that its commands speak of."""

    def of(page):
        shutil.copy(plugin.shipped_configs()["tiny/gspo"], "my.yaml")
        files = own_files(page)
        Path("my_recipe.py").write_text(changed_recipe(files.pop(RECIPE_CHANGES, "")))
        for name, code in files.items():
            Path(name).write_text(code)
        for module in [path.stem for path in folder.glob("my_*.py")]:
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    return of


def changed_recipe(changes):
    """The shipped recipe with a page's class of settings in place of its own."""
    text = (plugin.shipped_folder("recipes") / f"{plugin.RECIPE}.py").read_text()
    if not changes:
        return text
    settings, _, main = changes.partition("@parse(")
    name = main.partition(")")[0]
    assert f"def recipe_main(cfg: {name})" in main
    assert text.count("@parse(Settings)") == 1
    return text.replace("@parse(Settings)", f"{settings}@parse({name})")


def test_pages_have_what_is_tested():
    assert {"my_rewards.py", "my_losses.py", "my_segments.py", "my_recipe.py"} <= {
        name for page in PAGES for name in own_files(page)
    }
    assert len(scripts("docs/library.md")) >= 5 and not scripts("README.md")
    assert all(blocks(page, "(?:bash|shell|console|py|yml)") == [] for page in PAGES)


@pytest.mark.parametrize(("page", "code"), of_all_pages(scripts, first_line))
def test_script_runs(open_page, no_group_left, page, code):
    open_page(page)
    make_untrained(
        Path("runs/demo/base"), Path("runs/demo/data"), seed=0, num_train=64, num_heldout=64
    )
    model = Path("runs/demo/base/model.safetensors")
    shutil.copy(model, "runs/demo/base/model-00001-of-00001.safetensors")
    names = {}
    exec(code, names)
    if "trainer" in names:
        assert 0 < names["row"]["reward/mean"] <= 1 and names["row"]["step"] == 1
        assert Path("runs/own/model.safetensors").is_file()
    elif "policy" in names:
        gradients = [parameter.grad for parameter in names["policy"].parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)
        assert names["output"].metrics["kl_new_old"].value < 1e-4
    elif "inputs" in names:
        assert names["logps"].grad.tolist() == [-0.25, -0.25, 0.5]
    elif "hidden" in names:
        logits = (names["hidden"] @ names["weight"].T).log_softmax(-1)
        expected = logits.gather(1, names["labels"][:, None]).squeeze(1)
        torch.testing.assert_close(names["logps"], expected)
        assert names["hidden"].grad.abs().max() > 0 and names["weight"].grad.abs().max() > 0
    elif "pool" in names:
        assert names["result"].totals == [1.0, 0.0]
    else:
        assert (names["batch"].num_documents, names["batch"].num_label_tokens) == (2, 3)


def test_own_loss_is_the_importance_weighted_policy_gradient(open_page):
    open_page(page_with("my_losses.py"))
    import my_losses

    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1, 1]),
        loss_mask=torch.tensor([True, True, True, False]),
        old_logps=torch.tensor([-1.0, -2.0, -3.0, 0.0]),
        advantages=torch.tensor([2.0, -1.0]),
        label_counts=torch.tensor([2, 1]),
    )
    logps = torch.tensor([-1.0, -2.0, -3.0, -torch.inf], requires_grad=True)
    loss, metrics = my_losses.PolicyGradient()(logps, torch.zeros(4), inputs)
    loss.backward()
    assert loss.item() == -3.0 and logps.grad.tolist() == [-2.0, -2.0, 1.0, 0.0]
    assert [value.item() for value in metrics["own/drift"]] == [0.0, 3]


@pytest.mark.parametrize("num_tokens", [1, 4, 5])
def test_own_splitter_cuts_in_two(open_page, num_tokens):
    open_page(page_with("my_segments.py"))
    import my_segments

    whole = completion(num_tokens, advantage=0.5)
    source = Items(lambda _: GroupBatch([Group(0, prompt(0), [whole])]), 1)
    (group,) = next(Segment(source, my_segments.Halves(None))).groups
    (cut,) = group.completions
    assert cut.segments == [0] * (num_tokens // 2) + [1] * (num_tokens - num_tokens // 2)
    assert cut.segment_advantages == [0.5, 1.0]


def test_own_key_of_a_copied_recipe_is_known_to_it_alone(open_page, capsys):
    open_page(page_with(RECIPE_CHANGES))
    changed = ["--config", "my.yaml", "temperature_floor=0.25"]
    validate.main(["--recipe", "my_recipe.py", NO_FILES, *changed])
    with pytest.raises(SystemExit):
        validate.main(changed)
    assert "temperature_floor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "block"),
    of_all_pages(lambda page: blocks(page, "yaml"), lambda block: block.partition(":")[0]),
)
def test_yaml_fits_into_a_config(open_page, page, block):
    open_page(page)
    own = OmegaConf.create(block)
    tiny = OmegaConf.load("my.yaml")
    OmegaConf.save(
        dict(tiny.items_ex(resolve=False)) | dict(own.items_ex(resolve=False)), "my.yaml"
    )
    validate.main(["my.yaml", NO_FILES])
    if "rewards" in own:
        check_rewards(OmegaConf.to_container(own.rewards))


def check_rewards(rewards):
    """Each is found by a worker, and takes its options."""
    pool = RewardPool(rewards, num_workers=1)
    try:
        pool.warm()
    finally:
        pool.close()


class Reached(Exception):
    """A command was understood and is about to do what takes long."""


def reach(monkeypatch, module, name):
    def stop(*_, **__):
        raise Reached

    monkeypatch.setattr(module, name, stop)


def understand_tune(words, monkeypatch):
    if words[1] == "cp":
        Path(words[3]).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["tune", *words[1:]])
    parser = TuneCLIParser()
    arguments = parser.parse_args()
    if words[1] in ("cp", "ls"):
        parser.run(arguments)
        assert words[1] == "ls" or Path(words[3]).is_file()
        return
    assert words[1] == "run", "a command that needs a network: say here how it is checked"
    assert arguments.recipe_args[0] == "--config"
    if arguments.recipe == "my_recipe.py":
        validate.main(["--recipe", "my_recipe.py", NO_FILES, *arguments.recipe_args])
    else:
        assert arguments.recipe == plugin.RECIPE
        validate.main([NO_FILES, *arguments.recipe_args])
        cfg = OmegaConf.from_dotlist([w for w in words if w.startswith("rewards.")])
        if cfg:
            check_rewards(OmegaConf.to_container(cfg.rewards))


def understand_gspo(words, monkeypatch):
    command, arguments = words[0], words[1:]
    if command == "validate":
        validate.main([NO_FILES, *arguments])
    elif command == "presets":
        presets.main(arguments)
    elif command in ("plan", "replay"):
        module, slow = {"plan": (plan, "Planner"), "replay": (replay, "read")}[command]
        reach(monkeypatch, module, slow)
        with pytest.raises(Reached):
            module.main(arguments)
    else:
        understand_tune(["tune", *words], monkeypatch)


def understand_demo(arguments, monkeypatch):
    from gspo.demo import __main__ as demo

    reach(monkeypatch, demo, "make_base")
    monkeypatch.setattr(sys, "argv", ["gspo.demo", *arguments])
    with pytest.raises(Reached):
        demo.main()


def understand_make(arguments):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    goals = [word for word in arguments if "=" not in word]
    variables = [word.partition("=")[0] for word in arguments if "=" in word]
    assert goals and set(goals) <= set(targets)
    assert all(f"$({variable})" in makefile for variable in variables)


def understand_pytest(arguments):
    assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
    if "-m" in arguments:  # needs a GPU
        marker = arguments[arguments.index("-m") + 1]
        assert f'"{marker}: ' in (ROOT / "pyproject.toml").read_text()


def understand_script(words):
    """A script that runs for minutes: it is there, and knows the options."""
    path, options = ROOT / words[0], [word for word in words[1:] if word.startswith("--")]
    assert path.is_file()
    source = path.read_text()
    assert all(f'"{option}"' in source for option in options)


@pytest.mark.parametrize(("page", "words"), of_all_pages(commands, " ".join))
def test_command_is_understood(open_page, monkeypatch, page, words):
    open_page(page)
    monkeypatch.setenv("COLUMNS", "200")
    program = words[0].removeprefix(".venv/bin/")
    if program == "tune":
        understand_tune(words, monkeypatch)
    elif words[:3] == ["python", "-m", "gspo"]:
        understand_gspo(words[3:], monkeypatch)
    elif words[:3] == ["python", "-m", "gspo.demo"]:
        understand_demo(words[3:], monkeypatch)
    elif program == "make":
        understand_make(words[1:])
    elif program == "pytest":
        understand_pytest(words[1:])
    elif program == "python":
        understand_script(words[1:])
    else:
        assert words == ["source", ".venv/bin/activate"] or words == [
            ".venv/bin/pre-commit",
            "install",
        ], "a command that nothing here runs"


def test_recipe_named_on_pages_is_the_shipped_one():
    names = {name for page in PAGES for name in re.findall(r"gspo_\w*finetune", PAGES[page])}
    assert names == {plugin.RECIPE}


def anchors(text):
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_named_on_pages_exist(page):
    """Every dotted path of the package, but for those that the migration page calls gone."""
    text = PAGES[page]
    if page == "docs/migration.md":
        text = "".join(re.findall(r"^\| .* \|(.*)\|$", text, re.M))
    for path in set(re.findall(r"`(gspo(?:\.\w+)+)[`(]", text)):
        assert is_there(path), f"{page} names {path}"


def is_there(path):
    module, names = path, []
    while True:
        try:
            thing = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    for name in names:
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_files_named_on_pages_exist(page):
    if page == "docs/migration.md":
        return
    names = re.findall(
        r"`((?:gspo|tests|recipes|configs|benchmarks|docs|examples)/[\w./]+)`", PAGES[page]
    )
    for name in names:
        assert (ROOT / name).exists(), f"{page} names {name}"


def table_rows(page):
    """The first cell's names of every table row, with the other cells."""
    rows = {}
    for line in PAGES[page].splitlines():
        if line.startswith("| `"):
            first, *others = [cell.strip() for cell in line.strip("|").split("|")]
            for name in re.findall(r"`([^`]+)`", first):
                rows[name] = others
    return rows


def test_metrics_have_a_row_each_with_their_unit():
    rows = table_rows("docs/metrics.md")
    open_names = {"eval/pass@k", "reward/NAME"}  # which have something in the name
    assert rows.keys() == METRICS.keys() | open_names
    for name, metric in METRICS.items():
        per, unit, shows, _ = rows[name]
        assert (per, unit) == (metric.per, metric.unit), name
        assert shows, name


def test_presets_have_a_place_in_the_table():
    assert PRESETS.keys() <= table_rows("docs/objectives.md").keys()


def test_readme_fits_two_minutes():
    assert len(PAGES["README.md"].encode()) <= 9000
