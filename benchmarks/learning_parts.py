"""Parts that ``learning.py`` compares: PPO with a value head, and a stale or noisy sampler.

PPO runs as a recipe of its own, ``tune run benchmarks/learning_parts.py``: the pack's recipe with
token-level advantages by GAE from a value of the hidden states, and the clipped surrogate of a
token's ratio. Critic and policy share the decoder and the learning rate. Its keys are the pack's:
what PPO adds are arguments of its loss.

Not here: a critic of its own, value clipping, a KL penalty in the reward, more than one rank.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gspo_full_finetune import GSPOFullFinetuneRecipe  # in recipes/, put on the path by learning.py
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchtune import training
from torchtune.modules import TransformerDecoder

from gspo.config import Settings, parse
from gspo.kernels import linear_logps
from gspo.losses import GRPOLoss
from gspo.losses.inputs import Loss, LossOutput
from gspo.metrics import Mean
from gspo.policy import Microbatch, Policy, load_weights, row_inputs, shard_policy
from gspo.sampling.local import LocalSampler
from gspo.types import Completion, PackedBatch, Prompt, SamplingParams

# At the policy's learning rate, a head without it takes 70 steps to learn the mean reward.
VALUE_GAIN = 5.0


@dataclass(frozen=True)
class Weights:
    """The weights of one version, as a sampler takes them from a policy."""

    tensors: dict[str, Tensor]
    version: int

    def full_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors."""
        yield from self.tensors.items()


class StressedSampler:
    """A :class:`LocalSampler` whose rollouts are old or whose log-probabilities err.

    Greedy decoding is left alone.

    Args:
        build_decoder: for the local sampler, as the next two.
        tokenizer: the trainer's.
        max_batch_size: completions drawn at once.
        noise: nats, std of the Gaussian that each token's log-probability is off by; fixed by the
            prompt's seed.
        rollouts_ahead: a rollout is drawn from the weights of so many rollouts before, as with
            ``prefetch``, but without a thread whose timing would decide how old it gets.
    """

    def __init__(
        self,
        build_decoder: Callable[[], TransformerDecoder],
        tokenizer: Any,
        *,
        max_batch_size: int = 512,
        noise: float = 0.0,
        rollouts_ahead: int = 0,
    ) -> None:
        self._sampler = LocalSampler(build_decoder, tokenizer, max_batch_size=max_batch_size)
        self._noise = noise
        self._held: deque[Weights] = deque(maxlen=rollouts_ahead + 1)

    def update(self, policy: Any, version: int) -> None:
        """Take the policy's weights."""
        tensors = {name: tensor.detach().clone() for name, tensor in policy.full_state_dict()}
        self._newest = Weights(tensors, version)
        self._sampler.update(self._newest, version)

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Draw completions from old weights, and add noise."""
        if params.temperature == 0:  # an evaluation, of the newest
            return self._sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)
        self._held.append(self._newest)
        oldest = self._held[0]
        self._sampler.update(oldest, oldest.version)
        groups = self._sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)
        self._sampler.update(self._newest, self._newest.version)
        if self._noise:
            for group, seed in zip(groups, seeds, strict=True):
                self._add_noise(group, seed)
        return groups

    def _add_noise(self, group: list[Completion], seed: int) -> None:
        generator = np.random.default_rng((seed, 1))  # not the stream that draws the tokens
        for completion in group:
            errors = generator.normal(scale=self._noise, size=len(completion.logps))
            completion.logps = (np.array(completion.logps) + errors).tolist()


@dataclass(kw_only=True, eq=False, repr=False)
class PPOLoss(GRPOLoss):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) of tokens with their own advantages.

    Args:
        value_coef: weight of the value head's squared error.
        gae_lambda: in [0, 1] (arXiv 1506.02438, eq. 16), at a discount of 1; 1 is the reward less
            the value.
    """

    aggregation: str = "token"
    value_coef: float = 0.1
    gae_lambda: float = 0.95


@dataclass(frozen=True, slots=True)
class ValuedMicrobatch(Microbatch):
    """A microbatch with what the value head learns."""

    returns: Tensor | None = None  # [N] of the label rows: the reward that follows


