"""FlexAttention's block masks and the sampler in half precision, on a GPU against the CPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gspo import parallel
from gspo.data.layout import pack_documents
from gspo.losses import GSPOLoss
from gspo.policy.attention import attend
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams
from tests import tiny_policy
from tests.policy.test_policy import assert_parts_attend_as_the_whole

pytestmark = pytest.mark.gpu

WIDTH = {"embed_dim": 64}  # four heads of 16, the smallest that FlexAttention takes


@pytest.fixture(autouse=True, scope="module")
def prepared():
    """As a run starts."""
    parallel.prepare_device(torch.device("cuda"))


def build_decoder():
    return tiny_policy.build_decoder(**WIDTH)


def weights():
    return tiny_policy.weights(**WIDTH)


class Tokenizer:
    """Ids without text."""

    stop_tokens = [0]

    def get_vocab(self):
        return {f"<{i}>": i for i in range(tiny_policy.VOCAB_SIZE)}

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def gradients(device):
    decoder = build_decoder()
    decoder.load_state_dict(weights())
    policy = Policy(decoder, GSPOLoss(clip_low=0.2, clip_high=0.2)).to(device)
    batch = pack_documents(tiny_policy.documents(), 512)
    output = policy(Microbatch.prepare(batch, torch.device(device)))
    output.loss.backward()
    grads = {name: p.grad.cpu() for name, p in policy.named_parameters()}
    metrics = {name: float(metric.value) for name, metric in output.metrics.items()}
    return output.loss.item(), metrics, grads


def test_block_mask_gives_the_gradient_of_the_dense_mask():
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, metrics, grads = gradients("cuda")
    expected_loss, expected_metrics, expected = gradients("cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-4)
    for name, want in expected.items():
        assert (grads[name] - want).norm() / want.norm() < 1e-3, name


@pytest.mark.parametrize("size", [2, 4])
def test_block_masks_of_context_ranks_attend_as_the_whole(size):
    assert_parts_attend_as_the_whole(torch.device("cuda"), size, bin_length=4096, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sampler_logps_on_cuda_are_those_of_a_full_forward(dtype):
    decoder = build_decoder().to("cuda", dtype)
    decoder.load_state_dict(weights())
    prompts = [Prompt(f"p{n}", "", list(range(1, n + 1))) for n in (1, 5, 9)]
    params = SamplingParams(temperature=0.7, max_new_tokens=20)
    groups = LocalSampler(lambda: decoder, Tokenizer()).sample(
        prompts, group_size=4, params=params, seeds=range(3)
    )
    plain = build_decoder().to("cuda", dtype)
    plain.load_state_dict(weights())
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group:
            logits = plain(torch.tensor([prompt.tokens + c.tokens], device="cuda"))[0].float()
            logps = (logits / 0.7).log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            expected = (
                logps.gather(-1, torch.tensor(c.tokens, device="cuda")[:, None]).squeeze(-1).cpu()
            )
            tolerance = 1e-4 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(torch.tensor(c.logps), expected, rtol=0, atol=tolerance)


def test_softcapped_blocks_in_checkpoints_have_the_gradient_of_plain_scores():
    """The score's own function is traced in the first forward, under the checkpoint's hooks."""
    batch = pack_documents(tiny_policy.documents(), 512)
    generator = torch.Generator().manual_seed(0)
    size = (batch.num_bins, 4, 512, 16)
    q, k, v = (torch.randn(size, generator=generator) for _ in range(3))

    def gradients_on(device, *, checkpointed):
        mask = Microbatch.prepare(batch, torch.device(device)).mask()
        inputs = [x.to(device).requires_grad_() for x in (q, k, v)]

        def layer(*tensors):
            return attend(*tensors, mask=mask, dropout_p=0.0, is_causal=False, softcap=2.0)

        for _ in range(2):  # the second time nothing is traced
            output = checkpoint(layer, *inputs, use_reentrant=False) if checkpointed else None
            output = layer(*inputs) if output is None else output
            grads = torch.autograd.grad(output.square().sum(), inputs)
        return [grad.cpu() for grad in grads]

    found = gradients_on("cuda", checkpointed=True)
    expected = gradients_on("cpu", checkpointed=False)
    for got, want in zip(found, expected, strict=True):
        assert (got - want).norm() / want.norm() < 1e-3
