import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.gemma._component_builders import gemma
from torchtune.models.gemma2._component_builders import gemma2
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2_5 import qwen2_5_7b_base

from gspo.commands.validate import read_checked
from gspo.config import build
from gspo.errors import InputError
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES, shipped_configs
from gspo.policy.checkpoint_config import check_decoder, check_model_config
from gspo.tiny import make_untrained, tiny_qwen2
from tests import test_gpu
from tests.test_configs import with_facts

CUDA_CONFIGS = [
    name
    for name in shipped_configs()
    if name not in CONFIGS_OF_OTHER_RECIPES and not name.startswith("tiny/")
]
SHAPE = {
    "vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 128,
    "norm_eps": 1e-5,
}
STATED = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING}


def check(folder, build, stated):
    (folder / "config.json").write_text(json.dumps(stated))
    with torch.device("meta"):
        decoder = build()
    check_model_config(decoder, {"checkpoint_dir": str(folder)})


def shaped(builder, **options):
    return lambda: builder(**SHAPE, **options)


FAMILIES = {
    "llama2": (shaped(llama2), {"rope_theta": 10000.0, "rope_scaling": None}),
    "llama3": (shaped(llama3), {"rope_theta": 500000.0, "rope_scaling": None}),
    "llama3_1": (shaped(llama3_1), LLAMA3 | {"rope_scaling": LLAMA3_SCALING | {"factor": 8.0}}),
    "llama3_2": (shaped(llama3_2, scale_factor=32), LLAMA3 | {"tie_word_embeddings": True}),
    "transformers_5": (
        shaped(llama3_2, scale_factor=32),
        {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}},
    ),
    "mistral": (shaped(mistral, rope_base=1000000), {"rope_theta": 1e6, "head_dim": 8}),
    "phi3": (shaped(phi3), {"rope_theta": 10000.0, "tie_word_embeddings": False}),
    "qwen2": (shaped(qwen2), {"rope_theta": 1e6, "tie_word_embeddings": False}),
    "gemma": (shaped(gemma, head_dim=16), {"head_dim": 16, "rope_theta": 10000.0}),
}


@pytest.mark.parametrize(("build", "more"), FAMILIES.values(), ids=FAMILIES)
def test_model_of_each_family_is_its_own(tmp_path, build, more):
    check(tmp_path, build, STATED | more)


