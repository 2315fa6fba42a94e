"""The loop of ``rl_loop.py`` by TRL's ``GRPOTrainer``, for ``rl_loop.py --trl``.

The same shape, reward, objective and optimizer, with what was fastest of TRL's settings on a CPU:
one forward for all rows, no gradient checkpointing, no reference model, no logs, and ``generate``
with its cache and nothing to stop at, so that every completion has its five tokens. With
``compiled`` the decoder is compiled in place, for sampling too: faster than the trainer's
``torch_compile``. Two things are left as TRL has them: the old log-probabilities come from one more
forward, because ``generate`` returns none, and dead groups are trained.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from rl_loop import (
    ALPHABET,
    ANSWER_TOKENS,
    GROUP_SIZE,
    NUM_PROMPTS,
    SHAPE,
    TINY,
    Prompts,
    Work,
    coin,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

# By the trainer's methods; the first contains the others and the forward for the old
# log-probabilities.
PARTS = {
    "rollout": "_generate_and_score_completions",
    "sample": "_generate_single_turn",
    "score": "_calculate_rewards",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one character a token.

    The ids that TRL wants for padding and for the end are beyond the model's vocabulary.
    """
    ids = {character: i for i, character in enumerate(ALPHABET)}
    characters = Tokenizer(models.WordLevel(ids))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    )


def build_model(*, compiled: bool) -> Qwen2ForCausalLM:
    """Return a Qwen2 of ``rl_loop.SHAPE``, with the attention that is faster at eleven tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["embed_dim"],
        intermediate_size=SHAPE["intermediate_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        max_position_embeddings=SHAPE["max_seq_len"],
        tie_word_embeddings=SHAPE["tie_word_embeddings"],
        attn_implementation="eager" if compiled else "sdpa",
    )
    model = Qwen2ForCausalLM(config)
    if compiled:
        model.model.compile()
    return model


def reward(completions: list[str], completion_ids: list[list[int]], **_) -> list[float]:
    """Return the coin's rewards, after a look that every completion has its five tokens."""
    lengths = [len(ids) for ids in completion_ids]
    assert lengths == [ANSWER_TOKENS] * NUM_PROMPTS * GROUP_SIZE
    pattern = coin(0.5)
    return [float(bool(re.fullmatch(pattern, completion))) for completion in completions]


class Clock(TrainerCallback):
    """Measures each rollout with its updates.

    From the end of the last update to the end of the next rollout's last update.
    """

    def __init__(self, updates: int) -> None:
        self._updates = updates
        self.runs: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}

    def watch(self, trainer: GRPOTrainer) -> None:
        """Time the trainer's methods."""
        for part, method in PARTS.items():
            setattr(trainer, method, self.timed(part, getattr(trainer, method)))

    def timed(self, part: str, method: Callable) -> Callable:
        """Return the method, with its seconds kept under ``part``."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            self._parts[part] = time.perf_counter() - start
            return result

        return call

    def on_train_begin(self, *_, **__) -> None:
        """Start the clock."""
        self._last = time.perf_counter()
        self._processor = time.process_time()

    def on_step_end(self, args, state, *_, **__) -> None:
        """Read the clock after the last update of a rollout."""
        if state.global_step % self._updates:
            return
        now = time.perf_counter()
        total = now - self._last
        update = total - self._parts["rollout"]
        processor = time.process_time() - self._processor
        run = {"total": total, "update": update, "processor": processor, **self._parts}
        self.runs.append(run)
        self.on_train_begin()


def run(rollouts: int, *, compiled: bool) -> list[dict[str, float]]:
    """Return the seconds by part of each rollout; the first few are a warm-up."""
    # TRL's head takes 32,768 logits at a time: 335 MB of buffer, for 64 of them.
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = SHAPE["vocab_size"]
    prompts = Prompts()
    texts = [prompts.next().text for _ in range(rollouts * NUM_PROMPTS)]
    dataset = Dataset.from_dict({"prompt": texts})
    clock = Clock(TINY.updates)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            build_model(compiled=compiled),
            reward,
            args=settings(
                folder,
                rollouts,
                TINY,
                generation_kwargs={"eos_token_id": None},
            ),
            train_dataset=dataset,
            processing_class=build_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        trainer.train()
    return [{**seconds, "live": NUM_PROMPTS * GROUP_SIZE} for seconds in clock.runs]


def settings(folder: str, rollouts: int, work: Work, *, split: int = 1, **more: Any) -> GRPOConfig:
    """Return TRL's settings for GSPO on a CPU, the fastest of them.

    Args:
        folder: for what the trainer writes.
        rollouts: to be made.
        work: of a rollout.
        split: forwards in which an update is made.
        more: settings of this model's.
    """
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=work.num_completions // split,
        gradient_accumulation_steps=split,
        gradient_checkpointing=False,
        num_generations=work.group_size,
        max_completion_length=work.new_tokens,
        num_iterations=work.updates,
        max_steps=work.updates * rollouts,
        loss_type="grpo",  # with the next, GSPO as TRL's documentation states it
        importance_sampling_level="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        optim="adamw_torch_fused",
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
