"""Models of transformers as policies give the value and the gradients of the models themselves."""

import pytest

from tests.distributed.launch import once_per_world_size
from tests.models import families

CASES = [
    (world_size, name, arrangement)
    for world_size, arrangements in families.ARRANGEMENTS.items()
    for name in families.FAMILIES
    for arrangement in arrangements
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The errors of each family, found by real processes."""
    folder = tmp_path_factory.mktemp("families")
    families.write(folder)
    target = "tests.models.families:everything"
    return once_per_world_size(tmp_path_factory, target, lambda _: (folder,))


@pytest.mark.parametrize(("world_size", "name", "arrangement"), CASES)
def test_value_and_gradients_are_those_of_the_model_itself(found, world_size, name, arrangement):
    for rank in found(world_size):
        value_error, gradient_error = rank[name, arrangement]
        assert value_error < 1e-5 and gradient_error < 1e-5
