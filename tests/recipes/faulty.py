"""A loss and samplers with a mistake each."""

import torch

from gspo.sampling.local import LocalSampler
from tests.recipes.own_loss import OwnLoss


class SteppingLoss(OwnLoss):
    """A loss with a metric named as the number of a row."""

    def forward(self, logps, entropy, inputs):
        loss, metrics = super().forward(logps, entropy, inputs)
        return loss, metrics | {"step": metrics["own/logps"]}


class EarlySampler(LocalSampler):
    """A sampler that counts from another number."""

    def update(self, policy, version):
        super().update(policy, version + 100)


class MuteSampler(LocalSampler):
    """A sampler whose log-probabilities are missing."""

    def sample(self, prompts, **options):
        groups = super().sample(prompts, **options)
        for group in groups:
            for completion in group:
                completion.logps = [torch.nan] * len(completion.tokens)
        return groups
