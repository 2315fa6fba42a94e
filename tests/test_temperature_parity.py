"""The trainer's log-probabilities are of the distribution that the in-process sampler drew from."""

from dataclasses import replace

import pytest
import torch

from gspo.data.layout import group_documents, pack_documents
from gspo.losses import GSPOLoss
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.sampling.local import LocalSampler
from gspo.types import Group, GroupBatch, Prompt, SamplingParams
from tests import tiny_policy

CPU = torch.device("cpu")


class Tokenizer:
    """What the sampler asks of one."""

    stop_tokens = [7]

    def get_vocab(self):
        return {str(i): i for i in range(tiny_policy.VOCAB_SIZE)}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def decoder():
    model = tiny_policy.build_decoder()
    model.load_state_dict(
        {k: 4 * v if v.dim() == 2 else v for k, v in tiny_policy.weights().items()}
    )
    return model


@pytest.fixture(scope="module")
def batch():
    """Completions drawn at temperature 0.7, packed several to a bin."""
    prompts = [Prompt(str(i), "", list(range(3 + i, 9 + 2 * i))) for i in range(6)]
    params = SamplingParams(temperature=0.7, max_new_tokens=24)
    answers = LocalSampler(decoder, Tokenizer()).sample(
        prompts, group_size=4, params=params, seeds=range(6)
    )
    groups = [
        Group(i, prompt, answer)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    for i, completion in enumerate(c for group in groups for c in group.completions):
        completion.advantage = (-1.0) ** i
    return pack_documents(group_documents(GroupBatch(groups)), bin_length=96)


def metric(batch, name):
    output = Policy(decoder(), GSPOLoss())(Microbatch.prepare(batch, CPU))
    return output.metrics[name].number()


def test_trainer_agrees_with_the_sampler_at_its_temperature(batch):
    assert metric(batch, "kl_new_old") <= 1e-6
    assert metric(batch, "_log_ratio_sq") ** 0.5 <= 1e-5
    assert metric(batch, "clip/any_document") == 0


def test_another_temperature_shows(batch):
    assert (
        metric(replace(batch, temperature=torch.ones_like(batch.temperature)), "kl_new_old") > 1e-2
    )


def test_temperature_is_each_documents_own(batch):
    mixed = batch.temperature.clone()
    mixed[0] = 1.0
    microbatch = Microbatch.prepare(replace(batch, temperature=mixed), CPU)
    output = Policy(decoder(), GSPOLoss())(microbatch)
    logps = Policy(decoder()).logps(microbatch)
    off = (logps - batch.old_logps).abs() > 1e-4
    assert set(batch.document_index[off].tolist()) == {0}
    assert output.metrics["kl_new_old"].value > 1e-3
