"""Folders of transformers models, read and written."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from gspo.decoder import unique_state
from gspo.errors import InputError
from gspo.models.huggingface import Checkpointer, causal_lm
from tests.models import families


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_model_that_was_written_is_the_one_that_was_read(tmp_path, name):
    source = families.build(name)
    source.save_pretrained(tmp_path / "base")
    checkpointer = Checkpointer(str(tmp_path / "base"), str(tmp_path / "out"))
    weights = checkpointer.load_checkpoint()["model"]
    with torch.device("meta"):
        decoder = causal_lm(str(tmp_path / "base"))
    assert weights.keys() == unique_state(decoder).keys()
    moved = {key: weight + 0.25 for key, weight in weights.items()}
    checkpointer.save_checkpoint({"model": moved}, epoch=3)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "epoch_3")
    expected = dict(source.named_parameters())
    assert dict(written.named_parameters()).keys() == expected.keys()
    for key, parameter in written.named_parameters():
        assert torch.equal(parameter, expected[key] + 0.25), key


def test_other_files_of_the_model_are_copied(tmp_path):
    base = tmp_path / "base"
    families.build("qwen3").save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / file).write_text(file)
    checkpointer = Checkpointer(str(base), str(tmp_path / "out"))
    checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=1)
    names = {file.name for file in (tmp_path / "out" / "epoch_1").iterdir()}
    assert names == {file.name for file in base.iterdir()}


def test_a_damaged_file_is_named(tmp_path):
    families.build("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"path: .* has weights that cannot be read"):
        Checkpointer(str(tmp_path), "out").load_checkpoint()


def test_weights_that_are_missing_are_named(tmp_path):
    model = families.build("qwen3")
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match="lacks model.layers.1.mlp.down_proj.weight .of 3"):
        Checkpointer(str(tmp_path), "out").load_checkpoint()


DIFFERENCES = {
    "shape": (
        {"intermediate_size": 56},
        r"has model.layers.0.mlp.down_proj.weight with the shape \[32, 48\], but config.json has "
        r"\[32, 56\]; get",
    ),
    "fewer layers": (
        {"num_hidden_layers": 3, "layer_types": None},
        r"has, unlike its config.json, model.layers.3.input_layernorm.weight \(of 11 such ",
    ),
    "more layers": (
        {"num_hidden_layers": 5, "layer_types": None},
        r"lacks model.layers.4.input_layernorm.weight \(of 11 such weights\)",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_weights_of_another_model_than_config_json_s_are_refused(tmp_path, case):
    changes, message = DIFFERENCES[case]
    families.build("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        Checkpointer(str(tmp_path), "out").load_checkpoint()


@pytest.mark.parametrize("path", ["nowhere", ""])
def test_a_path_without_a_model_is_refused(path):
    with pytest.raises(InputError, match="is no folder; give the folder of a model"):
        Checkpointer(path, "out")
