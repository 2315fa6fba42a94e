"""torchtune's builders and converters against transformers: the same log-probabilities.

A tiny random model of a family is written by transformers, read by torchtune's checkpointer into
torchtune's builder, and written back. Where the builder is another model than transformers', a test
says by how much, and that a run with it is refused at start.
"""

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torchtune.models.gemma2._component_builders import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM

from gspo.data.layout import pack_documents
from gspo.errors import InputError
from gspo.policy import Microbatch, Policy
from gspo.policy.checkpoint_config import check_model_config
from tests import tiny_policy
from tests.models import families

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": families.SHAPE["vocab_size"],
    "num_layers": families.SHAPE["num_hidden_layers"],
    "num_heads": families.SHAPE["num_attention_heads"],
    "num_kv_heads": families.SHAPE["num_key_value_heads"],
    "embed_dim": families.SHAPE["hidden_size"],
    "intermediate_dim": families.SHAPE["intermediate_size"],
    "max_seq_len": families.SHAPE["max_position_embeddings"],
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_OF_QWEN = {"rope_type": "default", "rope_theta": 1e6}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}


class Family(NamedTuple):
    """A model of both libraries, with what the shipped models state where it matters."""

    config: str
    options: dict[str, Any]
    builder: Any
    arguments: dict[str, Any]
    model_type: str


SAME = {
    "qwen2.5": Family(
        "Qwen2Config",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_parameters": ROPE_OF_QWEN},
        qwen2,
        {"norm_eps": 1e-6, "rope_base": 1e6, "tie_word_embeddings": True},
        "QWEN2",
    ),
    "qwen2.5, head of its own": Family(
        "Qwen2Config",
        {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_parameters": ROPE_OF_QWEN},
        qwen2,
        {"norm_eps": 1e-6, "rope_base": 1e6, "tie_word_embeddings": False},
        "QWEN2",
    ),
    "llama 3.2": Family(
        "LlamaConfig",
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_SCALING},
        llama3_2,
        {"norm_eps": 1e-5, "rope_base": 500_000, "scale_factor": 32},
        "LLAMA3_2",
    ),
    "mistral": Family(
        "MistralConfig",
        {"sliding_window": None, "rms_norm_eps": 1e-5},
        mistral,
        {"norm_eps": 1e-5},
        "MISTRAL",
    ),
    "phi 4": Family(
        "Phi3Config",
        {"sliding_window": None, "rms_norm_eps": 1e-5},
        phi3,
        {"norm_eps": 1e-5},
        "PHI4",
    ),
}
MISTRAL_WITH_WINDOW = Family(
    "MistralConfig",
    {"sliding_window": families.WINDOW, "rms_norm_eps": 1e-5},
    mistral,
    {"norm_eps": 1e-5},
    "MISTRAL",
)
GEMMA_2 = Family(
    "Gemma2Config",
    {"head_dim": 16, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, **CAPS},
    gemma2,
    {
        "head_dim": 16,
        "query_pre_attn_scalar": 32,
        "norm_eps": 1e-6,
        "hidden_capping_value": CAPS["attn_logit_softcapping"],
        "final_capping_value": CAPS["final_logit_softcapping"],
    },
    "GEMMA2",
)


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def build(family):
    """A model of transformers whose every parameter is random, norms and biases too."""
    config = getattr(transformers, family.config)(**families.SHAPE | family.options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        parameter.data += 0.08 * torch.randn_like(parameter)
    return model


def read(model, family, folder):
    """torchtune's checkpointer of a model's folder, and torchtune's decoder with the weights."""
    model.save_pretrained(folder / "base")
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder / "base"),
        checkpoint_files=["model.safetensors"],
        output_dir=str(folder / "out"),
        model_type=family.model_type,
    )
    decoder = family.builder(**SHAPE, **family.arguments)
    decoder.load_state_dict(checkpointer.load_checkpoint()["model"])
    return checkpointer, decoder


def compare(decoder, folder, **options):
    check_model_config(decoder, {"checkpoint_dir": str(folder / "base")}, **options)


