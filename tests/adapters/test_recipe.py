"""The recipe with adapters, through the command line of ``tune``."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo.commands.validate import read_checked
from gspo.plan import memory_tracker as labels
from gspo.plan.estimate import REFERENCE, Planner
from gspo.plan.machine import DEFAULT_RATES, Machine
from gspo.tiny import SHAPE, make_untrained
from tests.models.test_recipe import HUGGING_FACE
from tests.recipes.runs import ROOT, overrides

LORA = {"lora_rank": 4, "lora_alpha": 8}
TRANSFORMERS = {
    "_component_": "gspo.models.huggingface.lora_causal_lm",
    "path": "${base_dir}",
    **LORA,
}
TORCHTUNE = {
    "_component_": "torchtune.models.qwen2.lora_qwen2",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    **SHAPE,
    **LORA,
}
SHORT = ("num_steps=3", "sampler.stop_token_ids=[269,271]", "optimizer.lr=1e-2")
REFERENCE_KEYS = ("loss.kl_coef=0.1", "advantages.drop_dead_groups=false")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_untrained(folder / "base", folder / "data", seed=0, num_train=200, num_heldout=20)
    tiny = OmegaConf.load(ROOT / "configs" / "tiny" / "gspo.yaml")
    tiny.model = TORCHTUNE
    OmegaConf.save(tiny, folder / "torchtune.yaml")
    tiny.update(HUGGING_FACE | {"model": TRANSFORMERS})
    OmegaConf.save(tiny, folder / "transformers.yaml")
    return folder


def arguments_of(base, library, output_dir, *more):
    arguments = overrides(base, output_dir, *SHORT, *more)
    if library == "transformers":
        arguments = [text for text in arguments if "checkpoint_files" not in text]
    return ["--config", str(base / f"{library}.yaml"), *arguments]


def call(arguments, num_ranks=1):
    ranks = ["--nproc_per_node", str(num_ranks)] if num_ranks > 1 else []
    command = ["-m", "torchtune._cli.tune", "run", *ranks, "gspo_full_finetune"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def run(base, library, output_dir, *more, num_ranks=1):
    """Rows of metrics."""
    done = call(arguments_of(base, library, output_dir, *more), num_ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of a run of each library, and its rows."""

    def of(library, *more, num_ranks=1):
        folder = tmp_path_factory.mktemp(library)
        options = (*REFERENCE_KEYS, "save_merged=true", *more)
        return folder, run(base, library, folder, *options, num_ranks=num_ranks)

    return {"transformers": of("transformers", num_ranks=2), "torchtune": of("torchtune")}


LIBRARIES = pytest.mark.parametrize("library", ["transformers", "torchtune"])


@LIBRARIES
def test_trainer_and_sampler_agree_and_the_base_is_the_reference(trained, library):
    _, rows = trained[library]
    assert len(rows) == 4 and all(row["grad_norm"] > 0 for row in rows[1:])
    assert all(row["mismatch/rms_token"] < 1e-5 for row in rows[1:])
    assert rows[1]["kl_ref"] == pytest.approx(0, abs=1e-9)  # new adapters change nothing
    assert rows[3]["kl_ref"] > 1e-6
    assert rows[1]["update/changed_fraction"] > 0.3


