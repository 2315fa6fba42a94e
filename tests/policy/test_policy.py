"""Tests what a policy computes beside its gradients.

tests/distributed compares the gradients over all arrangements.
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import log_softmax

from gspo import parallel
from gspo.data.layout import pack_documents
from gspo.errors import InputError
from gspo.losses import GRPOLoss, GSPOLoss
from gspo.metrics import StepMetrics
from gspo.parallel.context import ContextAxis
from gspo.parallel.split import split
from gspo.policy import Microbatch, Policy, document_mask, load_weights, output_weight
from gspo.policy.attention import attend
from gspo.policy.mask import mask_mod
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.distributed.arrangements import build_policy
from tests.flex import flex_on_cpu

CPU = torch.device("cpu")
LAYOUTS = {"one_bin": 512, "long_bins": 64, "short_bins": None}
each_layout = pytest.mark.parametrize("bin_length", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    parallel.init_process_group(CPU)
    yield
    dist.destroy_process_group()


def plain_policy(loss=None):
    decoder = tiny_policy.build_decoder()
    decoder.load_state_dict(tiny_policy.weights())
    return Policy(decoder, loss)


def expected_logps(batch):
    """By a plain decoder, one document at a time, [T]."""
    decoder = tiny_policy.build_decoder()
    decoder.load_state_dict(tiny_policy.weights())
    found = torch.zeros(batch.tokens.numel())
    prefix_index = (
        torch.arange(batch.advantages.numel()) if batch.prefix_index is None else batch.prefix_index
    )
    bins = torch.arange(batch.num_bins).repeat_interleave(batch.bin_length)
    for d in range(len(batch.ids)):
        own = batch.document_index == d
        places = own | (batch.document_index == prefix_index[d])
        assert bins[places].unique().numel() == 1
        logits = decoder(batch.tokens[places][None])[0].float() / batch.temperature[d]
        logps = log_softmax(logits, -1).gather(-1, batch.labels[places, None]).squeeze(-1)
        found[own] = torch.where(batch.loss_mask[places], logps, 0.0)[own[places]]
    return found.detach()


@each_layout
def test_logps_are_those_of_each_document_alone(bin_length):
    batch = pack_documents(tiny_policy.documents(), bin_length)
    logps = plain_policy().logps(Microbatch.prepare(batch, CPU))
    assert not logps.requires_grad
    torch.testing.assert_close(logps, expected_logps(batch), rtol=1e-5, atol=1e-5)


def test_mask_is_causal_inside_each_document_and_to_its_prefix():
    batch = pack_documents(tiny_policy.documents(5), 48)
    mask = document_mask(split(batch, None), CPU)
    prefix_index = batch.prefix_index.tolist()
    assert sum(d != p for d, p in enumerate(prefix_index)) > 2
    for r, index in enumerate(batch.document_index.view(batch.num_bins, -1).tolist()):
        for q in range(48):
            seen = (index[q], prefix_index[index[q]])
            assert mask[r, q].tolist() == [k <= q and index[k] in seen for k in range(48)]


def assert_parts_attend_as_the_whole(device, size, *, bin_length=512, atol=1e-5, in_blocks=None):
    """Rows of attention of every context rank against those of one rank that holds all."""
    batch = pack_documents(tiny_policy.documents(), bin_length)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.num_bins, 4, bin_length, 16, generator=generator).to(device)
        for _ in range(3)
    )

    def at(x, places):
        return x.gather(2, places.to(device)[:, None, :, None].expand(-1, 4, -1, 16))

    options = {"dropout_p": 0.0, "is_causal": False}
    whole_mask = document_mask(split(batch, None), device, in_blocks=in_blocks)
    whole = attend(q, k, v, mask=whole_mask, **options)
    for rank in range(size):
        shard = split(batch, ContextAxis(None, rank, size))
        mine = shard.slots[rank]
        mask = document_mask(shard, device, in_blocks=in_blocks)
        found = attend(at(q, mine), at(k, shard.order), at(v, shard.order), mask=mask, **options)
        torch.testing.assert_close(found, at(whole, mine), rtol=0, atol=atol)


@pytest.mark.parametrize("size", [1, 2])
def test_block_mask_is_made_of_what_the_dense_mask_has(size):
    batch = pack_documents(tiny_policy.documents(9), 48)
    for rank in range(size):
        shard = split(batch, ContextAxis(None, rank, size))
        dense = document_mask(shard, CPU)
        found = create_mask(
            mask_mod(shard, CPU), batch.num_bins, None, 48 // size, 48, device="cpu"
        )
        assert torch.equal(found[:, 0], dense) and dense.any() and not dense.all()


@pytest.mark.parametrize("in_blocks", [False, True], ids=["dense", "blocks"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_bin_attend_as_the_whole(size, in_blocks):
    with flex_on_cpu():
        assert_parts_attend_as_the_whole(CPU, size, in_blocks=in_blocks)


@pytest.mark.parametrize(
    ("bin_length", "needed"), [(32, False), (96, True)], ids=["alone", "together"]
)
def test_mask_is_made_only_where_documents_share_a_bin(bin_length, needed):
    documents = [d for d in tiny_policy.documents(20) if d.num_slots > 16]
    assert len(documents) > 2
    microbatch = Microbatch.prepare(pack_documents(documents, bin_length), CPU)
    assert (microbatch.mask() is not None) == needed
    expected = expected_logps(microbatch.batch)
    torch.testing.assert_close(plain_policy().logps(microbatch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "compile"])
def test_padding_alone_gives_a_zero_loss_and_gradient(one_rank, kernel):
    policy = build_policy(GSPOLoss(), kernel=kernel)
    (output,) = accumulate_gradients(policy, [Microbatch.prepare(pack_documents([]), CPU)], 7.0)
    assert float(output.metrics["loss"].value) == 0
    assert float(output.metrics["kl_new_old"].weight) == 0
    assert all(p.grad.full_tensor().eq(0).all() for p in policy.parameters() if p.grad is not None)


def gradients_with_nan(kernel, spoil):
    """Return the gradients of six documents, of which the fourth has NaN, and how many left."""
    policy = build_policy(GSPOLoss(), kernel=kernel)
    batch = pack_documents(tiny_policy.documents(6), 512)
    rows = ((batch.document_index == 3) & batch.loss_mask).view(batch.num_bins, -1)
    handle = spoil(policy.decoder).register_forward_hook(
        lambda module, inputs, hidden: hidden.masked_fill(rows[..., None], torch.nan)
    )
    metrics = StepMetrics()
    for output in accumulate_gradients(policy, [Microbatch.prepare(batch, CPU)], 5.0):
        metrics.add(output.metrics, output.not_finite)
    metrics.reduce()
    handle.remove()
    named = policy.decoder.named_parameters()
    return {name: p.grad.full_tensor() for name, p in named}, metrics.not_finite.documents


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("kernel", ["reference", "compile", "triton"])
def test_nan_behind_the_decoder_takes_out_its_document_alone(one_rank, kernel):
    if kernel == "triton":
        pytest.importorskip("triton", reason="triton is there on Linux only")
    gradients, num_out = gradients_with_nan(kernel, lambda decoder: decoder.norm)
    assert num_out == 1
    policy = build_policy(GSPOLoss(), kernel="reference")
    documents = tiny_policy.documents(6)
    del documents[3]
    microbatch = Microbatch.prepare(pack_documents(documents, 512), CPU)
    list(accumulate_gradients(policy, [microbatch], 5.0))
    for name, parameter in policy.decoder.named_parameters():
        want = parameter.grad.full_tensor()
        torch.testing.assert_close(gradients[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", ["reference", "compile"])
def test_nan_inside_the_decoder_reaches_parameters(one_rank, kernel):
    gradients, num_out = gradients_with_nan(kernel, lambda decoder: decoder.layers[0])
    assert num_out == 6 and not gradients["norm.scale"].isfinite().all()
    gradients, num_out = gradients_with_nan(kernel, lambda decoder: decoder.layers[-1])
    spoiled = [name for name, grad in gradients.items() if not grad.isfinite().all()]
    assert (num_out, spoiled) == (1, ["norm.scale"])


@pytest.mark.parametrize("loss", [GSPOLoss, GRPOLoss])
@pytest.mark.parametrize("chunk_size", [None, 40, 9])
def test_chunks_of_the_head_change_neither_metrics_nor_gradient(one_rank, loss, chunk_size):
    batch = pack_documents(tiny_policy.documents(), 64)
    batch.ref_logps = batch.old_logps - 0.1
    microbatch = Microbatch.prepare(batch, CPU)
    found = {}
    for kernel in ("reference", "compile"):
        policy = build_policy(
            loss(clip_low=0.01, clip_high=0.01, kl_coef=0.1, entropy_coef=0.05),
            kernel=kernel,
            chunk_size=chunk_size,
        )
        (output,) = accumulate_gradients(policy, [microbatch], 7.0)
        found[kernel] = (
            StepMetrics([output.metrics]).reduce(),
            [p.grad.full_tensor() for p in policy.parameters()],
        )
    (metrics, grads), (expected, expected_grads) = found["compile"], found["reference"]
    assert (
        metrics.keys() == expected.keys()
        and {"kl_ref", "entropy", "ratio/max", "clip/low"} <= metrics.keys()
    )
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name
    for grad, want in zip(grads, expected_grads, strict=True):
        assert (grad - want).norm() <= 1e-5 * want.norm()


def test_a_bf16_policy_is_as_near_to_float32_as_with_the_reference(one_rank):
    microbatch = Microbatch.prepare(pack_documents(tiny_policy.documents(), 64), CPU)

    def gradient(dtype, kernel):
        policy = build_policy(
            GSPOLoss(clip_low=0.2, clip_high=0.2), kernel=kernel, chunk_size=40, dtype=dtype
        )
        list(accumulate_gradients(policy, [microbatch], 7.0))
        return torch.cat([p.grad.full_tensor().double().flatten() for p in policy.parameters()])

    exact = gradient(torch.float32, "reference")
    ours, reference = (
        gradient(torch.bfloat16, kernel) - exact for kernel in ("compile", "reference")
    )
    assert 0 < ours.norm() < 1.1 * reference.norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_output_weight_is_the_heads(tied):
    decoder = tiny_policy.build_decoder(tied=tied)
    assert output_weight(decoder).shape == (tiny_policy.VOCAB_SIZE, 32)
    assert (output_weight(decoder) is decoder.tok_embeddings.weight) == tied


def test_logps_between_forward_and_update_leave_no_stale_weights(one_rank):
    microbatch = Microbatch.prepare(pack_documents(tiny_policy.documents(), 64), CPU)
    policy = build_policy(GSPOLoss())
    list(accumulate_gradients(policy, [microbatch], 3.0))
    before = policy.logps(microbatch)
    assert all(p.grad is not None for p in policy.parameters())
    torch.optim.SGD(policy.parameters(), lr=1.0).step()
    after = policy.logps(microbatch)
    fresh = plain_policy()
    fresh.decoder.load_state_dict(dict(policy.full_state_dict()))
    torch.testing.assert_close(after, fresh.logps(microbatch), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_full_state_dict_gives_torchtunes_names_with_checkpointed_layers_too(one_rank):
    policy = build_policy(GSPOLoss(), activation_checkpointing=True)
    found, want = dict(policy.full_state_dict()), tiny_policy.weights()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], value) for name, value in want.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("norm.scale"),
            "model: 'norm.scale' is [32] in the model and missing in the checkpoint; name",
        ),
        (
            lambda w: w.update(extra=torch.ones(2)),
            "model: 'extra' is missing in the model and [2] in the checkpoint;",
        ),
        (
            lambda w: w.update({"norm.scale": torch.ones(8)}),
            "model: 'norm.scale' is [32] in the model and [8] in the checkpoint;",
        ),
    ],
    ids=["missing", "unexpected", "other_shape"],
)
def test_weights_of_another_model_are_refused(one_rank, change, message):
    weights = tiny_policy.weights()
    change(weights)
    with pytest.raises(InputError) as refused:
        load_weights(build_policy(None), weights, CPU)
    assert str(refused.value).startswith(message)


def test_policy_without_a_loss_only_evaluates():
    microbatch = Microbatch.prepare(pack_documents(tiny_policy.documents(2)), CPU)
    with pytest.raises(AssertionError, match="without a loss"):
        plain_policy()(microbatch)
