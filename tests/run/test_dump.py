"""The file of a dumped step: every field comes back, and a bad file is one message."""

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo.data.layout import pack_documents
from gspo.errors import InputError
from gspo.metrics import Max, Mean, Min, Sum, Time
from gspo.run import dump
from gspo.run.dump import Dump, DumpedMicrobatch
from gspo.types import Axis, PackedBatch, field_specs
from tests import tiny_policy

METADATA = {
    **{"step": 7, "num_documents": 40, "num_label_tokens": 400, "seed": 3},
    **{"sampling": {}, "config": {"loss": {"a": None}}, "metrics": {}},
}


def microbatches():
    """Make one with prefixes, one without, and one of padding; the first has all fields."""
    documents = tiny_policy.documents(9)
    batches = [
        pack_documents(documents[:6], 64),
        pack_documents(documents[6:], share_prompts=False),
        pack_documents([]),
    ]
    first = batches[0]
    assert first.prefix_index is not None and batches[1].prefix_index is None
    batches[0] = replace(
        first,
        num_documents=11,  # five dropped ones
        continues=True,
        stats={
            "reward/mean": Mean(1.5, 3.0),
            "reward_failures": Sum(2.0),
            "length/max": Max(9.0),
            "shortest": Min(1.0),
            "time/sample": Time(0.5),
        },
        segment_index=torch.arange(first.tokens.numel()) // 2,
        segment_advantages=torch.randn(first.tokens.numel() // 2 + 1),
    )
    for i, batch in enumerate(batches):
        batch.ref_logps, batch.sampler_logps = (torch.randn(batch.tokens.numel()) for _ in range(2))
        batch.old_logps[:2] = torch.tensor([-torch.inf, torch.nan])
        batch.policy_version += i
    return [
        DumpedMicrobatch(i // 2, batch, torch.randn(batch.tokens.numel()))
        for i, batch in enumerate(batches)
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dumps" / "step_7.safetensors"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
    return a == b


def test_every_field_comes_back(path):
    wanted = microbatches()
    dump.write(path, Dump(wanted, METADATA))
    found = dump.read(path)
    assert found.metadata.items() >= METADATA.items()
    for one, two in zip(wanted, found.microbatches, strict=True):
        assert one.rank == two.rank and same(one.new_logps, two.new_logps)
        # What another microbatch has segments for: here one for each document.
        segments = {
            "segment_index": one.batch.document_index,
            "segment_advantages": one.batch.advantages,
        }
        absent = {
            name: value for name, value in segments.items() if getattr(one.batch, name) is None
        }
        for field in fields(PackedBatch):
            assert same(
                getattr(replace(one.batch, **absent), field.name), getattr(two.batch, field.name)
            ), field.name


def test_segments_without_advantages_get_their_documents(path):
    """Where another microbatch has some."""
    (first, second, _), draw = microbatches(), torch.Generator().manual_seed(0)
    index = 3 * second.batch.document_index + torch.randint(
        3, second.batch.tokens.shape, generator=draw
    )
    batch = replace(second.batch, segment_index=index)
    dump.write(path, Dump([first, DumpedMicrobatch(0, batch, second.new_logps)], METADATA))
    found = dump.read(path).microbatches[1].batch
    assert torch.equal(found.segment_index, index)
    labelled = batch.loss_mask
    expected = batch.advantages[batch.document_index[labelled]]
    assert (
        torch.equal(found.segment_advantages[index[labelled]], expected)
        and expected.unique().numel() > 1
    )


def test_fields_that_no_microbatch_has_are_left_out(path):
    batch = pack_documents(tiny_policy.documents(3), share_prompts=False)
    dump.write(path, Dump([DumpedMicrobatch(0, batch, batch.old_logps)] * 2, METADATA))
    assert (
        not {"ref_logps", "sampler_logps", "segment_index", "prefix_index"} & load_file(path).keys()
    )
    assert [m.batch.segment_index for m in dump.read(path).microbatches] == [None, None]


def test_numbers_are_unique_in_the_file(path):
    wanted = microbatches()
    dump.write(path, Dump(wanted, METADATA))
    found = load_file(path)
    sizes = [m.batch.label_counts.numel() for m in wanted]
    assert found["document_index"].unique().numel() <= sum(sizes) == found["advantages"].numel()
    counts = torch.bincount(found["document_index"][found["loss_mask"]], minlength=sum(sizes))
    assert torch.equal(counts, found["label_counts"])
    assert torch.equal(found["prefix_index"][-sizes[2] :], torch.arange(sum(sizes))[-sizes[2] :])
    segments = found["segment_index"][found["loss_mask"] & (found["document_index"] == sizes[0])]
    assert segments.unique().tolist() == [
        wanted[0].batch.segment_advantages.numel()
    ]  # the first of the second's
    assert found["segment_index"].max() < found["segment_advantages"].numel()


def test_every_declared_field_is_dumped(path):
    batch = microbatches()[0].batch
    dump.write(path, Dump([DumpedMicrobatch(0, batch, batch.old_logps)], METADATA))
    assert load_file(path).keys() == {*field_specs(PackedBatch), "new_logps"}
    with dump.safe_open(path, framework="pt") as file:
        (row,) = json.loads(file.metadata()[dump._KEY])["microbatches"]
    plain = {field.name for field in fields(PackedBatch)} - field_specs(PackedBatch).keys()
    assert row["fields"].keys() == plain
    assert row.keys() == {"rank", "fields", *Axis}


def test_file_is_there_whole_or_not_at_all(path, monkeypatch):
    dump.write(path, Dump(microbatches(), METADATA))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        dump.write(path, Dump(microbatches(), {"step": object()}))
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        dump.write(path, Dump(microbatches(), METADATA))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*.safetensors")] == ["step_7.safetensors"]


def truncated(path):
    path.write_bytes(path.read_bytes()[:-10])


def text(path):
    path.write_text("not a dump")


def model(path):
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})


def of_another_version(path):
    rewrite(path, {}, {"version": 1, "gspo": "0.9"})


def without_labels(path):
    rewrite(path, {"labels": None}, {})


def with_another_tensor(path):
    rewrite(path, {"weights": load_file(path)["tokens"]}, {})


def with_an_unknown_reduction(path):
    with dump.safe_open(path, framework="pt") as file:
        rows = json.loads(file.metadata()[dump._KEY])["microbatches"]
    rows[0]["fields"]["stats"]["reward/mean"][0] = "Median"
    rewrite(path, {}, {"microbatches": rows})


def shorter(path):
    rewrite(path, {"tokens": torch.zeros(3, dtype=torch.int64)}, {})


def beyond(path):
    rewrite(path, {"document_index": load_file(path)["document_index"] + 1000}, {})


def of_floats(path):
    rewrite(path, {"loss_mask": load_file(path)["loss_mask"].float()}, {})


def miscounted(path):
    rewrite(path, {"label_counts": 0 * load_file(path)["label_counts"]}, {})


def with_complex(name):
    return lambda path: rewrite(path, {name: load_file(path)[name].to(torch.complex64)}, {})


def with_fields(**changes):
    def spoil(path):
        with dump.safe_open(path, framework="pt") as file:
            rows = json.loads(file.metadata()[dump._KEY])["microbatches"]
        rows[0]["fields"] |= changes
        rewrite(path, {}, {"microbatches": rows})

    return spoil


def with_float8(path):
    logps = load_file(path)["new_logps"]
    rewrite(path, {"new_logps": logps.to(torch.float8_e4m3fn)}, {})


def with_far_segment(number):
    def spoil(path):
        index = load_file(path)["segment_index"]
        index[load_file(path)["loss_mask"].nonzero()[0]] = number
        rewrite(path, {"segment_index": index, "segment_advantages": None}, {})

    return spoil


def with_metadata(**changes):
    return lambda path: rewrite(path, {}, changes)


def of_metadata(text):
    return lambda path: save_file(load_file(path), path, {dump._KEY: text})


def rewrite(path, tensors, metadata):
    with dump.safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()[dump._KEY]) | metadata
    kept = {name: value for name, value in (load_file(path) | tensors).items() if value is not None}
    save_file(kept, path, {dump._KEY: json.dumps(found)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (truncated, "cannot be read: Error while deserializing header: "),
        (text, "cannot be read: Error while deserializing header: "),
        (
            model,
            "is not a dump of a step; give a file of a run's folder dumps, see dump_every_n_steps",
        ),
        (
            of_another_version,
            "is a dump of version 1, and this gspo reads version 2; replay it with gspo 0.9, which",
        ),
        (without_labels, "is damaged: "),
        (with_another_tensor, "is damaged: TypeError("),
        (with_an_unknown_reduction, "is damaged: KeyError('Median')"),
        (beyond, "is damaged: ValueError('document_index has a number beyond its "),
        (of_floats, "is damaged: "),
        (miscounted, "is damaged: ValueError('label_counts are not those of loss_mask')"),
        (with_metadata(num_documents="x"), "is damaged: ValueError(\"num_documents is 'x'\")"),
        (with_metadata(num_documents=10**400), "is damaged: ValueError('num_documents is 1000"),
        (
            with_metadata(metrics={"loss": []}),
            "is damaged: ValueError('the metric loss is []')",
        ),
        (with_fields(num_bins=None), "is damaged: ValueError('num_bins is None')"),
        (with_fields(num_bins=-1), "is damaged: ValueError('num_bins is -1')"),
        (with_fields(ids=[[None, 0]]), "is damaged: ValueError('ids has None, 0')"),
        (with_complex("advantages"), "is damaged: ValueError('advantages is torch.complex64')"),
        (with_complex("labels"), "is damaged: ValueError('labels is torch.complex64')"),
        (with_metadata(config=None), "is damaged: ValueError('config is None')"),
        (with_metadata(microbatches=[]), "is damaged: "),
        (of_metadata("{"), "is damaged: "),
        (of_metadata("[]"), "is damaged: "),
        (of_metadata("{}"), "is damaged: KeyError('version')"),
        (shorter, "is damaged: "),
        (with_float8, "is damaged: ValueError('new_logps is torch.float8_e4m3fn')"),
        (with_far_segment(2**33), "is damaged: ValueError('segment_index has a number beyond"),
        (with_far_segment(2**62), "is damaged: ValueError('segment_index has a number beyond"),
        (with_metadata(num_documents=-1), "is damaged: ValueError('num_documents is -1')"),
        (with_metadata(num_documents=True), "is damaged: ValueError('num_documents is True')"),
        (with_metadata(num_documents=0), "is damaged: ValueError('num_documents is 0, and the fil"),
        (
            with_metadata(num_label_tokens=2**53),
            "is damaged: ValueError('num_label_tokens is 9007199254740992')",
        ),
        (with_fields(ids=[]), "is damaged: ValueError('there are 0 ids for other documents than"),
        (
            with_fields(ids=[["a", 0]] * 7),
            "is damaged: ValueError('there are 7 ids for other documents than",
        ),
    ],
    ids=lambda value: (
        value.partition(":")[0] if isinstance(value, str) else value.__name__.strip("<>")
    ),
)
def test_bad_file_is_one_message(path, spoil, message):
    dump.write(path, Dump(microbatches(), METADATA))
    spoil(path)
    with pytest.raises(InputError) as error:
        dump.read(path)
    assert str(error.value).startswith(f"{path}: {message}")
