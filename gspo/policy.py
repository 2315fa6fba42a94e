"""The policy: a torchtune decoder and the loss head in one module, sharded with FSDP2.

Both are under one root so that the LM-head weight is gathered exactly while the head needs it. The decoder is
torchtune's own; only its ``unembed`` is replaced, so that it returns normalised hidden states instead of logits.

Not here: which model is built and where its weights come from (the config), the optimizer, the denominators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtune import training
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from gspo.context import ContextAxis, Shard, gather_keys, split
from gspo.errors import InputError
from gspo.kernels import linear_logps, linear_loss
from gspo.metrics import merge_pairs
from gspo.terms import LossInputs, Segments, find_segments
from gspo.types import MetricSums, PackedBatch

AttentionMask = Tensor | BlockMask | None


@dataclass(frozen=True, slots=True)
class Microbatch:
    """This rank's part of a packed batch on the device, with what is derived from its layout once."""

    shard: Shard  # where it lies in the whole, on the CPU
    batch: PackedBatch
    label_rows: Tensor  # [N] int64, places with a label; where documents are whole, one's after another's
    label_counts: list[int]  # [D] of them in each document, over all ranks
    counted: Tensor | None  # [D] bool, documents whose sums are added up on this rank; None: all
    attention_mask: AttentionMask
    segments: Segments | None = None  # of the label rows here; those of the whole

    @classmethod
    def prepare(cls, packed: PackedBatch, device: torch.device, context: ContextAxis | None = None) -> Microbatch:
        """Takes this rank's part of a batch to ``device``. The label rows are found before, so that no kernel waits."""
        shard = split(packed, context)
        rows = shard.part.loss_mask.nonzero().squeeze(-1)
        return cls(
            shard=shard,
            batch=shard.part.to(device),
            label_rows=rows.to(device),
            label_counts=packed.label_counts.tolist(),
            counted=None if shard.counted is None else shard.counted.to(device),
            attention_mask=document_mask(shard, device),
            segments=batch_segments(packed, shard.part, rows, device),
        )

    def whole(self, context: ContextAxis | None) -> PackedBatch:
        """The whole batch on the CPU, with the log-probabilities that were set since it was packed. Collective."""
        set_later = {name: getattr(self.batch, name) for name in ("old_logps", "ref_logps", "sampler_logps")}
        found: dict[str, Any] = {
            name: self.shard.collect(values, context).cpu() for name, values in set_later.items() if values is not None
        }
        return replace(self.shard.whole, **found)


def batch_segments(packed: PackedBatch, part: PackedBatch, rows: Tensor, device: torch.device) -> Segments | None:
    """The segments of a batch, with the index of the label rows of a rank's part of it."""
    if not packed.loss_mask.any():  # padding, which has none whether the run cuts completions or not
        return Segments(*torch.zeros(3, 0, dtype=torch.int64, device=device))
    if packed.segment_index is None or part.segment_index is None:
        return None
    whole = find_segments(packed.segment_index, packed.document_index, packed.loss_mask)
    return Segments(*(x.to(device) for x in (part.segment_index[rows], whole.document, whole.label_counts)))


def document_mask(shard: Shard, device: torch.device) -> AttentionMask:
    """Causal attention inside each document and to its prefix: a FlexAttention block mask on CUDA, else [R, S / C, S].

    Keys come in the shard's ``order``. None, for plain causal attention, where no bin holds two documents.
    """
    num_ranks, num_bins, share = shard.places.shape
    if num_ranks == 1 and _one_document_per_bin(shard.whole):
        return None
    if device.type == "cuda":
        return create_block_mask(mask_mod(shard, device), num_bins, None, share, share * num_ranks, device=device)
    q_place, q_index, q_prefix, kv_place, kv_index = _layout(shard, device)
    causal = q_place[:, :, None] >= kv_place[:, None, :]
    own = q_index[:, :, None] == kv_index[:, None, :]
    return causal & (own | (q_prefix[:, :, None] == kv_index[:, None, :]))


