"""The policy: a torchtune decoder and the loss head in one module.

Both are under one FSDP2 root, whose own parameters, embedding and LM-head weight, are gathered from
the start of a forward to the end of its backward: the head's gradient is made in the forward. The
decoder is torchtune's own; only its ``unembed`` is replaced, so that it returns normalised hidden
states instead of logits, and its layers' attention.

Not here: which model is built and where its weights come from (the config), how it is sharded
(:mod:`gspo.policy.sharding`), the optimizer, the denominators.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from gspo.adapters import Adapters
from gspo.decoder import head_of, unique_state
from gspo.kernels import linear_logps, linear_loss
from gspo.losses.inputs import Loss, LossOutput, traits_of
from gspo.metrics import NotFinite, merge
from gspo.norm import fuse_norms
from gspo.parallel.context import ContextAxis
from gspo.policy.attention import Attend, attend, use_attention
from gspo.policy.microbatch import Microbatch, row_inputs


class Policy(nn.Module):
    """A decoder with its loss head.

    Args:
        decoder: any torchtune decoder with a linear or tied output, or one of
            :mod:`gspo.models.huggingface`.
        loss: a component of :mod:`gspo.losses`; None for a policy that is only evaluated.
        chunk_size: labelled tokens whose logits are held at a time; None chooses by device.
        kernel: of the head, see :func:`gspo.kernels.choose_kernel`.
        context: the ranks among which a microbatch is split; None or of size 1 if it is not.
        attention: of the layers, see :func:`gspo.policy.attention.attend`.
    """

    def __init__(
        self,
        decoder: Any,
        loss: Loss | None = None,
        *,
        chunk_size: int | None = None,
        kernel: str = "auto",
        context: ContextAxis | None = None,
        attention: Attend = attend,
    ) -> None:
        super().__init__()
        if isinstance(decoder, TransformerDecoder):
            decoder.unembed = lambda hidden: decoder.norm(hidden)
        self.adapters = Adapters(decoder)
        self.decoder = decoder
        self.loss = loss
        self._choose_trained()
        head = head_of(decoder)
        self._logit_divisor = head.divisor
        self._options: dict[str, Any] = {
            "chunk_size": chunk_size,
            "kernel": kernel,
            "softcap": head.softcap,
        }
        self._context = context if context is not None and context.size > 1 else None
        use_attention(decoder, self._context, attention)
        fuse_norms(decoder)

    def _choose_trained(self) -> None:
        """Let the parameters that are trained have gradients: adapters alone where there are any.

        Without a loss none is.
        """
        trained = self.adapters.trained
        for name, parameter in unique_state(self.decoder).items():
            is_trained = not trained or name in trained
            parameter.requires_grad_(is_trained and self.loss is not None)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that an optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has, adapters included; one in 4 bits counts as one."""
        state = unique_state(self.decoder)
        plain = self.adapters.plain_state(state).values()
        trained = [state[name] for name in self.adapters.trained]
        return sum(value.numel() for value in (*plain, *trained))

    @property
    def base(self) -> BasePolicy | None:
        """The reference policy that costs no memory: this one with its adapters off.

        None where there are no adapters, or where the loss needs no reference policy.
        """
        is_needed = "kl_coef" in traits_of(self.loss).needs
        return BasePolicy(self) if self.adapters and is_needed else None

    def forward(self, microbatch: Microbatch) -> LossOutput:
        """Return the undivided loss sum of a microbatch and its metrics, to be added over ranks."""
        assert self.loss is not None, "this policy was built without a loss"
        if self._context is None:
            return self._whole_documents(microbatch, self.loss)
        entropy_grad = traits_of(self.loss).entropy_grad
        rows = self._rows(microbatch)
        logps, entropy = linear_logps(*rows, entropy_grad=entropy_grad, **self._options)
        return LossOutput(*self.loss(logps, entropy, row_inputs(microbatch, self._context)))

    def _whole_documents(self, microbatch: Microbatch, loss: Loss) -> LossOutput:
        """Run the objective on chunks of documents while their logits are at hand.

        That saves a product.
        """
        inputs = row_inputs(microbatch, None)
        label_counts = microbatch.label_counts

        def loss_function(
            logps: Tensor, entropy: Tensor, first: int, last: int
        ) -> tuple[Tensor, LossOutput]:
            output = LossOutput(
                *loss(logps, entropy, inputs.of_documents(label_counts, first, last))
            )
            return output.loss, output

        loss_sum, outputs = linear_loss(
            *self._rows(microbatch),
            label_counts,
            loss_function,
            entropy_grad=traits_of(loss).entropy_grad,
            **self._options,
        )
        return LossOutput(
            loss_sum, merge(output.metrics for output in outputs), _total_not_finite(outputs)
        )

    def logps(self, microbatch: Microbatch) -> Tensor:  # [R * S / C] float32 nats
        """Return log-probabilities of this rank's labels at the sampling temperature.

        They are without gradients, and 0 where there is no label. Collective.
        """
        logps = self._logps(microbatch)
        self.reshard_all()
        return logps

    def reshard_all(self) -> None:
        """Free gathered weights after a forward without a backward.

        The next forward would use them as they are, even after an update.
        """
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _logps(self, microbatch: Microbatch) -> Tensor:
        row_logps, _ = linear_logps(*self._rows(microbatch), **self._options)
        logps = row_logps.new_zeros(microbatch.batch.tokens.numel())
        return logps.index_put((microbatch.label_rows,), row_logps)

    @torch.no_grad()
    def take_weights(self, other: Policy) -> None:
        """Copy the weights of another policy with the same sharding."""
        for parameter, source in zip(self.parameters(), other.parameters(), strict=True):
            if source.requires_grad:
                parameter.copy_(source)

    def full_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights by the checkpoint's names, with adapters merged in. Collective.

        Each is gathered on every rank.
        """
        state = unique_state(self.decoder)
        yield from self.adapters.merged(state, partial(_gathered, state))

    def adapter_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the adapters by their own names, each gathered on every rank. Collective."""
        state = unique_state(self.decoder)
        for adapter in self.adapters:
            for name in adapter.names:
                yield name, _gathered(state, name)

    def hidden_states(self, microbatch: Microbatch) -> Tensor:  # [R, S / C, H]
        """Return the decoder's normalised hidden states of this rank's slots."""
        batch = microbatch.batch
        return self.decoder(
            batch.tokens.view(batch.num_bins, -1),
            mask=self._mask(microbatch),
            input_pos=batch.positions.view(batch.num_bins, -1),
        )

    def _rows(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the rows with a label: hidden states, LM-head weight, labels and temperatures.

        Their shapes are [N, H], [V, H], [N] and [N].
        """
        batch, rows = microbatch.batch, microbatch.label_rows
        hidden = self.hidden_states(microbatch)
        return (
            # The other rows leave before the first product. The backward of an index would sort.
            hidden.flatten(0, 1).index_select(0, rows),
            output_weight(self.decoder),
            batch.labels[rows],
            batch.temperature[batch.document_index[rows]] * self._logit_divisor,
        )

    def _mask(self, microbatch: Microbatch) -> Any:
        """Return the mask of a decoder's layers, or masks by window where it names windows."""
        windows = getattr(self.decoder, "windows", None)
        if windows is None:
            return microbatch.mask()
        return {window: microbatch.mask(window) for window in windows}


class BasePolicy:
    """A policy with its adapters off, as a reference policy.

    Args:
        policy: has adapters.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logps(self, microbatch: Microbatch) -> Tensor:  # [R * S / C] float32 nats
        """Return what :meth:`Policy.logps` does for the base model. Collective."""
        with self._policy.adapters.disabled():
            return self._policy.logps(microbatch)


def _gathered(state: dict[str, Tensor], name: str) -> Tensor:
    value = state[name].detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _total_not_finite(outputs: list[LossOutput]) -> NotFinite | None:
    total: NotFinite | None = None
    for output in outputs:
        if output.not_finite is not None:
            total = output.not_finite if total is None else total.plus(output.not_finite)
    return total


def output_weight(decoder: Any) -> Tensor:  # [V, H]
    """Return the LM-head weight, which is the embedding's when they are tied."""
    tied = getattr(decoder.output, "tied_module", None)
    return (tied or decoder.output).weight
