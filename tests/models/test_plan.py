"""The plan of a model whose tokens choose among experts."""

import pytest
import transformers
from omegaconf import OmegaConf

from gspo.commands.validate import read_checked
from gspo.errors import InputError
from gspo.plan.estimate import Planner
from gspo.plan.machine import DEFAULT_RATES, Machine
from tests.models import families
from tests.models.test_recipe import HUGGING_FACE
from tests.recipes.runs import ROOT

NUM_LAYERS = 6  # more than a plan goes through


def plan(folder, config, *more):
    """The plan of a folder that has no more than a config.json."""
    config.save_pretrained(folder)
    recipe = OmegaConf.load(ROOT / "configs" / "tiny" / "gspo.yaml")
    recipe.update(HUGGING_FACE)
    OmegaConf.save(recipe, folder / "hf.yaml")
    places = (f"base_dir={folder}", "output_dir=out", "data_dir=data")
    cfg = read_checked([str(folder / "hf.yaml"), *places, *more])
    machine = Machine(memory=2**33, ranks_per_node=8, **DEFAULT_RATES["cpu"])
    return Planner(cfg, machine).plan(2)


def config_of(kind, **options):
    return getattr(transformers, kind)(**families.SHAPE | options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_token_costs_the_experts_that_it_goes_to_and_memory_all_of_them(tmp_path, dtype):
    def found(num_experts, num_chosen):
        options = families.EXPERTS | {
            "num_experts": num_experts,
            "num_experts_per_tok": num_chosen,
            "num_hidden_layers": NUM_LAYERS,
            "head_dim": 16,
        }
        return plan(tmp_path, config_of("Qwen3MoeConfig", **options), f"dtype={dtype}")

    one, two = found(4, 1), found(4, 2)
    num_tokens = one["layout"]["slots"] * one["work"]["microbatches"]
    hidden, width = families.SHAPE["hidden_size"], families.EXPERTS["moe_intermediate_size"]
    of_an_expert = (
        2 * 3 * hidden * width
    )  # gate, up and down, a multiplication and an addition each
    more = num_tokens * NUM_LAYERS * of_an_expert
    for name, factor in {"decoder forward": 1, "decoder backward": 2}.items():
        operations = [planned["work"]["operations"][name] for planned in (one, two)]
        assert operations[1] - operations[0] == factor * more, name
    assert one["layout"]["parameters"] == two["layout"]["parameters"]
    of_experts = 4 * NUM_LAYERS * (3 * hidden * width + hidden)  # with a row of the router's
    assert found(8, 2)["layout"]["parameters"] - two["layout"]["parameters"] == of_experts


def test_a_model_that_asks_for_values_cannot_be_planned(tmp_path):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}
    with pytest.raises(InputError) as refused:
        plan(tmp_path, config_of("JetMoeConfig", **options))
    assert str(refused.value) == (
        "model: cannot be planned: it does aten._local_scalar_dense, which needs the values of "
        "tokens; measure a short run in its place"
    )
