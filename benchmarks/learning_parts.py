"""What ``learning.py`` compares with and under: a PPO with a value head, and a sampler that is stale or noisy.

PPO runs as a recipe of its own, ``tune run benchmarks/learning_parts.py``: the pack's recipe with token-level
advantages by GAE from a value of the hidden states, and the clipped surrogate of a token's ratio. Critic and policy
share the decoder and the learning rate.

Not here: a critic of its own, value clipping, a KL penalty in the reward, more than one rank.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gspo_full_finetune as base  # in recipes/, which `learning.py` puts on the path
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torchtune import training

from gspo import parallel
from gspo.config.checks import check_config
from gspo.config.command_line import parse
from gspo.kernels import linear_logps
from gspo.losses import GRPOLoss
from gspo.policy.microbatch import Microbatch, row_inputs
from gspo.policy.model import Policy
from gspo.policy.sharding import load_weights, shard_policy
from gspo.sampling.local import LocalSampler
from gspo.types import Completion, MetricSums, PackedBatch, Prompt, SamplingParams

VALUE_GAIN = (
    5.0  # with the policy's learning rate a head without it takes 70 steps to learn the mean reward
)


@dataclass(frozen=True)
class Weights:
    """Those of one version, as a sampler takes them from a policy."""

    tensors: dict[str, Tensor]
    version: int

    def full_state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors."""
        yield from self.tensors.items()


class StressedSampler:
    """A :class:`LocalSampler` whose rollouts are old or whose log-probabilities err; greedy decoding is left alone.

    Args:
        model: for the local sampler, as the next two.
        tokenizer: the trainer's.
        max_batch_size: completions drawn at once.
        noise: nats, std of the Gaussian that each token's log-probability is off by; fixed by the prompt's seed.
        rollouts_ahead: a rollout is drawn from the weights of so many rollouts before, as with ``prefetch``, but
            without a thread whose timing would decide how old it gets.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 512,
        noise: float = 0.0,
        rollouts_ahead: int = 0,
    ) -> None:
        self._sampler = LocalSampler(model, tokenizer, max_batch_size=max_batch_size)
        self._noise = noise
        self._held: deque[Weights] = deque(maxlen=rollouts_ahead + 1)

    def update(self, policy: Any, version: int) -> None:
        """Take the policy's weights."""
        self._newest = Weights(
            {name: tensor.detach().clone() for name, tensor in policy.full_state_dict()}, version
        )
        self._sampler.update(self._newest, version)

    def sample(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Completions of old weights, with noise."""
        if params.temperature == 0:  # an evaluation, of the newest
            return self._sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)
        self._held.append(self._newest)
        self._sampler.update(self._held[0], self._held[0].version)
        groups = self._sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)
        self._sampler.update(self._newest, self._newest.version)
        for group, seed in zip(groups, seeds, strict=True):
            noise = np.random.default_rng(
                (seed, 1)
            )  # not the stream that the tokens are drawn with
            for completion in group if self._noise else ():
                errors = noise.normal(scale=self._noise, size=len(completion.logps))
                completion.logps = (np.array(completion.logps) + errors).tolist()
        return groups


@dataclass(kw_only=True, eq=False, repr=False)
class PPOLoss(GRPOLoss):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) of tokens with their own advantages.

    Args:
        value_coef: weight of the value head's squared error.
        gae_lambda: in [0, 1] (arXiv 1506.02438, eq. 16), at a discount of 1; 1 is the reward less the value.
    """

    aggregation: str = "token"
    value_coef: float = 0.1
    gae_lambda: float = 0.95


@dataclass(frozen=True, slots=True)
class ValuedMicrobatch(Microbatch):
    """With what the value head learns."""

    returns: Tensor | None = None  # [N] of the label rows: the reward that follows


class ValuePolicy(Policy):
    """A policy with a value of the hidden state that each token is drawn from; needs whole documents."""

    def __init__(self, decoder: Any, loss: nn.Module, *, kernel: str) -> None:
        super().__init__(decoder, loss, kernel=kernel)
        size = decoder.tok_embeddings.embedding_dim
        with torch.device("meta"):  # as the decoder: memory comes with its weights
            self.value_head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))

    @torch.no_grad()
    def start_values(self) -> None:
        """A random first layer and, for values of 0, an empty last one."""
        for parameter in self.value_head.parameters():
            parameter.to_local().zero_()
        first = self.value_head[0].weight.to_local()
        nn.init.normal_(first, std=first.shape[1] ** -0.5)

    def forward(self, microbatch: ValuedMicrobatch) -> tuple[Tensor, MetricSums]:
        """The undivided loss sum, over tokens, of surrogate and value."""
        rows = self._rows(microbatch)
        logps, entropy = linear_logps(*rows, **self._options)
        loss, found = self.loss(logps, entropy, row_inputs(microbatch, None))
        errors = (self._read(rows[0]) - microbatch.returns).square()
        spread = (microbatch.returns - microbatch.returns.mean()).square()
        count = torch.tensor(errors.numel())
        found |= {
            "value/mse": (errors.detach().sum(), count),
            "value/variance": (spread.sum(), count),
        }
        return loss + self.loss.value_coef * errors.sum(), found

    def values(self, microbatch: Microbatch) -> Tensor:  # [N] of the label rows
        """Without gradients."""
        values = self._values(microbatch)
        self.reshard_all()
        return values

    @torch.no_grad()
    def _values(self, microbatch: Microbatch) -> Tensor:
        return self._read(self._rows(microbatch)[0])

    def _read(self, hidden: Tensor) -> Tensor:  # [N, H] -> [N]
        return VALUE_GAIN * self.value_head(hidden).squeeze(-1).float()


