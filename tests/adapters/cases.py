"""Adapters of both libraries on the ranks of this group, against peft on the model itself.

The truth is a model of transformers with adapters of peft, one document at a time. A policy reads
the folder that peft has saved; it gives value and gradients, and writes a folder and a merged model
that give the value again.
"""

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torchtune.models import llama3_2, mistral, phi3, qwen2
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM

from gspo.adapters import Adapters, PeftFormat, starting_adapters
from gspo.adapters.nf4 import dequantize, quantize
from gspo.data.layout import pack_documents
from gspo.decoder import unique_state
from gspo.losses import GSPOLoss
from gspo.metrics import StepMetrics
from gspo.models.huggingface import Checkpointer, lora_causal_lm
from gspo.parallel import Ranks
from gspo.policy import Microbatch, PolicyOptions, build_policy
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.losses import objectives

CPU = torch.device("cpu")
RANK, ALPHA = 4, 8.0
HIDDEN = 128  # torchtune's 4-bit weights are of at least 16,384 entries
LOSS = {"clip_low": 0.2, "clip_high": 0.2}
SHAPE = {
    "vocab_size": tiny_policy.VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
COMPONENT = {
    "vocab_size": tiny_policy.VOCAB_SIZE,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "embed_dim": HIDDEN,
    "intermediate_dim": 256,
    "max_seq_len": 512,
    "norm_eps": 1e-5,
    "rope_base": 10_000,
}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512}
# Name: config of transformers, its options, builder of torchtune, its options, its model type.
FAMILIES = {
    "qwen2.5": ("Qwen2Config", {"tie_word_embeddings": True}),
    "llama 3.2": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": SCALED_ROPE}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi": ("Phi3Config", {"tie_word_embeddings": False}),
    "gemma 2": ("Gemma2Config", GEMMA2),
}
TORCHTUNE = {
    "qwen2.5": (qwen2.lora_qwen2, {"tie_word_embeddings": True}, "QWEN2"),
    "llama 3.2": (llama3_2.lora_llama3_2, {"scale_factor": 8}, "LLAMA3_2"),
    "mistral": (mistral.lora_mistral, {}, "MISTRAL"),
    "phi": (phi3.lora_phi3, {}, "PHI4"),
}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "qlora": {"quantize_base": True}}
FUSED = ("phi",)  # torchtune has apart what transformers has in one map


def build(name):
    """The base model of a family, with random weights that are large enough to matter."""
    kind, options = FAMILIES[name]
    config = getattr(transformers, kind)(**SHAPE | options)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        values = 0.06 * torch.randn_like(parameter)
        # Norms and biases too: what starts at 1 or 0 shows no mistake.
        parameter.data.add_(values) if parameter.dim() == 1 else parameter.data.copy_(values)
    return model


def with_random_adapters(model, *, use_dora):
    """A model of peft whose adapters change much."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        use_dora=use_dora,
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
        elif "lora_" in name:
            parameter.data.normal_(std=0.1)
    return adapted


def write(folder):
    """Writes the base model of every family, and adapters of every kind beside it."""
    quiet()
    for number, name in enumerate(FAMILIES):
        build(name).save_pretrained(folder / str(number))
        for kind in ("lora", "dora"):
            model = AutoModelForCausalLM.from_pretrained(folder / str(number))
            adapted = with_random_adapters(model, use_dora=kind == "dora")
            adapted.save_pretrained(folder / f"{number}_{kind}")


def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def base_folder(folder, name):
    return folder / str(list(FAMILIES).index(name))


def adapter_folder(folder, name, kind):
    format_of = "dora" if kind == "dora" else "lora"
    return folder / f"{list(FAMILIES).index(name)}_{format_of}"


def quantized(model):
    """Puts what 4 bits leave of it in the place of each adapted weight."""
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.dim() == 2:
            parameter.data.copy_(dequantize(*quantize(parameter.data), torch.float32))
    return model


def truth(model):
    """Value and gradients, one document at a time."""
    restated = []
    for document in tiny_policy.documents():
        new, mask = _new_logps(model, document)
        old = torch.zeros(len(document.tokens) - 1, dtype=torch.float64)
        old[mask] = torch.tensor(document.logps, dtype=torch.float32).double()
        advantage = torch.tensor(document.advantage)
        restated.append({"new": new, "old": old, "mask": mask, "advantage": advantage})
    value = objectives.gspo(restated, low=0.2, high=0.2) / len(restated)
    value.backward()
    grads = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            grads[name.replace("vector.weight", "vector")] = parameter.grad
    return value.item(), grads


@torch.no_grad()
def logps_of(model):
    """The sum over all completions."""
    total = 0.0
    for document in tiny_policy.documents():
        new, mask = _new_logps(model, document)
        total += float(new[mask].sum())
    return total


def _new_logps(model, document):
    tokens = torch.tensor(document.tokens)
    logits = model(tokens[None, :-1]).logits[0].double() / document.temperature
    logps = logits.log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
    mask = torch.arange(1, len(document.tokens)) >= document.num_prompt_tokens
    return logps, mask


def load(base, kind, adapters=None):
    """The truth: the library's model, in 4 bits or not, with the adapters of a folder."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if kind == "qlora":
        quantized(model)
    if adapters is not None:
        model = PeftModel.from_pretrained(model, adapters, is_trainable=True)
    return model