def logps_of(logits):
    return logits.float().log_softmax(-1)


def error(model, decoder):
    """The largest difference of a log-probability, over the vocabulary, at each of 40 tokens."""
    tokens = torch.arange(3, 43)[None] % SHAPE["vocab_size"]
    with torch.no_grad():
        difference = logps_of(model(tokens).logits) - logps_of(decoder(tokens))
    return difference.abs().amax(-1)[0]


@torch.no_grad()
def logps_of_document(model, document):
    tokens = torch.tensor(document.tokens)
    logps = logps_of(model(tokens[None, :-1]).logits[0] / document.temperature)
    logps = logps.gather(-1, tokens[1:, None])[:, 0]
    return logps[document.num_prompt_tokens - 1 :]


@pytest.mark.parametrize("name", SAME)
def test_decoder_and_policy_give_transformers_log_probabilities(tmp_path, name):
    family = SAME[name]
    model = build(family)
    _, decoder = read(model, family, tmp_path)
    compare(decoder, tmp_path)
    assert error(model, decoder).max() < 1e-5
    policy = Policy(decoder, kernel="compile", chunk_size=16)
    documents = tiny_policy.documents()
    microbatch = Microbatch.prepare(pack_documents(documents, 96), CPU)
    rows = policy.logps(microbatch)[microbatch.label_rows]
    found = {}
    labels = microbatch.batch.labels[microbatch.label_rows]
    sizes = microbatch.label_counts
    for tokens, logps in zip(labels.split(sizes), rows.split(sizes), strict=True):
        found[tuple(tokens.tolist())] = logps
    found.pop((), None)  # of shared prompts, which have no labels
    assert len(found) == len(documents)
    for document in documents:
        completion = tuple(document.tokens[document.num_prompt_tokens :])
        expected = logps_of_document(model, document)
        torch.testing.assert_close(found[completion], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAME)
def test_what_is_written_is_the_model_for_transformers(tmp_path, name):
    family = SAME[name]
    model = build(family)
    checkpointer, decoder = read(model, family, tmp_path)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.01
    weights = {"model": decoder.state_dict()}
    checkpointer.save_checkpoint(weights, epoch=1, intermediate_checkpoint=False)
    written = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "epoch_1", attn_implementation="eager", dtype=torch.float32
    )
    assert error(model, decoder).max() > 1e-3
    assert error(written, decoder).max() < 1e-5


def test_a_window_is_beyond_torchtune_and_refused(tmp_path):
    """Documents that fit into it are exact, longer ones are another model's."""
    model = build(MISTRAL_WITH_WINDOW)
    _, decoder = read(model, MISTRAL_WITH_WINDOW, tmp_path)
    errors = error(model, decoder)
    window = families.WINDOW
    assert errors[:window].max() < 1e-5 < 1e-2 < errors[window:].min()
    compare(decoder, tmp_path, longest_document=window + 1)
    with pytest.raises(InputError, match=f"model: {window} is the sliding_window in "):
        compare(decoder, tmp_path)


def test_gemma_2_of_torchtune_is_another_model_and_refused(tmp_path):
    """It caps hidden states in the place of logits, and swaps the norms around a layer's MLP."""
    model = build(GEMMA_2)
    _, decoder = read(model, GEMMA_2, tmp_path)
    assert error(model, decoder).min() > 1e-2
    with pytest.raises(InputError, match="model: 'gemma2' is Gemma 2 as torchtune has it"):
        compare(decoder, tmp_path)
    for layer in decoder.layers:
        layer.mlp_norm, layer.mlp_scale = layer.mlp_scale, layer.mlp_norm
    assert error(model, decoder).min() > 1e-2
    cap = decoder.norm.capping_value
    decoder.norm.logit_capping = torch.nn.Identity()
    unembed = decoder.unembed
    decoder.unembed = lambda hidden: cap * torch.tanh(unembed(hidden) / cap)
    assert error(model, decoder).max() < 1e-5
