"""A run's own parts with random weights: policy, optimizer and sampler, as the recipe builds them.

Not here: prompts, rewards, files, more than one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torchtune import training
from torchtune.modules import TransformerDecoder

from gpu_first_parts.documents import Texts
from gpu_first_parts.pack_probes import read_settings
from gpu_first_parts.visit import Visit, allocated_mib, free_memory, synchronize
from gspo import parallel, update
from gspo.compat import patch_stochastic_rounding
from gspo.config import Settings, build, build_loss
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy, output_weight
from gspo.sampling.local import LocalSampler
from gspo.types import Completion, PackedBatch, Prompt, SamplingParams

# Standard deviation of the logits of random weights: log-probabilities then lie near 4 nats and
# differ as a model's do. As torchtune leaves the head, all tokens would be about equally likely.
_LOGIT_SPREAD = 4.0


class Rig:
    """A policy, its optimizer and a sampler on one device.

    Args:
        visit: The visit.
        more: key=value beyond the config's and the visit's.
    """

    def __init__(self, visit: Visit, *more: str) -> None:
        cfg = read_settings(visit, *more)
        self.visit = visit
        self.before_mib = allocated_mib(visit.device)  # what an earlier rig has left behind
        self.cfg = cfg
        self.device = visit.device
        if not dist.is_initialized():
            parallel.init_process_group(self.device, cfg.collective_timeout)
        self.ranks = parallel.Ranks.of(self.device, timeout=cfg.collective_timeout)
        training.set_seed(cfg.seed)
        self.policy = self._build_policy()
        patch_stochastic_rounding()
        self.optimizer = build(cfg, "optimizer", self.policy.parameters())
        self.num_steps = 0
        self.sampler = self.make_sampler()

    def _build_policy(self) -> Policy:
        cfg = self.cfg
        decoder = _build_decoder(cfg, torch.device("meta"))
        start = _build_decoder(cfg, self.device)
        _sharpen(start)
        weights = start.state_dict()
        options = PolicyOptions(**cfg.policy_options)
        loss = build_loss(cfg)
        return build_policy(
            decoder, weights, loss, ranks=self.ranks, device=self.device, options=options
        )

    def make_sampler(self, **options: Any) -> LocalSampler:
        """Make a sampler with a replica of its own and the policy's weights."""
        max_batch_size = self.cfg.sampler["max_batch_size"]
        sampler = LocalSampler(
            lambda: _build_decoder(self.cfg, self.device),
            Texts(),
            stop_token_ids=[],
            max_batch_size=max_batch_size,
            **options,
        )
        sampler.update(self.policy, self.num_steps)
        return sampler

    def sample(
        self, sampler: LocalSampler, prompts: list[Prompt], *, group_size: int, new_tokens: int
    ) -> list[list[Completion]]:
        """Draw completions at the config's temperature."""
        params = SamplingParams(self.cfg.sampling.temperature, new_tokens)
        seeds = range(len(prompts))
        return sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)

    def prepare(self, batches: Iterable[PackedBatch]) -> list[Microbatch]:
        """Take microbatches to the device with the policy's own log-probabilities as old ones.

        Every ratio is then 1, and every token of a document with an advantage has a gradient.
        """
        microbatches = []
        for batch in batches:
            microbatch = Microbatch.prepare(batch, self.device, self.ranks.context)
            old_logps = self.policy.logps(microbatch)
            microbatches.append(microbatch.replace(old_logps=old_logps))
        return microbatches

    def step(self, microbatches: list[Microbatch]) -> dict[str, float]:
        """Take an optimizer step, as the recipe does."""
        cfg, policy = self.cfg, self.policy
        num_documents = sum(microbatch.shard.whole.num_documents for microbatch in microbatches)
        num_tokens = sum(microbatch.shard.whole.num_label_tokens for microbatch in microbatches)
        denominator = update.denominator_of(policy, num_documents, num_tokens)
        losses = []
        for output in update.accumulate_gradients(
            policy,
            microbatches,
            denominator,
            reduce_every_microbatch=cfg.reduce_every_microbatch,
        ):
            losses.append(output.loss)
        grad_norm = update.clip_gradients(policy, cfg.clip_grad_norm)
        update.seed_rounding(cfg.seed, self.num_steps, self.ranks)
        has_moved = update.step_if_finite(self.optimizer, grad_norm)
        self.num_steps += 1
        synchronize(self.device)
        loss = float(torch.stack(losses).sum()) / denominator  # now: it waits for the device
        return {"loss": loss, "grad_norm": grad_norm, "moved": has_moved}

    def give_weights(self) -> None:
        """Give the sampler the policy's weights."""
        self.sampler.update(self.policy, self.num_steps)


def _build_decoder(cfg: Settings, device: torch.device) -> TransformerDecoder:
    with training.set_default_dtype(training.get_dtype(cfg.dtype, device=device)), device:
        return build(cfg, "model")


@torch.no_grad()
def _sharpen(decoder: TransformerDecoder) -> None:
    """Spread the logits: the head's input has a mean square of 1."""
    weight = output_weight(decoder)
    weight.normal_(std=_LOGIT_SPREAD * weight.shape[1] ** -0.5)


_rigs: list[Rig] = []


def the_rig(visit: Visit, *, compiles: bool | None = None) -> Rig:
    """Return this process's rig; one whose layers are compiled otherwise makes room for it first.

    Args:
        visit: The visit.
        compiles: The layers; None for what the config says.
    """
    for rig in _rigs:
        if compiles in (None, rig.cfg.compiles_layers):
            return rig
    _rigs.clear()
    free_memory(visit.device)
    more = () if compiles is None else (f"compile={str(compiles).lower()}",)
    _rigs.append(Rig(visit, *more))
    return _rigs[0]
