"""A trainer on the ranks of this process group, from the same untrained model on each."""

import json
from pathlib import Path

import torch
import transformers
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo import GSPOConfig, GSPOTrainer
from gspo.decoder import unique_state
from gspo.tiny import CHAT_TEMPLATE, read_tokenizer, tiny_qwen2

OPTIONS = {
    "learning_rate": 1e-3,
    "left_clip_range": 0.03,
    "right_clip_range": 0.04,
    "clip_grad_norm": 1.0,
    "group_size": 4,
    "max_new_tokens": 10,
    "stop_token_ids": [269, 271],
}


def of_transformers(base, **options):
    """A trainer of the model in a folder, as transformers reads it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base / "base")
    tokenizer = AutoTokenizer.from_pretrained(base / "base")
    return GSPOTrainer(model, tokenizer, GSPOConfig(**OPTIONS | options))


def checkpointer_of(base):
    return FullModelHFCheckpointer(
        str(base / "base"), ["model.safetensors"], "QWEN2", output_dir=str(base / "unused")
    )


def of_torchtune(base, **options):
    """The same model, as torchtune reads it."""
    model = tiny_qwen2()
    model.load_state_dict(checkpointer_of(base).load_checkpoint()["model"])
    return GSPOTrainer(model, read_tokenizer(base / "base"), GSPOConfig(**OPTIONS | options))


def questions(base):
    """The queries of the training data, in the file's order."""
    rows = (base / "data" / "train.jsonl").read_text().splitlines()
    return [CHAT_TEMPLATE.format(expression=json.loads(row)["expression"]) for row in rows]


def variety(completions, **columns):
    """Between 0 and 1, by the number of distinct characters."""
    return [len(set(completion)) % 4 / 3 for completion in completions]


def train(base, options, sizes):
    """Rows of steps on so many queries each, an evaluation, and the weights after them."""
    trainer = of_transformers(Path(base), **options)
    queries = questions(Path(base))
    rows = []
    for size in sizes:
        taken, queries = queries[:size], queries[size:]
        rows.append(trainer.train_step(taken, variety))
    rows.append(trainer.evaluate(queries[:5], variety, num_samples=2))
    weights = {}
    for name, weight in unique_state(trainer.policy.decoder).items():
        weights[name] = weight.detach().full_tensor().numpy()
    path = trainer.save(Path(base) / f"saved{torch.distributed.get_world_size()}")
    return {"rows": rows, "weights": weights, "path": str(path)}
