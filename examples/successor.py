"""A transformer with random weights learns the alphabet by GSPO: under a minute on a CPU.

Nothing is downloaded: the tokenizer knows letters, and the model is a Qwen2 of 0.08 million
parameters. Run it with ``python examples/successor.py``, or on two ranks with
``torchrun --nproc_per_node 2 examples/successor.py``. ``successor.ipynb`` has the same cells with
what they printed.
"""

# %%
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a model this small is slower on more threads

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from gspo import GSPOConfig, GSPOTrainer

NUM_STEPS = int(os.environ.get("NUM_STEPS", "120"))

# %% A tokenizer of letters, and a model with random weights.
characters = "0123456789> abcdefghijklmnopqrstuvwxyz"
words = {character: number for number, character in enumerate(characters)}
words["<end>"] = len(words)
letters = Tokenizer(models.BPE(words, merges=[]))
letters.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>")

torch.manual_seed(0)
shape = Qwen2Config(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=words["<end>"],
)
model = AutoModelForCausalLM.from_config(shape)

# %% Questions, and a reward as TRL's are: half for the right letter, half for ending behind it.
alphabet = "abcdefghijklmnopqrstuvwxyz"
queries = [f"{letter}>" for letter in alphabet[:-1]]
answers = list(alphabet[1:])


def follows(completions, answer, **columns):
    """Return a reward from 0 to 1 for each completion."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        is_right = completion.startswith(right)
        is_short = len(completion) == 1
        rewards.append(0.5 * is_right + 0.5 * is_short)
    return rewards


# %% A step samples 32 completions of each question, compares them, and updates the policy twice.
config = GSPOConfig(
    learning_rate=1e-3,
    left_clip_range=0.2,
    right_clip_range=0.2,
    group_size=32,
    ppo_epochs=2,
    sync_every_steps=2,
    max_new_tokens=3,
    clip_grad_norm=1.0,
)
trainer = GSPOTrainer(model, tokenizer, config)
print("before:", trainer.evaluate(queries, follows, answer=answers))

# %%
for number in range(1, NUM_STEPS + 1):
    row = trainer.train_step(queries, follows, answer=answers)
    if number % 10 == 0:
        print(f"step {number:3}: reward {row['reward/mean']:.2f}, solved {row['solved']:.2f}")

# %%
print("after:", trainer.evaluate(queries, follows, answer=answers))
