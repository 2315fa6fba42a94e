"""From a config and a machine to memory, operations, bytes and expected times of an optimizer step on one rank.

Not here: what the training step itself holds and does, which :mod:`gspo.plan.rehearsal` finds by going through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training
from torchtune.modules import TransformerDecoder

from gspo.config.checks import keeps_sampled_weights, refusals, require
from gspo.data.layout import Document, pack_documents
from gspo.data.pack import check_bin_length
from gspo.errors import InputError
from gspo.kernels import choose_kernel, rows_per_chunk
from gspo.plan import memory_tracker as ledger
from gspo.plan.dry_run import Options, Rehearsal, num_data_ranks, rehearse
from gspo.plan.memory_tracker import Transfer
from gspo.types import PackedBatch

GIB = 2**30
LOCAL_SAMPLER = "gspo.sampling.local.LocalSampler"
PROMPT_GUESS = 128  # tokens, where max_prompt_tokens says nothing
RESERVE = 2 * GIB  # of a GPU: context, NCCL's buffers, what the caching allocator cannot use
ATTENTION_BACKWARD = 2.5  # five products where the forward has two
DRAW_BYTES = 20  # for each row and word: logits, log-probabilities and probabilities in float32, their sum in float64

SAMPLER_COPY = "the sampler's copy of the weights"
SAMPLER_CACHE = "the sampler's keys and values"
SAMPLER_DRAW = "the sampler's distribution"
REFERENCE = "reference policy, sharded"
SAMPLED = "weights that sampled, for old_logps: recompute, sharded"
IN_SAMPLING = "sampling"
ON_HOST = (ledger.WEIGHTS, ledger.GRADIENTS, ledger.OPTIMIZER)  # with fsdp_cpu_offload


@dataclass(frozen=True, slots=True)
class Machine:
    """What a rank has and what it reaches, per rank; a link is counted in one direction."""

    memory: int  # bytes
    tflops: float  # 1e12 operations a second that products of matrices reach
    link_gbps: float  # 1e9 bits a second, inside a node
    node_link_gbps: float  # and between nodes
    memory_gbytes: float  # 1e9 bytes a second, of the device's memory
    ranks_per_node: int


DEFAULT_RATES: dict[
    str, dict[str, float]
] = {  # assumed to be reached: about half of an H100's, or of two CPU cores'
    "cuda": {
        "tflops": 400.0,
        "link_gbps": 2400.0,
        "node_link_gbps": 320.0,
        "memory_gbytes": 2000.0,
    },
    "cpu": {"tflops": 0.1, "link_gbps": 40.0, "node_link_gbps": 8.0, "memory_gbytes": 10.0},
}


class Planner:
    """Plans one config on one machine; what was gone through once is not gone through again.

    Args:
        cfg: as the recipe starts with it.
        machine: see there.
        mean_document_tokens: prompt and completion; None guesses.
    """

    def __init__(
        self, cfg: DictConfig, machine: Machine, mean_document_tokens: int | None = None
    ) -> None:
        self._cfg, self._machine, self._mean = cfg, machine, mean_document_tokens
        self._rehearsals: dict[str, Rehearsal] = {}

    def plan(self, world_size: int, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Memory, work, transfers and time of an optimizer step, in bytes, operations and seconds.

        Args:
            world_size: ranks.
            changes: values by key that differ from the config.

        Raises:
            InputError: the config cannot run on so many ranks, or its documents do not fit its bins.
        """
        cfg = self._cfg.copy()
        for key, value in (changes or {}).items():
            OmegaConf.update(cfg, key, value, merge=False)
        layout = Layout.of(cfg, world_size, self._mean)
        done = self._rehearse(cfg, layout)
        moments, always = _memory(cfg, layout, done)
        peak = max(moments, key=lambda name: sum(moments[name].values()))
        reserve = RESERVE if layout.on_gpu else 0
        peak_bytes = sum(moments[peak].values())
        work = _work(cfg, layout, done)
        transfers = _transfers(cfg, layout, done, self._machine)
        return {
            "world_size": world_size,
            "device": cfg.device,
            "layout": layout.describe() | {"parameters": done.num_parameters},
            "memory": {
                "always": always,
                "moments": moments,
                "peak": {"moment": peak, "bytes": peak_bytes, "parts": moments[peak]},
                "activations": {
                    "checkpointing": cfg.enable_activation_checkpointing,
                    "kept_without_checkpointing": done.kept,
                    "kept_with_checkpointing": done.kept_checkpointed,
                },
                "reserve": reserve,
                "limit": self._machine.memory,
                "fits": peak_bytes + reserve <= self._machine.memory,
            },
            "work": work,
            "transfers": transfers,
            "time": _time(cfg, layout, done, work, transfers, self._machine),
            "machine": asdict(self._machine),
            "assumptions": _assumptions(cfg, layout),
        }

    def _rehearse(self, cfg: DictConfig, layout: Layout) -> Rehearsal:
        options = Options(
            world_size=layout.world_size,
            device_type=cfg.device,
            dtype=layout.dtype,
            microbatch=layout.microbatch,
            build_decoder=partial(_build_decoder, cfg, layout.dtype),
            build_optimizer=partial(_component, cfg, "optimizer"),
            loss=_component(cfg, "loss"),
            num_microbatches=layout.num_microbatches,
            chunk_size=layout.chunk_size,
            kernel=choose_kernel(cfg.kernel, cfg.device, layout.vocab_size),
            activation_checkpointing=cfg.enable_activation_checkpointing,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            reduce_every_microbatch=cfg.reduce_every_microbatch,
            replicate_size=cfg.data_parallel_replicate_size,
            context_size=cfg.context_parallel_size,
        )
        plain = {
            k: v
            for k, v in ((f, getattr(options, f)) for f in Options.__slots__)
            if not callable(v)
        }
        plain["microbatch"] = layout.describe()
        key = repr((plain, OmegaConf.to_yaml(cfg.model), OmegaConf.to_yaml(cfg.optimizer)))
        if key not in self._rehearsals:
            self._rehearsals[key] = rehearse(options)
        return self._rehearsals[key]

    def remedies(self, world_size: int) -> list[dict[str, Any]]:
        """What would save memory, each planned: the change, the peak with it, and whether it then fits; best first.

        Of a change that lowers another moment than the peak's, which does not fit either, only the last entry knows:
        all changes on as many ranks together.
        """
        before = self.plan(world_size)["memory"]
        tried = [self._tried(*candidate, before) for candidate in self._candidates(world_size)]
        found = [remedy for remedy in tried if remedy is not None]
        saving = [remedy for remedy in found if remedy["saves"] > before["peak"]["bytes"] // 200]
        saving.sort(key=lambda remedy: -remedy["saves"])
        together: dict[str, Any] = {}
        for remedy in (r for r in found if r["helps"] and r["world_size"] == world_size):
            together |= remedy["changes"]
        if len(together) > 1 and not any(remedy["fits"] for remedy in saving):
            all_of_them = self._tried(f"together: {_named(together)}", world_size, together, before)
            saving += [all_of_them] if all_of_them else []
        return saving

    def _tried(
        self, name: str, world_size: int, changes: dict[str, Any], before: dict[str, Any]
    ) -> dict[str, Any] | None:
        try:
            memory = self.plan(world_size, changes)["memory"]
        except InputError:  # this config cannot be changed in this way
            return None
        sums = {moment: sum(parts.values()) for moment, parts in memory["moments"].items()}
        too_much = {m: sum(p.values()) for m, p in before["moments"].items()}
        too_much = {
            m: size for m, size in too_much.items() if size + before["reserve"] > before["limit"]
        }
        return {
            "change": name,
            "changes": changes,
            "world_size": world_size,
            "peak": memory["peak"]["bytes"],
            "moment": memory["peak"]["moment"],
            "saves": before["peak"]["bytes"] - memory["peak"]["bytes"],
            "helps": any(sums[moment] < 0.995 * size for moment, size in too_much.items()),
            "fits": memory["fits"],
        }

    def _candidates(self, world_size: int) -> list[tuple[str, int, dict[str, Any]]]:
        cfg = self._cfg
        found: list[dict[str, Any]] = []
        if not cfg.enable_activation_checkpointing:
            found.append({"enable_activation_checkpointing": True})
        if not cfg.reduce_every_microbatch:
            found.append({"reduce_every_microbatch": True})
        if not cfg.fsdp_reshard_after_forward and world_size > 1:
            found.append({"fsdp_reshard_after_forward": True})
        if cfg.data_parallel_replicate_size > 1:
            found.append({"data_parallel_replicate_size": 1})
        if "8bit" not in cfg.optimizer._component_:
            found.append(
                {
                    "optimizer": {
                        "_component_": "torchao.optim.AdamW8bit",
                        "lr": float(cfg.optimizer.lr),
                    }
                }
            )
        if (cfg.head_chunk_size or rows_per_chunk(1, cfg.device)) > 1024:
            found.append({"head_chunk_size": 1024})
        found.append({"context_parallel_size": 2 * cfg.context_parallel_size})
        tokens, length = cfg.packing.tokens_per_microbatch, cfg.packing.get("bin_length")
        halves = {"packing.tokens_per_microbatch": tokens // 2}
        found.append(
            halves
            | ({} if length is None or length < tokens else {"packing.bin_length": length // 2})
        )
        if cfg.sampler._component_ == LOCAL_SAMPLER:
            rows = _rows_at_once(cfg, Layout.of(cfg, world_size, self._mean))
            found.append({"sampler.max_batch_size": max(rows // 2, 1)})
        if cfg.device != "cpu" and not cfg.fsdp_cpu_offload:
            found.append({"fsdp_cpu_offload": True})
        named = [(_named(change), world_size, change) for change in found]
        return [*named, (f"--world-size {2 * world_size}", 2 * world_size, {})]


def _named(changes: dict[str, Any]) -> str:
    """As on a command line."""
    plain = {
        key: value["_component_"] if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return " ".join(
        f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in plain.items()
    )


def _component(cfg: DictConfig, key: str, *args: Any) -> Any:
    with refusals(key, "correct its arguments"):
        return config.instantiate(cfg[key], *args)


def _build_decoder(cfg: DictConfig, dtype: torch.dtype) -> TransformerDecoder:
    with training.set_default_dtype(dtype):
        return _component(cfg, "model")


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the model, of a rank's part of the work, and the microbatch that stands for all."""

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
    chunk_size: int
    prompt_tokens: int  # of a document, expected
    completion_tokens: int
    documents_per_microbatch: int  # over the ranks of a context axis
    num_microbatches: int  # of an optimizer step
    rollout_documents: int  # that a rank draws for a rollout
    microbatch: PackedBatch

    @classmethod
    def of(cls, cfg: DictConfig, world_size: int, mean_document_tokens: int | None) -> Layout:
        """The layout of a config on so many ranks.

        Raises:
            InputError: see :meth:`Planner.plan`.
        """
        context_size, replicate_size = cfg.context_parallel_size, cfg.data_parallel_replicate_size
        data_ranks = num_data_ranks(
            world_size, replicate_size=replicate_size, context_size=context_size
        )
        require(
            cfg.prompts_per_rollout % data_ranks == 0, "prompts_per_rollout", cfg.prompts_per_rollout,
            f"must be a multiple of the {data_ranks} data-parallel ranks that share the prompts", "change one of them",
        )  # fmt: skip
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
        with torch.device("meta"):
            decoder = _build_decoder(cfg, dtype)
        check_bin_length(cfg.packing.get("bin_length"), decoder.max_seq_len)
        attention = decoder.layers[0].attn
        vocab_size, hidden_size = decoder.tok_embeddings.weight.shape
        prompt, completion = _document_tokens(cfg, mean_document_tokens)
        rollout_documents = cfg.prompts_per_rollout // data_ranks * cfg.group_size
        microbatch = _microbatch(cfg, prompt, completion, rollout_documents)
        return cls(
            world_size=world_size,
            data_ranks=data_ranks,
            context_size=context_size,
            replicate_size=replicate_size,
            on_gpu=cfg.device != "cpu",
            dtype=dtype,
            num_layers=len(decoder.layers),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            max_seq_len=decoder.max_seq_len,
            weight_bytes=sum(p.nbytes for p in decoder.parameters()),
            chunk_size=cfg.head_chunk_size or rows_per_chunk(vocab_size, cfg.device),
            prompt_tokens=prompt,
            completion_tokens=completion,
            documents_per_microbatch=microbatch.num_documents,
            num_microbatches=math.ceil(cfg.docs_per_step / (data_ranks * microbatch.num_documents)),
            rollout_documents=rollout_documents,
            microbatch=microbatch,
        )

    @property
    def places(self) -> int:
        """Tokens of a microbatch on one rank."""
        return self.microbatch.tokens.numel() // self.context_size

    def describe(self) -> dict[str, Any]:
        """In plain values."""
        plain = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("microbatch", "dtype")
        }
        shape = {
            "bins": self.microbatch.num_bins,
            "bin_length": self.microbatch.bin_length,
            "places": self.places,
        }
        return plain | shape | {"dtype": str(self.dtype).removeprefix("torch.")}


def _document_tokens(cfg: DictConfig, mean: int | None) -> tuple[int, int]:
    """Expected tokens of a prompt and of its completion."""
    longest_prompt = cfg.prompts.get("max_prompt_tokens")
    prompt = max(
        (longest_prompt // 4) if longest_prompt else min(PROMPT_GUESS, cfg.sampling.max_new_tokens),
        2,
    )
    completion = max(cfg.sampling.max_new_tokens // 2, 1)
    if mean is None:
        return prompt, completion
    require(
        mean >= 3,
        "--mean-document-tokens",
        mean,
        "must be at least 3",
        "give a prompt's and completion's tokens",
    )
    prompt = min(max(round(mean * prompt / (prompt + completion)), 2), mean - 1)
    return prompt, mean - prompt


def _microbatch(
    cfg: DictConfig, prompt: int, completion: int, rollout_documents: int
) -> PackedBatch:
    """As many documents of the expected length as one holds, or a rollout has."""
    places, limit, length = (
        prompt + completion - 1,
        cfg.packing.tokens_per_microbatch,
        cfg.packing.get("bin_length"),
    )
    bin_length = length or -(-places // 8) * 8
    require(
        places <= bin_length <= limit, "packing.bin_length" if length else "packing.tokens_per_microbatch",
        length or limit, f"is too small for documents of {places + 1} tokens",
        "raise it, or state the mean with --mean-document-tokens",
    )  # fmt: skip
    count = min(bin_length // places * (limit // bin_length), rollout_documents)
    one = [0] * (prompt + completion)
    documents = [
        Document(one, prompt, [0.0] * completion, 1.0, 0.0, 1.0, 0, str(i), i) for i in range(count)
    ]
    return pack_documents(documents, length)


def _memory(
    cfg: DictConfig, layout: Layout, done: Rehearsal
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Bytes by moment and part, and of what is held all the time."""
    beside: dict[str, int] = {}
    if cfg.reference_checkpointer is not None:
        beside[REFERENCE] = done.always[ledger.WEIGHTS]
    if keeps_sampled_weights(cfg):
        beside[SAMPLED] = done.always[ledger.WEIGHTS]
    sampling: dict[str, int] = {}
    if cfg.sampler._component_ == LOCAL_SAMPLER:
        beside[SAMPLER_COPY] = _sampler_copy(layout, done)
        sampling = _sampling(cfg, layout)
    resting = {
        label: done.always[label] for label in (ledger.WEIGHTS, ledger.OPTIMIZER, ledger.BUFFERS)
    }
    training = sampling if cfg.prefetch else {}  # then it goes on in a thread, at any moment
    moments = {name: dict(parts) | beside | training for name, parts in done.peaks.items()}
    if sampling:
        moments[IN_SAMPLING] = resting | beside | sampling
    if cfg.fsdp_cpu_offload and layout.on_gpu:
        for parts in moments.values():
            for label in ON_HOST:
                parts.pop(label, None)
    return moments, done.always | beside


def _sampler_copy(layout: Layout, done: Rehearsal) -> int:
    """Weights, and the tables of the model's rotary module and of the sampler's own."""
    own_table = layout.max_seq_len * 2 * layout.head_dim * 4
    return layout.weight_bytes + done.always[ledger.BUFFERS] + own_table


def _sampling(cfg: DictConfig, layout: Layout) -> dict[str, int]:
    """What the in-process sampler holds if the longest prompts get the longest completions."""
    num_rows = _rows_at_once(cfg, layout)
    longest = cfg.prompts.get("max_prompt_tokens") or layout.prompt_tokens
    columns = longest + cfg.sampling.max_new_tokens
    of_a_layer = num_rows * layout.num_kv_heads * columns * layout.head_dim * layout.dtype.itemsize
    cache = (2 * layout.num_layers + 1) * of_a_layer  # and one while it is copied to grow
    draw = num_rows * layout.vocab_size * DRAW_BYTES
    if not layout.on_gpu and layout.dtype is not torch.float32:
        draw += layout.vocab_size * layout.hidden_size * 4  # the head's weight, widened
    return {SAMPLER_CACHE: cache, SAMPLER_DRAW: draw}


def _rows_at_once(cfg: DictConfig, layout: Layout) -> int:
    """Completions that the in-process sampler draws at once."""
    return min(cfg.sampler.get("max_batch_size", 512), layout.rollout_documents)


def _work(cfg: DictConfig, layout: Layout, done: Rehearsal) -> dict[str, Any]:
    """Operations of an optimizer step on one rank: a product of n numbers with n others is 2 n."""
    pairs = _attended_pairs(layout)
    attention = (
        4.0 * pairs * layout.num_layers * layout.num_heads * layout.head_dim / layout.context_size
    )
    passes = 1 + ATTENTION_BACKWARD + bool(cfg.enable_activation_checkpointing)
    parts = {
        "decoder forward": done.operations.get(ledger.FORWARD, 0.0),
        "decoder forward again, checkpointed": done.operations.get(ledger.RECOMPUTED, 0.0),
        "decoder backward": done.operations.get(ledger.BACKWARD, 0.0),
        "loss head": done.operations.get(ledger.HEAD, 0.0),
        "attention": passes * attention,
    }
    step = {name: count * layout.num_microbatches for name, count in parts.items()}
    return {
        "microbatches": layout.num_microbatches,
        "operations": step,
        "total": sum(step.values()),
        "head_units": parts["loss head"]
        / (2.0 * done.num_labels * layout.hidden_size * layout.vocab_size),
    }


def _attended_pairs(layout: Layout) -> float:
    """Queries times keys of a microbatch: the whole square under a dense mask, else half of each document's."""
    if not layout.on_gpu:
        return float(layout.microbatch.num_bins * layout.microbatch.bin_length**2)
    places = layout.prompt_tokens + layout.completion_tokens - 1
    return layout.documents_per_microbatch * places**2 / 2


def _transfers(
    cfg: DictConfig, layout: Layout, done: Rehearsal, machine: Machine
) -> list[dict[str, Any]]:
    """Collectives of an optimizer step: bytes that a rank receives, and how long they take by themselves."""
    found = done.transfers
    usual = found.get("a microbatch", found["the last microbatch"])
    repeated = {(t.purpose, t.kind, t.group_size): t for t in usual}
    rows = []
    for transfer in found["the last microbatch"]:
        other = repeated.pop((transfer.purpose, transfer.kind, transfer.group_size), None)
        rows.append(_transfer(transfer, 1, other, layout.num_microbatches - 1, layout, machine))
    for transfer in repeated.values():  # in all but the last
        rows.append(_transfer(transfer, layout.num_microbatches - 1, None, 0, layout, machine))
    rows += [_transfer(t, 1, None, 0, layout, machine) for t in found["an update"]]
    if cfg.sampler._component_ == LOCAL_SAMPLER:
        rows += [
            _transfer(t, 1 / cfg.sync_every_steps, None, 0, layout, machine)
            for t in found["a sync"]
        ]
    return rows


def _transfer(
    one: Transfer,
    times: float,
    other: Transfer | None,
    other_times: int,
    layout: Layout,
    machine: Machine,
) -> dict[str, Any]:
    calls = one.calls * times + (other.calls * other_times if other else 0)
    num_bytes = one.num_bytes * times + (other.num_bytes * other_times if other else 0)
    if one.kind == "all-reduce":
        num_bytes *= 2  # a reduce-scatter and an all-gather
    size, here = one.group_size, machine.ranks_per_node
    if (
        one.kind == "all-reduce" and one.purpose == ledger.REDUCING
    ):  # replicas: as far apart as a set of shards
        members = min(max(here * layout.replicate_size // layout.world_size, 1), size)
    else:
        members = min(here, size)
    nodes = -(-size // members)
    received = num_bytes * (size - 1) / size
    over_nodes = (
        num_bytes * (nodes - 1) / nodes / members
    )  # of a rank, where the ranks of a node share what comes in
    seconds = max(
        received * 8 / (machine.link_gbps * 1e9), over_nodes * 8 / (machine.node_link_gbps * 1e9)
    )
    return {
        "purpose": _PURPOSES.get(one.purpose, "counts and norms"),
        "kind": one.kind,
        "ranks": size,
        "nodes": nodes,
        "calls": calls,
        "received": received,
        "received_between_nodes": over_nodes,
        "seconds": seconds,
    }


_PURPOSES = {
    ledger.GATHERING: "weights of layers and head",
    ledger.REDUCING: "gradients",
    ledger.KEYS: "keys and values",
    ledger.SYNC: "weights for the sampler",
}


def _time(
    cfg: DictConfig,
    layout: Layout,
    done: Rehearsal,
    work: dict,
    transfers: list[dict],
    machine: Machine,
) -> dict[str, Any]:
    """Expected seconds of an optimizer step. FSDP2 sends while layers compute; the rest waits."""
    seconds = {purpose: 0.0 for purpose in (*_PURPOSES.values(), "counts and norms")}
    for row in transfers:
        seconds[row["purpose"]] += row["seconds"]
    compute = work["total"] / (machine.tflops * 1e12)
    fsdp = seconds["weights of layers and head"] + seconds["gradients"]
    rest = seconds["keys and values"] + seconds["counts and norms"]
    found = {
        "products": compute,
        "fsdp": fsdp,
        "keys_and_values": seconds["keys and values"],
        "update": max(compute, fsdp) + rest,
        "update_without_overlap": compute + fsdp + rest,
        "sync": seconds["weights for the sampler"],
    }
    if cfg.sampler._component_ == LOCAL_SAMPLER:
        found["sampling"] = _sampling_seconds(cfg, layout, machine)
    return found


def _sampling_seconds(cfg: DictConfig, layout: Layout, machine: Machine) -> float:
    """At least, for an optimizer step's share of a rollout: weights and cache are read once a token."""
    num_rows = _rows_at_once(cfg, layout)
    batches = -(-layout.rollout_documents // num_rows)
    columns = layout.prompt_tokens + cfg.sampling.max_new_tokens / 2
    of_a_token = (
        2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
    )
    read = layout.weight_bytes + num_rows * columns * of_a_token
    rollout = batches * cfg.sampling.max_new_tokens * read / (machine.memory_gbytes * 1e9)
    documents = cfg.prompts_per_rollout * cfg.group_size
    return rollout * cfg.docs_per_step / documents / cfg.ppo_epochs


def _assumptions(cfg: DictConfig, layout: Layout) -> list[str]:
    """What is taken for granted, in sentences."""
    found = [
        f"documents of {layout.prompt_tokens} prompt and {layout.completion_tokens} completion tokens, all alike: a "
        "spread of lengths makes attention dearer. No prompt shared, no document dropped",
        f"{layout.documents_per_microbatch} documents in a microbatch; every token of a completion has a coefficient "
        "(f = 0), so the head takes 3 products where documents are whole and 4 where they span ranks",
        "rates are reached, not peaks; the optimizer, norms and other loops over numbers take no time",
        "FSDP2's gathers and reductions run behind the layers; gathers of keys and values, and the sync, do not",
    ]
    if layout.on_gpu:
        found.append(
            f"{RESERVE / GIB:.0f} GiB kept for the CUDA context, NCCL and what the allocator cannot use; FlexAttention "
            "keeps no scores and no dense mask; the head widens no weights"
        )
    else:
        found.append(
            "dense masks where a bin holds several documents; all work and all ranks have the rates stated"
        )
    if cfg.compile:
        found.append("compile: true is planned as if it were false; compiled layers keep less")
    if cfg.fsdp_cpu_offload and layout.on_gpu:
        found.append(
            "fsdp_cpu_offload: weights, gradients and optimizer state are on the host; copies take no time"
        )
    if cfg.sampler._component_ == LOCAL_SAMPLER:
        found.append(
            "sampling: the longest prompts with the longest completions fill the cache; time at least that of reading "
            "weights and cache once a token"
        )
    else:
        found.append(f"sampler {cfg.sampler._component_}: what it holds is not counted")
    return found
