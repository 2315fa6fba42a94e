"""Tiny models of many families of transformers, and their gradients on the ranks of this group.

What is expected comes from the model itself, as the library has it: one document at a time, with
its own eager attention.
"""

import contextlib

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM

from gspo.data.layout import pack_documents
from gspo.decoder import unique_state
from gspo.losses import GSPOLoss
from gspo.metrics import StepMetrics
from gspo.models.huggingface import Checkpointer, causal_lm
from gspo.parallel import Ranks
from gspo.policy import Microbatch, PolicyOptions, build_policy
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.flex import flex_on_cpu
from tests.losses import objectives

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": tiny_policy.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5  # shorter than most documents
ALTERNATING = ["sliding_attention", "full_attention"] * 2
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen2.5": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral, short window": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma 2, softcaps": (
        "Gemma2Config",
        GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "gemma 3": ("Gemma3TextConfig", GEMMA | {"layer_types": ALTERNATING}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3, layers without rotary": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0]}),
    "qwen3 of experts": ("Qwen3MoeConfig", {"head_dim": 16} | EXPERTS),
    "granite, scaled logits": ("GraniteConfig", {"logits_scaling": 4.0}),
    "cohere 2, scaled logits": ("Cohere2Config", {"sliding_window": WINDOW}),
}
ARRANGEMENTS = {
    1: {
        "alone": {},
        "blocks": {"in_blocks": True},
        "checkpointed": {"activation_checkpointing": True},
        "prompts_apart": {"share_prompts": False},
    },
    2: {
        "two_ranks": {},
        "context": {"context": 2},
        "context_blocks_checkpointed": {
            "context": 2,
            "in_blocks": True,
            "activation_checkpointing": True,
        },
    },
}
LOSS = {"clip_low": 0.2, "clip_high": 0.2}


def build(name, seed=0):
    """The model of a family, with random weights that are large enough to matter."""
    kind, options = FAMILIES[name]
    config = getattr(transformers, kind)(**SHAPE | options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def write(folder):
    """Writes every family into a folder of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for number, name in enumerate(FAMILIES):
        build(name).save_pretrained(folder / str(number))


def folder_of(folder, name):
    return str(folder / str(list(FAMILIES).index(name)))


def expected(name):
    """Value and gradients, one document at a time."""
    model = build(name)
    restated = []
    for document in tiny_policy.documents():
        tokens = torch.tensor(document.tokens)
        logits = model(tokens[None, :-1]).logits[0].double() / document.temperature
        new = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
        mask = torch.arange(1, len(document.tokens)) >= document.num_prompt_tokens
        old = torch.zeros(len(document.tokens) - 1, dtype=torch.float64)
        old[mask] = torch.tensor(document.logps, dtype=torch.float32).double()
        advantage = torch.tensor(document.advantage)
        restated.append({"new": new, "old": old, "mask": mask, "advantage": advantage})
    value = objectives.gspo(restated, low=0.2, high=0.2) / len(restated)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters()}


def policy_of(folder, ranks, loss, **options):
    with torch.device("meta"):
        decoder = causal_lm(folder)
    weights = Checkpointer(folder, "unused").load_checkpoint()["model"]
    return build_policy(
        decoder,
        weights,
        loss,
        ranks=ranks,
        device=CPU,
        options=PolicyOptions(kernel="compile", head_chunk_size=16, **options),
    )


def errors(
    name, folder, value, grads, *, context=1, in_blocks=False, share_prompts=True, **options
):
    """The error of the value, and the largest of a parameter's gradient, both relative."""
    ranks = Ranks.of(CPU, context=context)
    loss = GSPOLoss(**LOSS)
    policy = policy_of(folder, ranks, loss, **options)
    documents = tiny_policy.documents()
    num_ranks = ranks.num_data_ranks
    mine = [d for d in documents if d.group_id % num_ranks == ranks.data_rank]
    batch = pack_documents(mine, 96, share_prompts=share_prompts)
    microbatch = Microbatch.prepare(batch, CPU, ranks.context, in_blocks=in_blocks)
    denominator = loss.denominator(len(documents), 0)
    sums = StepMetrics()
    with flex_on_cpu() if in_blocks else contextlib.nullcontext():
        for output in accumulate_gradients(policy, [microbatch], denominator):
            sums.add(output.metrics)
    of_parameters = {}
    for key, parameter in unique_state(policy.decoder).items():
        gradient = parameter.grad.full_tensor()
        want = grads[key]
        of_parameters[key] = float((gradient - want).norm() / want.norm().clamp(min=1e-6))
    assert of_parameters.keys() == grads.keys()
    return abs(sums.reduce()["loss"] / value - 1), max(of_parameters.values())


def everything(folder):
    """Errors by family and arrangement of this number of ranks."""
    transformers.logging.set_verbosity_error()
    found = {}
    for name in FAMILIES:
        value, grads = expected(name)
        for arrangement, options in ARRANGEMENTS[dist.get_world_size()].items():
            path = folder_of(folder, name)
            found[name, arrangement] = errors(name, path, value, grads, **options)
    return found
