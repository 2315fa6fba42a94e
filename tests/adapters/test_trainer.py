"""The trainer takes models with adapters, of both libraries."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torchtune.models.qwen2 import lora_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo import GSPOConfig, GSPOTrainer, InputError
from gspo.tiny import SHAPE
from tests.trainer import ranks

LORA = {"lora_rank": 4, "lora_alpha": 8, "apply_lora_to_mlp": True}


@pytest.fixture(autouse=True)
def alone(no_group_left):
    """No group of another test is there, and none is left."""


@pytest.fixture
def peft_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks transformers by an old name, and has remarks
        yield


def of_transformers(base, **options):
    model = AutoModelForCausalLM.from_pretrained(base / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **options
    )
    return get_peft_model(model, config)


def of_torchtune(base):
    decoder = lora_qwen2(["q_proj", "v_proj"], **SHAPE, **LORA)
    checkpointer = ranks.checkpointer_of(base)
    decoder.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
    return decoder, checkpointer


def tokens_and_logits(model):
    tokens = torch.tensor([[17, 40, 5, 99, 23]])
    with torch.no_grad():
        return model(tokens).logits


def learn(model, base, **options):
    config = GSPOConfig(**ranks.OPTIONS | {"learning_rate": 1e-2} | options)
    trainer = GSPOTrainer(model, AutoTokenizer.from_pretrained(base / "base"), config)
    for _ in range(2):
        row = trainer.train_step(ranks.questions(base)[:4], ranks.variety)
    return trainer, row


def check_saved(trainer, base, adapters, merged):
    plain = AutoModelForCausalLM.from_pretrained(base / "base")
    logits = tokens_and_logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (tokens_and_logits(plain) - logits).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(plain, adapters)
    torch.testing.assert_close(tokens_and_logits(adapted), logits, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("peft_is_quiet")
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_of_peft_is_trained_saved_and_goes_on(base, tmp_path, use_dora):
    model = of_transformers(base, use_dora=use_dora)
    options = {"loss": {"kl_coef": 0.1}}
    trainer, row = learn(model, base, **options)
    assert row["kl_ref"] > 1e-9 and row["mismatch/rms_token"] < 1e-5
    adapters = trainer.save(tmp_path / "adapters")
    merged = trainer.save(tmp_path / "merged", merged=True)
    check_saved(trainer, base, adapters, merged)
    before = trainer.evaluate(ranks.questions(base)[:8], ranks.variety)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base / "base"), adapters, is_trainable=True
    )
    continued = GSPOTrainer(again, AutoTokenizer.from_pretrained(base / "base"), trainer.config)
    assert continued.evaluate(ranks.questions(base)[:8], ranks.variety) == before


@pytest.mark.usefixtures("peft_is_quiet")
def test_a_model_of_torchtune_with_adapters_is_trained_and_saved(base, tmp_path):
    decoder, checkpointer = of_torchtune(base)
    trainer, row = learn(decoder, base)
    assert row["grad_norm"] > 0 and row["mismatch/rms_token"] < 1e-5
    adapters = trainer.save(tmp_path / "adapters", checkpointer)
    merged = trainer.save(tmp_path / "merged", checkpointer, merged=True)
    check_saved(trainer, base, adapters, merged)


@pytest.mark.usefixtures("peft_is_quiet")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: 0.1 must be 0"),
        ({"bias": "lora_only"}, "bias='lora_only'. trains parts"),
        ({"lora_bias": True}, "trains a bias of B"),
        ({"modules_to_save": ["lm_head"]}, "trains parts of the model beside"),
    ],
)
def test_adapters_that_a_policy_cannot_have_are_refused(base, options, says):
    with pytest.raises(InputError, match=says):
        learn(of_transformers(base, **options), base)