def gae(
    values: Tensor, rewards: Tensor, document_index: Tensor, *, gae_lambda: float
) -> Tensor:  # all [N]
    """Advantages at a discount of 1; a document's tokens stand in order and its reward comes after the last."""
    last = torch.ones_like(document_index, dtype=torch.bool)
    last[:-1] = document_index[1:] != document_index[:-1]
    advantages, running, following = [], 0.0, 0.0
    for value, reward, ends in zip(
        *(x.flip(0).tolist() for x in (values, rewards, last)),
        strict=True,
    ):
        if ends:
            running, following = 0.0, reward
        running = following - value + gae_lambda * running
        following = value
        advantages.append(running)
    return torch.tensor(advantages).flip(0)


class PPORecipe(base.GSPOFullFinetuneRecipe):
    """The recipe with a value head; a microbatch holds a whole rollout, over which advantages are normalised."""

    def _build_policy(self, key: str, checkpointer: Any, loss: nn.Module) -> ValuePolicy:
        policy = ValuePolicy(
            self._build_decoder(torch.device("meta")), loss, kernel=self._cfg.kernel
        )
        shard_policy(policy, parallel.fsdp_mesh(self._mesh))
        register_fsdp_forward_method(policy, "_values")
        load_weights(policy, checkpointer.load_checkpoint()[training.MODEL_KEY], self._device)
        policy.start_values()
        return policy

    def _prepare(self, batch: PackedBatch) -> ValuedMicrobatch:
        """Advantages of the values that the batch meets first, one for each token: a segment of its own."""
        plain = Microbatch.prepare(batch, self._device)
        rows = plain.label_rows
        documents = plain.batch.document_index[rows]
        rewards = plain.batch.rewards[documents]
        values, gae_lambda = self._policy.values(plain), self._policy.loss.gae_lambda
        advantages = gae(values, rewards, documents, gae_lambda=gae_lambda)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        index = torch.zeros_like(batch.document_index).index_put(
            (rows,), torch.arange(rows.numel())
        )
        given = replace(batch, segment_index=index, segment_advantages=advantages)
        return replace(ValuedMicrobatch.prepare(given, self._device), returns=rewards)


@parse
def recipe_main(cfg: DictConfig) -> None:
    """As the pack's recipe."""
    checks = {
        "required": base.REQUIRED_KEYS,
        "optional": base.OPTIONAL_KEYS,
        "sections": base.SECTIONS,
    }
    cfg = check_config(cfg, **checks, passed=base.PASSED)
    recipe = PPORecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
