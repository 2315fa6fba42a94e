"""The page of all keys is the settings', and a default that stands in two places is the same."""

import inspect
from pathlib import Path

import pytest
from pydantic import BaseModel

from gspo.config import Settings
from gspo.config.reference import page
from gspo.config.settings import Advantages, Packing, RewardWorkers, Sampling, Section
from gspo.data import Advantage, Pack
from gspo.rewards.pool import RewardPool
from gspo.types import SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def sections() -> list[type[BaseModel]]:
    """The settings and the sections in them."""
    annotations = [field.annotation for field in Settings.model_fields.values()]
    return [Settings, *(a for a in annotations if inspect.isclass(a) and issubclass(a, Section))]


def fields() -> dict[str, str | None]:
    """Descriptions by class and field."""
    return {
        f"{section.__name__}.{name}": field.description
        for section in sections()
        for name, field in section.model_fields.items()
    }


def test_page_of_the_keys_is_up_to_date():
    assert PAGE.read_text() == page(), "docs/configuration.md is not that of the code: `make docs`"


def test_page_has_every_key():
    text = page()
    for section in sections():
        for name in section.model_fields:
            assert f"{name}` |" in text


@pytest.mark.parametrize("name", fields())
def test_every_field_is_described_in_a_sentence(name):
    description = fields()[name]
    assert description and description.strip() == description
    assert description.endswith(".")
    assert "\n" not in description  # it stands in a table


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_section_says_what_it_is(section):
    first_line = (section.__doc__ or "").strip().splitlines()[0]
    assert first_line.endswith(".")


@pytest.mark.parametrize(
    ("section", "component"),
    [
        (Packing, Pack),
        (Advantages, Advantage),
        (RewardWorkers, RewardPool),
        (Sampling, SamplingParams),
    ],
    ids=lambda part: part.__name__,
)
def test_defaults_are_those_of_the_component(section, component):
    parameters = inspect.signature(component).parameters
    compared = []
    for name, field in section.model_fields.items():
        assert name in parameters, f"{component.__name__} takes no {name}"
        default = parameters[name].default
        if default is inspect.Parameter.empty or field.is_required():
            continue
        assert field.default == default, name
        compared.append(name)
    assert compared
