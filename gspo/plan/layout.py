"""Sizes of the model and of a rank's part of the work, and the microbatch that stands for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtune import training

from gspo.adapters import remove_adapters
from gspo.compat import component_from_path
from gspo.config import Settings, build, refusals
from gspo.data.bins import take_short_bins
from gspo.data.layout import Document, build_batch, document_sizes, pack_documents
from gspo.data.pack import check_bin_length
from gspo.decoder import attention_sizes
from gspo.errors import require
from gspo.kernels import rows_per_chunk
from gspo.plan.dry_run import num_data_ranks
from gspo.sampling.local import LocalSampler
from gspo.sampling.product import is_worth_packing
from gspo.types import PackedBatch

PROMPT_GUESS = 128  # tokens, where max_prompt_tokens says nothing
_SHORTEST_DOCUMENT = 3  # tokens: two of a prompt, one of a completion
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that the plan of a config on so many ranks is made of."""

    world_size: int
    data_ranks: int
    context_size: int
    replicate_size: int
    on_gpu: bool
    dtype: torch.dtype
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_seq_len: int
    weight_bytes: int  # of the whole model
    packed_bytes: int  # of those weights of which the in-process sampler has a second copy
    chunk_size: int
    prompt_tokens: int  # of a document, expected
    completion_tokens: int
    documents_per_microbatch: int  # over the ranks of a context axis
    num_microbatches: int  # of an optimizer step
    rollout_documents: int  # that a rank draws for a rollout
    microbatch: PackedBatch

    @classmethod
    def of(cls, cfg: Settings, world_size: int, mean_document_tokens: int | None) -> Layout:
        """Lay a config out on so many ranks.

        Raises:
            InputError: See :meth:`gspo.plan.estimate.Planner.plan`.
        """
        data_ranks = _num_data_ranks(cfg, world_size)
        with torch.device("meta"):
            decoder = build_decoder(cfg)
        with refusals("packing"):
            check_bin_length(cfg.packing.bin_length, decoder.max_seq_len)
        vocab_size, hidden_size = decoder.tok_embeddings.weight.shape
        attention = attention_sizes(decoder)
        document = _document_size(cfg, mean_document_tokens)
        rollout_documents = cfg.prompts_per_rollout // data_ranks * cfg.group_size
        max_seq_len = decoder.max_seq_len
        microbatch = _fill_microbatch(cfg, document, rollout_documents, max_seq_len)
        documents_at_once = data_ranks * microbatch.num_documents
        remove_adapters(decoder)  # as the sampler's replica has none
        return cls(
            world_size=world_size,
            data_ranks=data_ranks,
            context_size=cfg.context_parallel_size,
            replicate_size=cfg.data_parallel_replicate_size,
            on_gpu=cfg.device != "cpu",
            dtype=_DTYPES[cfg.dtype],
            num_layers=len(decoder.layers),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            weight_bytes=sum(p.nbytes for p in decoder.parameters()),
            packed_bytes=_packed_bytes(decoder) if cfg.device == "cpu" else 0,
            chunk_size=cfg.head_chunk_size or rows_per_chunk(vocab_size, cfg.device),
            prompt_tokens=document.prompt_tokens,
            completion_tokens=document.completion_tokens,
            documents_per_microbatch=microbatch.num_documents,
            num_microbatches=math.ceil(cfg.docs_per_step / documents_at_once),
            rollout_documents=rollout_documents,
            microbatch=microbatch,
        )

    @property
    def slots(self) -> int:
        """Tokens of a microbatch on one rank."""
        return self.microbatch.tokens.numel() // self.context_size

    def describe(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        described: dict[str, Any] = {}
        for name in self.__slots__:
            if name not in ("microbatch", "dtype"):
                described[name] = getattr(self, name)
        return described | {
            "bins": self.microbatch.num_bins,
            "bin_length": self.microbatch.bin_length,
            "slots": self.slots,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _packed_bytes(decoder: Any) -> int:
    """Return bytes of the weights that a CPU multiplies with in decode steps."""
    weights = {}
    for module in decoder.modules():
        if type(module) is nn.Linear:
            weights[id(module.weight)] = module.weight
    if not isinstance(decoder.output, nn.Linear):  # tied: the embedding is the head
        embedding = decoder.tok_embeddings.weight
        weights[id(embedding)] = embedding
    return sum(weight.nbytes for weight in weights.values() if is_worth_packing(weight))


def build_decoder(cfg: Settings) -> Any:
    """Build the model in the config's dtype."""
    with training.set_default_dtype(_DTYPES[cfg.dtype]):
        return build(cfg, "model")


def samples_here(cfg: Settings) -> bool:
    """Whether the sampler is the one that draws in the trainer's process."""
    return component_from_path(cfg.sampler["_component_"]) is LocalSampler


def rows_at_once(cfg: Settings, layout: Layout) -> int:
    """Return the number of completions that the in-process sampler draws at once."""
    return min(cfg.sampler.get("max_batch_size", 512), layout.rollout_documents)


def _num_data_ranks(cfg: Settings, world_size: int) -> int:
    data_ranks = num_data_ranks(
        world_size,
        replicate_size=cfg.data_parallel_replicate_size,
        context_size=cfg.context_parallel_size,
    )
    require(
        cfg.prompts_per_rollout % data_ranks == 0,
        "prompts_per_rollout",
        cfg.prompts_per_rollout,
        f"must be a multiple of the {data_ranks} data-parallel ranks that share the prompts",
        "change one of them",
    )
    return data_ranks


@dataclass(frozen=True, slots=True)
class _DocumentSize:
    """Tokens of a document as it is expected."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def num_slots(self) -> int:
        return self.num_tokens - 1

    def documents(self, count: int) -> list[Document]:
        """Make so many of them."""
        tokens = [0] * self.num_tokens
        logps = [0.0] * self.completion_tokens
        made = []
        for number in range(count):
            document = Document(
                tokens=tokens,
                num_prompt_tokens=self.prompt_tokens,
                logps=logps,
                advantage=1.0,
                reward=0.0,
                temperature=1.0,
                policy_version=0,
                prompt_id=str(number),
                group_id=number,
            )
            made.append(document)
        return made


def _document_size(cfg: Settings, mean: int | None) -> _DocumentSize:
    """Guess the size of a document, or share a mean out as in the guess."""
    longest_completion = cfg.sampling.max_new_tokens
    longest_prompt = cfg.prompts.get("max_prompt_tokens")
    if longest_prompt:
        prompt = longest_prompt // 4
    else:
        prompt = min(PROMPT_GUESS, longest_completion)
    guess = _DocumentSize(max(prompt, 2), max(longest_completion // 2, 1))
    if mean is None:
        return guess
    require(
        mean >= _SHORTEST_DOCUMENT,
        "--mean-document-tokens",
        mean,
        f"must be at least {_SHORTEST_DOCUMENT}",
        "give a prompt's and completion's tokens",
    )
    share = round(mean * guess.prompt_tokens / guess.num_tokens)
    prompt = min(max(share, 2), mean - 1)
    return _DocumentSize(prompt, mean - prompt)


def _fill_microbatch(
    cfg: Settings, size: _DocumentSize, rollout_documents: int, max_seq_len: int
) -> PackedBatch:
    """Pack as many documents as a microbatch holds, or a rollout has."""
    limit, length = cfg.packing.tokens_per_microbatch, cfg.packing.bin_length
    bin_length = length or min(limit, max_seq_len)
    require(
        size.num_slots <= bin_length <= limit,
        "packing.bin_length" if length else "packing.tokens_per_microbatch",
        length or limit,
        f"is too small for documents of {size.num_tokens} tokens",
        "raise it, or state the mean with --mean-document-tokens",
    )
    num_bins = limit // bin_length
    if length is None:
        most = min(limit // size.num_slots, rollout_documents)
        documents = size.documents(most)
        sizes = document_sizes(documents, cfg.packing.share_prompts)
        bins = take_short_bins(sizes, limit, bin_length)
        taken = documents[: len(bins.bin_of)]
        return build_batch(taken, bins.bin_of, bins.length)
    count = min(bin_length // size.num_slots * num_bins, rollout_documents)
    return pack_documents(size.documents(count), length)