class ValuePolicy(Policy):
    """A policy with a value of the hidden state that each token is drawn from.

    It needs whole documents.
    """

    def __init__(self, decoder: TransformerDecoder, loss: Loss | None, *, kernel: str) -> None:
        super().__init__(decoder, loss, kernel=kernel)
        size = decoder.tok_embeddings.embedding_dim
        with torch.device("meta"):  # as the decoder: memory comes with its weights
            self.value_head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))

    @torch.no_grad()
    def start_values(self) -> None:
        """Make the first layer random and, for values of 0, the last one empty."""
        for parameter in self.value_head.parameters():
            parameter.to_local().zero_()
        first = self.value_head[0].weight.to_local()
        nn.init.normal_(first, std=first.shape[1] ** -0.5)

    def forward(self, microbatch: ValuedMicrobatch) -> LossOutput:
        """Return the undivided loss sum, over tokens, of surrogate and value."""
        rows = self._rows(microbatch)
        logps, entropy = linear_logps(*rows, **self._options)
        output = LossOutput(*self.loss(logps, entropy, row_inputs(microbatch, None)))
        returns = microbatch.returns
        errors = (self._read(rows[0]) - returns).square()
        spread = (returns - returns.mean()).square()
        count = torch.tensor(errors.numel())
        metrics = {
            "value/mse": Mean(errors.detach().sum(), count),
            "value/variance": Mean(spread.sum(), count),
        }
        loss = output.loss + self.loss.value_coef * errors.sum()
        return LossOutput(loss, output.metrics | metrics, output.not_finite)

    def values(self, microbatch: Microbatch) -> Tensor:  # [N] of the label rows
        """Return the values of the hidden states, without gradients."""
        values = self._values(microbatch)
        self.reshard_all()
        return values

    @torch.no_grad()
    def _values(self, microbatch: Microbatch) -> Tensor:
        return self._read(self._rows(microbatch)[0])

    def _read(self, hidden: Tensor) -> Tensor:  # [N, H] -> [N]
        return VALUE_GAIN * self.value_head(hidden).squeeze(-1).float()


def gae(
    values: Tensor,  # [N]
    rewards: Tensor,  # [N]
    document_index: Tensor,  # [N]
    *,
    gae_lambda: float,
) -> Tensor:  # [N]
    """Return advantages at a discount of 1.

    A document's tokens stand in order, and its reward comes after the last.
    """
    is_last = torch.ones_like(document_index, dtype=torch.bool)
    is_last[:-1] = document_index[1:] != document_index[:-1]
    from_the_end = (column.flip(0).tolist() for column in (values, rewards, is_last))
    advantages = []
    advantage = next_value = 0.0
    for value, reward, ends in zip(*from_the_end, strict=True):
        if ends:
            advantage, next_value = 0.0, reward
        advantage = next_value - value + gae_lambda * advantage
        next_value = value
        advantages.append(advantage)
    return torch.tensor(advantages).flip(0)


class PPORecipe(GSPOFullFinetuneRecipe):
    """The recipe with a value head.

    A microbatch holds a whole rollout, over which advantages are normalised.
    """

    def _build_policy(self, key: str, checkpointer: Any, loss: Any = None) -> ValuePolicy:
        decoder = self._build_decoder()
        policy = ValuePolicy(decoder, loss, kernel=self._cfg.kernel)
        shard_policy(policy, self._ranks.fsdp_mesh)
        register_fsdp_forward_method(policy, "_values")
        weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
        load_weights(policy, weights, self._device)
        policy.start_values()
        return policy

    def _prepare(self, batch: PackedBatch) -> ValuedMicrobatch:
        """Give each token an advantage, as a segment of its own, by the values met first."""
        plain = Microbatch.prepare(batch, self._device)
        rows = plain.label_rows
        documents = plain.batch.document_index[rows]
        rewards = plain.batch.rewards[documents]
        advantages = self._advantages(plain, rewards, documents)
        numbers = torch.arange(rows.numel())
        segment_index = torch.zeros_like(batch.document_index).index_put((rows,), numbers)
        cut = replace(batch, segment_index=segment_index, segment_advantages=advantages)
        return replace(ValuedMicrobatch.prepare(cut, self._device), returns=rewards)

    def _advantages(self, plain: Microbatch, rewards: Tensor, documents: Tensor) -> Tensor:
        """Return the label rows' advantages, normalised; all are [N]."""
        values = self._policy.values(plain)
        gae_lambda = self._policy.loss.gae_lambda
        advantages = gae(values, rewards, documents, gae_lambda=gae_lambda)
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


@parse(Settings)
def recipe_main(cfg: Settings) -> None:
    """Configuration comes from the YAML file, then from key=value on the command line."""
    recipe = PPORecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
