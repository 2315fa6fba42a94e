"""Policies with adapters give what peft gives, and peft takes what they write."""

import warnings

import pytest

from tests.adapters import cases
from tests.distributed.launch import once_per_world_size

CASES = [
    (world_size, library, name, kind, arrangement)
    for world_size, arrangements in cases.ARRANGEMENTS.items()
    for library, names in (("transformers", cases.FAMILIES), ("torchtune", cases.TORCHTUNE))
    for name in names
    for kind in cases.KINDS
    for arrangement in arrangements
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The errors of each case, found by real processes."""
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        cases.write(folder)
    return once_per_world_size(
        tmp_path_factory, "tests.adapters.cases:everything", lambda _: (folder,)
    )


@pytest.mark.parametrize(("world_size", "library", "name", "kind", "arrangement"), CASES)
def test_policy_is_the_model_of_peft(found, world_size, library, name, kind, arrangement):
    errors = found(world_size)[0][library, name, kind, arrangement]
    is_apart = library == "torchtune" and name in cases.FUSED
    assert len(errors) == (3 if is_apart else 5)
    assert max(errors.values()) < 1e-5, errors