# What the models' own config.json files state, for the builders that the configs name.
REAL = {
    "llama3_2_1b": (
        llama3_2_1b,
        {
            **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
            **{"rms_norm_eps": 1e-05, "tie_word_embeddings": True, "vocab_size": 128256},
            **LLAMA3,
        },
    ),
    "qwen2_5_7b": (
        qwen2_5_7b_base,
        {
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
            **{"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06},
            **{"rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 152064},
        },
    ),
}


@pytest.mark.parametrize(("build", "stated"), REAL.values(), ids=REAL)
def test_builders_of_the_configs_are_the_models_own(tmp_path, build, stated):
    check(tmp_path, build, stated)


def test_tiny_model_is_its_own(tmp_path):
    make_untrained(
        tmp_path, tmp_path / "data", seed=0, num_train=8, num_heldout=2, num_validation=2
    )
    check_model_config(tiny_qwen2(), {"checkpoint_dir": str(tmp_path)})


def test_gemma_2_of_torchtune_is_refused(tmp_path):
    message = (
        "model: 'gemma2' is Gemma 2 as torchtune has it: it caps hidden states in the place of "
        "logits, and swaps the norms before and behind each MLP; take gspo.models.huggingface"
    )
    with pytest.raises(InputError, match=message):
        check(tmp_path, shaped(gemma2, head_dim=16), STATED | {"head_dim": 16})


WINDOW = {"rope_theta": 10000.0, "sliding_window": 100}


@pytest.mark.parametrize(
    ("longest", "more", "is_refused"),
    [
        (101, {}, False),
        (102, {}, True),
        (None, {}, True),
        (102, {"use_sliding_window": False}, False),
        (102, {"use_sliding_window": True}, True),
        (102, {"sliding_window": None}, False),
    ],
)
def test_windows_that_torchtune_lacks_are_refused_for_longer_documents(
    tmp_path, longest, more, is_refused
):
    (tmp_path / "config.json").write_text(json.dumps(STATED | WINDOW | more))
    decoder = mistral(**SHAPE)

    def compare():
        checkpointer = {"checkpoint_dir": str(tmp_path)}
        check_model_config(decoder, checkpointer, longest_document=longest)

    if not is_refused:
        compare()
        return
    with pytest.raises(InputError, match="model: 100 is the sliding_window in .* may have 1.. tok"):
        compare()


def test_heads_that_turn_in_part_are_refused(tmp_path):
    with pytest.raises(InputError, match="model: 0.75 is the partial_rotary_factor in "):
        check(tmp_path, shaped(phi3), STATED | {"partial_rotary_factor": 0.75})


def test_phi_4_of_torchtune_has_another_base_than_its_model(tmp_path):
    """Its builder leaves rope_base at 10,000; microsoft/phi-4 states 250,000."""
    with warnings.catch_warnings(action="ignore"):  # of torchtune, at its own import
        from torchtune.models.phi4 import phi4_14b
    with pytest.raises(InputError, match="model.rope_base: 10000 must be 250000, as rope_theta"):
        check(tmp_path, phi4_14b, {"rope_theta": 250000, "hidden_size": 5120})


DIFFERENT = {
    "rope_base": ({"rope_theta": 10000.0}, "model.rope_base: 500000 must be 10000.0, as rope_th"),
    "scale_factor": (
        {"rope_scaling": LLAMA3_SCALING | {"factor": 8.0}},
        "model.scale_factor: 32 must be 8.0, as rope_scaling.factor in ",
    ),
    "no_scaling": ({"rope_scaling": None}, "model.scale_factor: 32 must be 1, as rope_scaling.fa"),
    "low_freq": (
        {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 2.0}},
        "model.low_freq_factor: 1 must be 2.0, as rope_scaling.low_freq_factor in ",
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "model: 'yarn' is the rope_scaling in ",
    ),
    "norm_eps": ({"rms_norm_eps": 1e-6}, "model.norm_eps: 1e-05 must be 1e-06, as rms_norm_eps in"),
    "num_heads": ({"num_attention_heads": 8}, "model.num_heads: 4 must be 8, as num_attention_he"),
    "num_kv_heads": ({"num_key_value_heads": 4}, "model.num_kv_heads: 2 must be 4"),
    "head_dim": ({"head_dim": 16}, "model.head_dim: 8 must be 16"),
    "num_layers": ({"num_hidden_layers": 3}, "model.num_layers: 2 must be 3"),
    "hidden": ({"hidden_size": 64}, "model.embed_dim: 32 must be 64"),
    "intermediate": ({"intermediate_size": 64}, "model.intermediate_dim: 48 must be 64"),
    "vocabulary": ({"vocab_size": 65}, "model.vocab_size: 64 must be 65"),
    "tied": ({"tie_word_embeddings": False}, "model.tie_word_embeddings: True must be False"),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_model_is_refused(tmp_path, change, message):
    with pytest.raises(InputError) as refused:
        check(tmp_path, shaped(llama3_2, scale_factor=32), STATED | LLAMA3 | change)
    text = str(refused.value)
    assert message in text
    assert str(tmp_path / "config.json") in text and "check_model_config=false" in text


def test_scaling_that_the_builder_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match="model.scale_factor: 1 must be 32.0, as rope_scaling.fa"):
        check(tmp_path, shaped(llama3), STATED | LLAMA3)


@pytest.mark.parametrize("text", ["{", "[1]"], ids=["damaged", "no_object"])
def test_config_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as refused:
        check_model_config(tiny_qwen2(), {"checkpoint_dir": str(tmp_path)})
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_checkpoint_without_a_config_has_nothing_to_compare(tmp_path):
    check_model_config(tiny_qwen2(), {"checkpoint_dir": str(tmp_path)})
    check_model_config(tiny_qwen2(), {"_component_": "mine"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool], ids=["int8", "bool"])
def test_weights_that_are_no_numbers_are_refused(run, base, tmp_path, capsys, dtype):
    shutil.copytree(base / "base", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
    save_file(weights, file, metadata={"format": "pt"})
    code, _ = run(f"base_dir={tmp_path / 'model'}")
    assert code == 1
    assert (
        f"error: checkpointer: 'norm.scale' is of {dtype} in the checkpoint, which is no number of "
        "a weight; take a checkpoint that is not quantized"
    ) in capsys.readouterr().err


def test_heads_too_small_for_a_gpu_are_refused_there_alone():
    with torch.device("meta"):
        decoder = qwen2(**SHAPE)
    check_decoder(decoder, settings("cpu"))
    with pytest.raises(InputError) as refused:
        check_decoder(decoder, settings("cuda"))
    assert str(refused.value) == (
        "model: 8 is its head dimension; FlexAttention on a GPU takes 16 or more; make it wider or "
        "give it fewer heads, or set device=cpu"
    )


@pytest.mark.parametrize("name", [*CUDA_CONFIGS, "the tests that need a GPU"])
def test_heads_of_what_is_made_for_a_gpu_are_large_enough(name):
    with torch.device("meta"):
        if name in CUDA_CONFIGS:
            decoder = build(with_facts(name), "model")
        else:
            decoder = test_gpu.build_decoder()
    check_decoder(decoder, settings("cuda"))


def settings(device):
    return read_checked(
        [
            "tiny/gspo",
            f"device={device}",
            "check_model_config=false",
            "packing.tokens_per_microbatch=128",
            "packing.bin_length=128",
        ]
    )
