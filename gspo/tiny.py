"""A small base policy with all that a large one has: Hugging Face files, a tokenizer, examples.

``make_untrained`` writes a folder that torchtune's checkpointer, tokenizer and SFT recipe read as
they read any other Qwen2 model. The task is reasoning-gym's ``chain_sum``; the held-out questions
appear in no other file.

Not here: training. The warm start is torchtune's own SFT recipe (:mod:`gspo.demo` runs it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from gspo.data.readers.components import jsonl_prompts
from gspo.errors import InputError
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt

CHAT_TEMPLATE = "<|im_start|>user\n{expression}<|im_end|>\n<|im_start|>assistant\n"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_MERGES = 13  # what "user", "assistant" and the operators with their blank need
VOCAB_SIZE = 272  # 256 bytes, the special tokens and the merges
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "intermediate_dim": 256,
    "max_seq_len": 128,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "tie_word_embeddings": True,
}
HEADS = {
    "num_heads": SHAPE["num_heads"],
    "num_kv_heads": SHAPE["num_kv_heads"],
    "dim": SHAPE["embed_dim"],
}


def tiny_qwen2() -> TransformerDecoder:
    """Build the Qwen2 decoder of the ``tiny/*`` configs, which has 0.48 million parameters."""
    return qwen2(**SHAPE)


def make_untrained(
    model_dir: Path,
    data_dir: Path,
    *,
    seed: int,
    num_train: int = 8000,
    num_heldout: int = 1000,
    num_validation: int = 200,
) -> None:
    """Write an untrained model and its data.

    Args:
        model_dir: gets ``model.safetensors``, ``config.json`` and the tokenizer's files.
        data_dir: gets ``train.jsonl``, ``heldout.jsonl`` and ``validation.jsonl``, which share no
            question.
        seed: of the weights and of the questions.
        num_train: questions to train on.
        num_heldout: questions to evaluate on.
        num_validation: questions to decide by when the warm start ends.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    num_held_back = num_heldout + num_validation
    rows = chain_sum_rows(num_train + num_held_back, seed=seed)
    _write_jsonl(data_dir / "heldout.jsonl", rows[:num_heldout])
    _write_jsonl(data_dir / "validation.jsonl", rows[num_heldout:num_held_back])
    _write_jsonl(data_dir / "train.jsonl", rows[num_held_back:])
    texts = [CHAT_TEMPLATE.format_map(row) + row["worked"] for row in rows]
    write_tokenizer(model_dir, texts)
    write_model(model_dir, seed=seed)


def read_tokenizer(folder: Path) -> Any:
    """Read a folder's files as torchtune's Qwen2 tokenizer."""
    from torchtune.models.qwen2 import qwen2_tokenizer

    return qwen2_tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        special_tokens_path=str(folder / "tokenizer.json"),
    )


def read_prompts(model_dir: Path, path: Path) -> list[Prompt]:
    """Return all questions of a JSONL file, in its order."""
    tokenizer = read_tokenizer(model_dir)
    reader = jsonl_prompts(
        tokenizer,
        source=str(path),
        prompt_template=CHAT_TEMPLATE,
        add_bos=False,
        shuffle=False,
        num_epochs=1,
    )
    return list(reader)


def load_sampler(folder: Path) -> LocalSampler:
    """Return a sampler with the weights of a saved tiny model."""
    from safetensors.torch import load_file
    from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

    (file,) = folder.glob("*.safetensors")
    weights = qwen2_hf_to_tune(load_file(file), tie_word_embeddings=True, **HEADS)

    def build_decoder() -> TransformerDecoder:
        model = tiny_qwen2()
        model.load_state_dict(weights)
        return model

    return LocalSampler(build_decoder, read_tokenizer(folder))


def chain_sum_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return distinct two-digit sums and differences that are not negative.

    ``worked`` is the example that SFT learns from: the result's digits from the right, as one
    computes them, then the answer behind ``=``. ``entry`` is what reasoning-gym's scorer reads.

    Raises:
        InputError: ``count`` is too near to the 12,195 that there are.
    """
    import reasoning_gym

    # Its items are seeded by seed + index: neighbouring seeds would share them.
    dataset = reasoning_gym.create_dataset(
        "chain_sum",
        size=4 * count,
        seed=1_000_003 * seed,
        min_terms=2,
        max_terms=2,
        min_digits=2,
        max_digits=2,
    )
    rows: dict[str, dict[str, Any]] = {}
    for entry in dataset:
        row = _chain_sum_row(entry)
        if not row["answer"].startswith("-"):
            rows.setdefault(row["expression"], row)
        if len(rows) == count:
            return list(rows.values())
    raise InputError(
        "num_train, num_heldout and num_validation",
        count,
        f"in all, but only {len(rows)} distinct questions came of {len(dataset)} draws",
        "ask for fewer",
    )


def _chain_sum_row(entry: dict[str, Any]) -> dict[str, Any]:
    answer = entry["answer"]
    return {
        "expression": entry["metadata"]["expression"],
        "answer": answer,
        "worked": f"{answer[::-1]}={answer}",
        "entry": entry,
    }


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Train a byte-level BPE tokenizer with Qwen2's special tokens and write its files.

    Args:
        folder: gets the files, in Hugging Face's formats.
        texts: what it learns its merges from.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + NUM_MERGES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((plain.sub("", text) for text in texts), trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_model(folder: Path, *, seed: int) -> None:
    """Write random weights and the ``config.json`` that transformers and torchtune read."""
    from safetensors.torch import save_file
    from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

    model = _untrained_decoder(seed)
    weights = qwen2_tune_to_hf(model.state_dict(), tie_word_embeddings=True, **HEADS)
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": SHAPE["embed_dim"],
        "intermediate_size": SHAPE["intermediate_dim"],
        "num_hidden_layers": SHAPE["num_layers"],
        "num_attention_heads": SHAPE["num_heads"],
        "num_key_value_heads": SHAPE["num_kv_heads"],
        "max_position_embeddings": SHAPE["max_seq_len"],
        "rms_norm_eps": SHAPE["norm_eps"],
        "rope_theta": SHAPE["rope_base"],
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 256 + NUM_MERGES + SPECIAL_TOKENS.index("<|im_end|>"),
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _untrained_decoder(seed: int) -> TransformerDecoder:
    """Build a decoder with random weights, and leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_qwen2()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.06)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return model


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