@LIBRARIES
def test_what_is_saved_is_one_model_in_two_forms(base, trained, library):
    folder, _ = trained[library]
    model = AutoModelForCausalLM.from_pretrained(base / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        adapted = PeftModel.from_pretrained(model, folder / "adapter_3")
    merged = AutoModelForCausalLM.from_pretrained(folder / "epoch_3", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base / "base", dtype=torch.float32)
    tokens = torch.tensor([[17, 40, 5, 99, 23]])
    with torch.no_grad():
        logits = adapted(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=1e-5)
        assert (plain(tokens).logits - logits).abs().max() > 1e-2


@LIBRARIES
def test_adapters_alone_are_saved_unless_asked_and_training_goes_on_from_them(
    base, trained, library, tmp_path
):
    folder, _ = trained[library]
    first = folder / "adapter_3"
    still = ("optimizer.lr=1e-30", "num_steps=1")  # a rate that moves nothing
    run(base, library, tmp_path / "out", f"adapter_path={first}", *still)
    assert sorted(path.name for path in (tmp_path / "out").glob("*_1")) == ["adapter_1"]
    before = load_file(first / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_1" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert max(float(value.abs().max()) for name, value in before.items() if "lora_B" in name) > 0


def damage(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


REFUSALS = {
    "rank": (["model.lora_rank=8", "model.lora_alpha=16"], {}, "with the rank that the folder has"),
    "alpha": (["model.lora_alpha=16"], {}, "set lora_alpha to 8, for rank 4"),
    "base": ([], {"base_model_name_or_path": "models/Other"}, "has adapters of models/Other"),
    "kind": ([], {"peft_type": "IA3"}, "has adapters of kind IA3, not LORA"),
    "maps": (["model.target_modules=[q_proj]"], {}, "which the model has no place for"),
    "too few": ([], None, "has no base_model.model.model.layers"),
    "none": (["model._component_=gspo.models.huggingface.causal_lm"], {}, "is one without"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_adapters_of_another_model_are_refused(base, trained, name, tmp_path):
    overridden, changes, says = REFUSALS[name]
    copy = tmp_path / "adapter"
    source = trained["transformers"][0] / "adapter_3"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if changes is None:
        from safetensors.torch import save_file

        tensors = load_file(copy / "adapter_model.safetensors")
        del tensors[min(tensors)]
        save_file(tensors, copy / "adapter_model.safetensors")
    else:
        damage(copy, **changes)
    if name == "none":
        overridden = [*overridden, "~model.lora_rank", "~model.lora_alpha"]
    arguments = arguments_of(base, "transformers", tmp_path / "out", f"adapter_path={copy}")
    done = call([*arguments, *overridden])
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert says in done.stderr and "adapter_path" in done.stderr


def test_adapters_in_a_folder_that_is_none_are_refused(base, tmp_path):
    arguments = arguments_of(base, "torchtune", tmp_path / "out", f"adapter_path={tmp_path}")
    done = call(arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "as a run writes adapter_N" in done.stderr


@LIBRARIES
def test_the_plan_counts_adapters_alone_for_gradients_and_optimizer(base, library):
    machine = Machine(memory=2**33, ranks_per_node=8, **DEFAULT_RATES["cpu"])

    def plan(*more):
        arguments = arguments_of(base, library, "out", *more)
        return Planner(read_checked(arguments[1:]), machine).plan(1)

    always = plan(*REFERENCE_KEYS)["memory"]["always"]
    num_layers = SHAPE["num_layers"]
    width, hidden = SHAPE["embed_dim"], SHAPE["intermediate_dim"]
    kv = width // SHAPE["num_heads"] * SHAPE["num_kv_heads"]
    rows_and_columns = 2 * (width + width) + 2 * (width + kv) + 3 * (width + hidden)
    adapters = 4 * LORA["lora_rank"] * num_layers * rows_and_columns  # bytes
    assert always[labels.GRADIENTS] == adapters
    assert always[labels.OPTIMIZER] == pytest.approx(2 * adapters, rel=0.01)
    assert REFERENCE not in always
    with_dora = plan("model.use_dora=true")["memory"]["always"]
    num_rows = num_layers * (2 * width + 2 * kv + width + 2 * hidden)
    assert with_dora[labels.GRADIENTS] == adapters + 4 * num_rows
    if library == "torchtune":  # whose 4-bit weights are larger than these
        return
    quantized = plan("model.quantize_base=true", "model.lora_rank=1")["memory"]["always"]
    embedding = 4 * SHAPE["vocab_size"] * width
    layers = always[labels.WEIGHTS] - embedding - adapters
    assert quantized[labels.WEIGHTS] == pytest.approx(
        embedding + adapters / 4 + layers * 4.5 / 32, rel=0.02
    )
