"""The policy: a torchtune decoder and the loss head in one module, sharded with FSDP2.

Both are under one root so that the LM-head weight is gathered exactly while the head needs it. The decoder is
torchtune's own; only its ``unembed`` is replaced, so that it returns normalised hidden states instead of logits.

Not here: which model is built and where its weights come from (the config), the optimizer, the denominators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
)
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from gspo.kernels import linear_logps, linear_loss
from gspo.metrics import merge_pairs
from gspo.parallel.context import ContextAxis
from gspo.policy.attention import gather_keys
from gspo.policy.microbatch import Microbatch, _part, row_inputs
from gspo.types import MetricSums


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
        logps, entropy = linear_logps(
            *self._rows(microbatch), entropy_grad=entropy_grad, **self._options
        )
        return self.loss(logps, entropy, row_inputs(microbatch, self._context))

    def _whole_documents(
        self, microbatch: Microbatch, loss: nn.Module
    ) -> tuple[Tensor, MetricSums]:
        """The objective runs on chunks of documents while their logits are at hand, a product less."""
        inputs = row_inputs(microbatch, None)

        def seam(
            logps: Tensor, entropy: Tensor, first: int, last: int
        ) -> tuple[Tensor, MetricSums]:
            return loss(logps, entropy, _part(inputs, microbatch.label_counts, first, last))

        loss_sum, found = linear_loss(
            *self._rows(microbatch),
            microbatch.label_counts,
            seam,
            entropy_grad=bool(getattr(loss, "entropy_coef", 0)),
            **self._options,
        )
        return loss_sum, merge_pairs(found)

    def logps(
        self, microbatch: Microbatch
    ) -> Tensor:  # [R * S / C] float32 nats, 0 where there is no label
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
        return rows.new_zeros(microbatch.batch.tokens.numel()).index_put(
            (microbatch.label_rows,), rows
        )

    @torch.no_grad()
    def take_weights(self, other: Policy) -> None:
        """Those of a policy that is sharded alike."""
        for mine, given in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(given)

    def full_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """The decoder's parameters by torchtune's names, each gathered in turn on every rank. Collective."""
        for name, value in self.decoder.state_dict().items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def _rows(
        self, microbatch: Microbatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, H], [V, H], [N], [N]
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


def output_weight(decoder: TransformerDecoder) -> Tensor:  # [V, H]
    """The LM-head weight, which is the embedding's when they are tied."""
    tied = getattr(decoder.output, "tied_module", None)
    return (tied or decoder.output).weight