def mask_mod(shard: Shard, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention asks for it."""
    q_place, q_index, q_prefix, kv_place, kv_index = _layout(shard, device)

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        key = kv_index[b, kv]
        return (q_place[b, q] >= kv_place[b, kv]) & ((q_index[b, q] == key) | (q_prefix[b, q] == key))

    return seen


def _layout(shard: Shard, device: torch.device) -> tuple[Tensor, ...]:
    """Place, document and prefix of this rank's queries, [R, S / C]; place and document of all keys, [R, S]."""
    batch, mine, order = shard.whole, shard.places[shard.rank], shard.order
    index = batch.document_index.view(batch.num_bins, -1)
    prefix = index if batch.prefix_index is None else batch.prefix_index[index]
    found = mine, index.gather(1, mine), prefix.gather(1, mine), order, index.gather(1, order)
    return tuple(x.to(device) for x in found)


def _one_document_per_bin(batch: PackedBatch) -> bool:
    """True if no bin holds two documents; the causal mask alone is then exact, whatever padding sees."""
    index = batch.document_index.view(batch.num_bins, -1)
    starts = (index[:, 1:] != index[:, :-1]) & (index[:, 1:] != batch.label_counts.numel() - 1)
    return not starts.any()


class Policy(nn.Module):
    """A decoder with its loss head.

    Args:
        decoder: any torchtune decoder with a linear or tied output.
        loss: a component of :mod:`gspo.losses`; None for a policy that is only evaluated.
        chunk_size: labelled tokens whose logits are held at a time; None chooses by device.
        kernel: of the head, see :func:`gspo.kernels.choose_kernel`.
        context: the ranks among which the places of a microbatch are split; None or of size 1 if they are not.
    """

    def __init__(
        self,
        decoder: TransformerDecoder,
        loss: nn.Module | None = None,
        *,
        chunk_size: int | None = None,
        kernel: str = "auto",
        context: ContextAxis | None = None,
    ) -> None:
        super().__init__()
        decoder.unembed = lambda hidden: decoder.norm(hidden)
        self.decoder = decoder
        self.loss = loss
        self._options: dict[str, Any] = {"chunk_size": chunk_size, "kernel": kernel}
        self._context = context if context is not None and context.size > 1 else None
        if self._context is not None:
            gather_keys(decoder, self._context)

    def forward(self, microbatch: Microbatch) -> tuple[Tensor, MetricSums]:
        """The undivided loss sum of a microbatch and its metric sums, both to be added up over the ranks."""
        assert self.loss is not None, "this policy was built without a loss"
        if self._context is None:
            return self._whole_documents(microbatch, self.loss)
        entropy_grad = bool(getattr(self.loss, "entropy_coef", 0))
        logps, entropy = linear_logps(*self._rows(microbatch), entropy_grad=entropy_grad, **self._options)
        return self.loss(logps, entropy, row_inputs(microbatch, self._context))

    def _whole_documents(self, microbatch: Microbatch, loss: nn.Module) -> tuple[Tensor, MetricSums]:
        """The objective runs on chunks of documents while their logits are at hand, a product less."""
        inputs = row_inputs(microbatch, None)

        def seam(logps: Tensor, entropy: Tensor, first: int, last: int) -> tuple[Tensor, MetricSums]:
            return loss(logps, entropy, _part(inputs, microbatch.label_counts, first, last))

        loss_sum, found = linear_loss(
            *self._rows(microbatch),
            microbatch.label_counts,
            seam,
            entropy_grad=bool(getattr(loss, "entropy_coef", 0)),
            **self._options,
        )
        return loss_sum, merge_pairs(found)

    def logps(self, microbatch: Microbatch) -> Tensor:  # [R * S / C] float32 nats, 0 where there is no label
        """Log-probabilities of this rank's labels at the sampling temperature, without gradients. Collective."""
        logps = self._logps(microbatch)
        self.reshard_all()
        return logps

    def reshard_all(self) -> None:
        """After a forward without a backward, or the next would use what was gathered for it, even after an update."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _logps(self, microbatch: Microbatch) -> Tensor:
        rows, _ = linear_logps(*self._rows(microbatch), **self._options)
        return rows.new_zeros(microbatch.batch.tokens.numel()).index_put((microbatch.label_rows,), rows)

    @torch.no_grad()
    def take_weights(self, other: Policy) -> None:
        """Those of a policy that is sharded alike."""
        for mine, given in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(given)

    def full_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """The decoder's parameters by torchtune's names, each gathered in turn on every rank. Collective."""
        for name, value in self.decoder.state_dict().items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def _rows(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, H], [V, H], [N], [N]
        """Hidden states, LM-head weight, labels and temperatures of the rows with a label."""
        batch, rows = microbatch.batch, microbatch.label_rows
        hidden = self.decoder(
            batch.tokens.view(batch.num_bins, -1),
            mask=microbatch.attention_mask,
            input_pos=batch.positions.view(batch.num_bins, -1),
        )
        return (
            # The others are gathered away before the first product. The backward of an index would sort the rows.
            hidden.flatten(0, 1).index_select(0, rows),
            output_weight(self.decoder),
            batch.labels[rows],
            batch.temperature[batch.document_index[rows]],
        )


def row_inputs(microbatch: Microbatch, context: ContextAxis | None) -> LossInputs:
    """What an objective gets of a microbatch: the rows that have a label, on this rank."""
    batch, rows = microbatch.batch, microbatch.label_rows
    spanning: dict[str, Any] = {} if context is None else {"counted": microbatch.counted, "complete": context.complete}
    own = batch.token_advantages
    return LossInputs(
        document_index=batch.document_index[rows],
        loss_mask=torch.ones_like(rows, dtype=torch.bool),
        old_logps=batch.old_logps[rows],
        advantages=batch.advantages,
        label_counts=batch.label_counts,
        ref_logps=None if batch.ref_logps is None else batch.ref_logps[rows],
        sampler_logps=None if batch.sampler_logps is None else batch.sampler_logps[rows],
        segments=microbatch.segments,
        token_advantages=None if own is None else own[rows],
        **spanning,
    )


def _part(inputs: LossInputs, label_counts: list[int], first: int, last: int) -> LossInputs:
    """Documents ``first`` to ``last - 1`` alone; their rows stand one after another."""
    if (first, last) == (0, len(label_counts)):
        return inputs
    start = sum(label_counts[:first])
    rows = slice(start, start + sum(label_counts[first:last]))
    given = inputs.token_advantages
    return LossInputs(
        document_index=inputs.document_index[rows] - first,
        loss_mask=inputs.loss_mask[rows],
        old_logps=inputs.old_logps[rows],
        advantages=inputs.advantages[first:last],
        label_counts=inputs.label_counts[first:last],
        ref_logps=None if inputs.ref_logps is None else inputs.ref_logps[rows],
        sampler_logps=None if inputs.sampler_logps is None else inputs.sampler_logps[rows],
        segments=None if inputs.segments is None else _part_segments(inputs.segments, rows, first, last),
        token_advantages=None if given is None else given[rows],
    )


def _part_segments(segments: Segments, rows: slice, first: int, last: int) -> Segments:
    """Those of documents ``first`` to ``last - 1``; the others keep their numbers and are without labels."""
    inside = (segments.document >= first) & (segments.document < last)
    document = torch.where(inside, segments.document - first, 0)
    return Segments(segments.index[rows], document, torch.where(inside, segments.label_counts, 0))


def output_weight(decoder: TransformerDecoder) -> Tensor:  # [V, H]
    """The LM-head weight, which is the embedding's when they are tied."""
    tied = getattr(decoder.output, "tied_module", None)
    return (tied or decoder.output).weight


def accumulate_gradients(
    policy: Policy, microbatches: list[Microbatch], denominator: float, *, reduce_every_microbatch: bool = True
) -> Iterator[MetricSums]:
    """The backwards of an optimizer step: leaves the gradient of ``loss sum over all ranks / denominator``.

    Args:
        policy: sharded, without gradients or with some to add to.
        microbatches: as many on every rank.
        denominator: from the totals of the whole step over all ranks, see the loss's ``denominator``.
        reduce_every_microbatch: False adds up unsharded gradients and reduces them once, in the last backward: fewer
            collectives for the memory of a full gradient on every rank.

    Yields:
        The metric sums of each microbatch, ``loss`` among them.
    """
    # FSDP2 averages gradients over the ranks; a sum over documents needs them added up.
    scale = dist.get_world_size() / denominator
    for i, microbatch in enumerate(microbatches):
        policy.set_requires_gradient_sync(reduce_every_microbatch or i == len(microbatches) - 1)
        loss_sum, pairs = policy(microbatch)
        (loss_sum * scale).backward()
        yield pairs | {"loss": (loss_sum.detach() / denominator, loss_sum.new_ones(()))}


def shard_policy(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    activation_checkpointing: bool = False,
    compile_layers: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shards a policy in place with FSDP2, layer by layer, with float32 reductions. One rank is no exception."""
    if compile_layers:
        training.compile_model(policy.decoder, verbose=False)
    if activation_checkpointing:
        training.set_activation_checkpointing(policy.decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in policy.decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "_logps")


def load_weights(
    policy: Policy, state_dict: dict[str, Tensor], device: torch.device, *, cpu_offload: bool = False
) -> None:
    """Gives a policy built on the meta device its memory and the weights of ``state_dict`` (torchtune's names).

    Raises:
        InputError: names or shapes are not those of the decoder.
    """
    _check_weights(state_dict, policy.decoder.state_dict())
    policy.to_empty(device="cpu" if cpu_offload else device)
    with device:
        for module in policy.modules():
            if hasattr(module, "rope_init"):  # not part of a state dict
                module.rope_init()
    training.load_from_full_model_state_dict(policy.decoder, state_dict, device, strict=True, cpu_offload=cpu_offload)
    training.validate_no_params_on_meta_device(policy)


def _check_weights(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        ours, theirs = (list(weights[name].shape) if name in weights else "missing" for weights in (wanted, found))
        if ours != theirs:
            raise InputError(
                f"model: {name} is {ours} in the model and {theirs} in the checkpoint. "
                "Name the builder, with its arguments, that the checkpoint was made for."
            )