def decoder_and_checkpointer(library, name, kind, base, out):
    options = KINDS[kind]
    with torch.device("meta"):
        if library == "transformers":
            decoder = lora_causal_lm(str(base), lora_rank=RANK, lora_alpha=ALPHA, **options)
            return decoder, Checkpointer(str(base), str(out))
        builder, of_family, model_type = TORCHTUNE[name]
        decoder = builder(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            **COMPONENT | of_family | options,
        )
    files = [path.name for path in base.glob("*.safetensors")]
    return decoder, FullModelHFCheckpointer(str(base), files, model_type, str(out))


def random_adapters(decoder, weights):
    """Adapters that change much, for a decoder whose maps peft does not have."""
    generator = torch.Generator().manual_seed(3)
    state = unique_state(decoder)
    drawn = {}
    for adapter in Adapters(decoder):
        for name in (adapter.down, adapter.up):
            drawn[name] = 0.1 * torch.randn(tuple(state[name].shape), generator=generator)
        if adapter.magnitude is not None:
            norms = weights[adapter.weight].norm(dim=1)
            drawn[adapter.magnitude] = norms * (1 + 0.2 * torch.rand(len(norms)))
    return drawn


def run(folder, library, name, kind, *, context=1, **options):
    """The errors of an arrangement, relative, by what they are of; on the first rank alone."""
    base = base_folder(folder, name)
    ranks = Ranks.of(CPU, context=context)
    out = folder / f"out_{library}_{name}_{kind}_{ranks.world_size}_{context}_{len(options)}"
    decoder, checkpointer = decoder_and_checkpointer(library, name, kind, base, out)
    weights = checkpointer.load_checkpoint()["model"]
    is_apart = library == "torchtune" and name in FUSED
    path = adapter_folder(folder, name, kind)
    weights |= starting_adapters(None if is_apart else str(path), decoder, checkpointer)
    if is_apart:
        weights |= random_adapters(decoder, weights)
    loss = GSPOLoss(**LOSS, kl_coef=0.1)
    policy = build_policy(
        decoder,
        weights,
        loss,
        ranks=ranks,
        device=CPU,
        options=PolicyOptions(kernel="compile", head_chunk_size=16, **options),
    )
    found, grads = step(policy, ranks)
    form = PeftFormat(policy.adapters, unique_state(policy.decoder), checkpointer)
    adapters = dict(policy.adapter_state_dict())
    merged = dict(policy.full_state_dict())
    if dist.get_rank() != 0:
        return {}
    form.write(out / "adapters", adapters)
    checkpointer.save_checkpoint({"model": merged}, epoch=0)
    errors = {
        "written": apart(truth(load(base, kind, out / "adapters"))[0], found["value"]),
        "merged": apart(truth(load(out / "epoch_0", "lora"))[0], found["value"]),
        "base": apart(logps_of(load(base, kind)), found["base"]),
    }
    if not is_apart:
        value, want = truth(load(base, kind, path))
        errors["read"] = apart(value, found["value"])
        errors["gradient"] = gradient_error(form, grads, want)
    return errors


def step(policy, ranks):
    """Value and log-probabilities of the base over all ranks, and gathered gradients."""
    documents = tiny_policy.documents()
    mine = [d for d in documents if d.group_id % ranks.num_data_ranks == ranks.data_rank]
    batch = pack_documents(mine, 96)
    microbatch = Microbatch.prepare(batch, CPU, ranks.context)
    policy.loss.kl_coef = 0.0
    sums = StepMetrics()
    denominator = policy.loss.denominator(len(documents), 0)
    for output in accumulate_gradients(policy, [microbatch], denominator):
        sums.add(output.metrics)
    policy.loss.kl_coef = 0.1
    base = policy.base.logps(microbatch).double().sum()
    dist.all_reduce(base)
    grads = {}
    for name, parameter in unique_state(policy.decoder).items():
        if parameter.grad is not None:
            grads[name] = parameter.grad.full_tensor()
    assert grads.keys() == policy.adapters.trained
    return {"value": sums.reduce()["loss"], "base": float(base)}, grads


def apart(found, want):
    """The relative error, of values that are not near 0 by chance."""
    return abs(found - want) / max(abs(want), 0.1)


def gradient_error(form, grads, want):
    """The largest relative error of a parameter's gradient, by the names of peft."""
    errors = []
    for adapted in form.maps:
        for kind, gradient in adapted.joined(grads).items():
            wanted = want[f"{adapted.name}.{kind}"]
            errors.append(float((gradient - wanted).norm() / wanted.norm().clamp(min=1e-6)))
    assert len(errors) == len(want)
    return max(errors)


ARRANGEMENTS = {1: {"alone": {}}, 2: {"ranks": {}, "context": {"context": 2}}}


def everything(folder):
    """Errors by library, family, kind and arrangement of this number of ranks."""
    quiet()
    found = {}
    for library in ("transformers", "torchtune"):
        for name in FAMILIES if library == "transformers" else TORCHTUNE:
            for kind in KINDS:
                for arrangement, options in ARRANGEMENTS[dist.get_world_size()].items():
                    case = (library, name, kind, arrangement)
                    found[case] = run(folder, library, name, kind, **options)
    return found
