"""The settings of a trainer, checked when they are given. Names are those of the recipe's keys."""

from __future__ import annotations

from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import Field, ValidationError
from torchtune import config

from gspo.advantages import check_group_size, get_estimator
from gspo.config import Section, refusals
from gspo.config.checks import refused_values
from gspo.config.value_types import (
    AboveZero,
    Count,
    CountOrZero,
    Must,
    OptionalCount,
    OptionalSwitch,
    Seed,
    Switch,
    Temperature,
    are_ids,
    is_above_zero_or_none,
    is_share_or_none,
    one_of,
)
from gspo.errors import NO_VALUE, InputError, did_you_mean, raise_all, require
from gspo.kernels import KERNELS
from gspo.losses.inputs import Loss, traits_of
from gspo.losses.presets import PRESETS
from gspo.types import Axis, SamplingParams

_OPTIMIZERS = ("adamw", "adamw8bit")


def _is_loss(value: Any) -> bool:
    return callable(value) and hasattr(value, "denominator")


OptionalAboveZero = Annotated[
    float | None,
    Must("a number above 0, or None", is_above_zero_or_none),
]
OptionalShare = Annotated[
    float | None,
    Must("a share above 0 and up to 1, or None", is_share_or_none),
]
Optimizer = Annotated[
    Any,
    Must(
        f"{' or '.join(_OPTIMIZERS)}, or a function that is called with (params, lr=)",
        lambda x: callable(x) or x in _OPTIMIZERS,
    ),
]
LossSetting = Annotated[
    Any,
    Must(
        "a loss, a dict of options over the preset's, or None",
        lambda x: x is None or isinstance(x, dict) or _is_loss(x),
    ),
]
StopTokens = Annotated[
    list[int] | None,
    Must("a list of token ids, or None", lambda x: x is None or are_ids(x)),
]


class GSPOConfig(Section):
    """The settings of a :class:`GSPOTrainer`.

    What a preset sets lies under the values given: ``GSPOConfig(preset="blog_gspo")`` has groups of
    4 and a learning rate of 1e-7.

    Raises:
        InputError: A name is unknown, or a value is out of range; up to eight problems at once.
    """

    preset: str = Field("gspo", description="Objective by name; `python -m gspo presets`.")
    loss: LossSetting = Field(
        None, description="A loss of gspo.losses or your own, or options over the preset's."
    )
    left_clip_range: OptionalAboveZero = Field(
        None, description="Width of the clip range below a ratio of 1; None: the preset's."
    )
    right_clip_range: OptionalAboveZero = Field(
        None, description="Width of the clip range above a ratio of 1; None: the preset's."
    )
    estimator: Any = Field(
        None, description="Advantage estimator, by name or as a function; None: the preset's."
    )
    group_size: Count = Field(8, description="Completions of each query, compared to each other.")
    learning_rate: AboveZero = Field(1e-6, description="Of the optimizer.")
    optimizer: Optimizer = Field(
        "adamw", description="adamw, adamw8bit, or a function called with (params, lr=)."
    )
    clip_grad_norm: OptionalAboveZero = Field(None, description="Largest norm of the gradient.")
    ppo_epochs: Count = Field(1, description="Optimizer steps on the completions of a train_step.")
    sync_every_steps: Count = Field(
        1, description="Optimizer steps between two updates of the old policy, which samples."
    )
    min_ess: OptionalShare = Field(
        None, description="Effective sample size that ends the ppo_epochs of a train_step early."
    )
    max_skipped_steps: CountOrZero = Field(
        10, description="Steps in a row whose gradient is not finite before training ends."
    )
    temperature: Temperature = Field(1.0, description="Divisor of the logits.")
    max_new_tokens: Count = Field(256, description="Longest completion, in tokens.")
    stop_token_ids: StopTokens = Field(
        None, description="Tokens that end a completion; None: the model's or the tokenizer's."
    )
    add_bos: Switch = Field(
        True, description="Begin a query that is a text with the tokenizer's first token, if any."
    )
    max_batch_size: Count = Field(512, description="Completions drawn at once.")
    tokens_per_microbatch: Count = Field(8192, description="Slots of a microbatch on a rank.")
    bin_length: OptionalCount = Field(
        None, description="Slots of a bin; None: chosen by device and the model's longest context."
    )
    seed: Seed = Field(0, description="Seed of the draws and of the rounding.")
    kernel: Annotated[str, one_of(*KERNELS)] = Field("auto", description="Of the loss head.")
    enable_activation_checkpointing: Switch = Field(
        False, description="Keep the input of each layer alone and compute the rest again."
    )
    compile: OptionalSwitch = Field(None, description="Compile the layers; None does on CUDA.")

    def __init__(self, **values: Any) -> None:
        preset = values.get("preset", "gspo")
        is_known = isinstance(preset, str) and preset in PRESETS
        require(is_known, "preset", preset, "is not known", did_you_mean(str(preset), PRESETS))
        if values.get("estimator") is None:
            values.pop("estimator", None)
        values = _of_preset(preset) | values
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise_all(refused_values(error, GSPOConfig))
        self._check_clip_range()
        check_group_size(get_estimator(self.estimator), self.group_size)

    def _check_clip_range(self) -> None:
        has_range = (self.left_clip_range, self.right_clip_range) != (None, None)
        must = "has a clip range of its own"
        remedy = "leave left_clip_range and right_clip_range out"
        is_at_odds = has_range and _is_loss(self.loss)
        require(not is_at_odds, "loss", type(self.loss).__name__, must, remedy)

    @property
    def params(self) -> SamplingParams:
        """How completions are drawn."""
        return SamplingParams(self.temperature, self.max_new_tokens)

    def build_loss(self) -> Loss:
        """Build the objective.

        Raises:
            InputError: It refuses an option, or needs what a trainer does not have.
        """
        if _is_loss(self.loss):
            loss = self.loss
        else:
            loss = self._build_component()
        traits = traits_of(loss)
        if "correction" in traits.needs:
            must = "is for old_logps: recompute, which a trainer does not have"
            raise InputError("loss.correction", NO_VALUE, must, "use the recipe")
        if traits.ratio_unit == Axis.SEGMENT:
            must = "has a ratio per segment, and a trainer leaves completions whole"
            raise InputError("loss", type(loss).__name__, must, "use the recipe")
        return loss

    def _build_component(self) -> Loss:
        """Build the preset's loss with the options laid over it."""
        options = dict(PRESETS[self.preset].config["loss"]) | (self.loss or {})
        clip_range = {"clip_low": self.left_clip_range, "clip_high": self.right_clip_range}
        for name, width in clip_range.items():
            if width is not None:
                options[name] = width
        if options.get("batch_size") == "${docs_per_step}":
            must = f"is needed by preset {self.preset}"
            remedy = "give loss={'batch_size': queries of a train_step times group_size}"
            raise InputError("loss.batch_size", None, must, remedy)
        keys = {"loss": options, "sampling": {"max_new_tokens": self.max_new_tokens}}
        with refusals("loss"):
            return config.instantiate(OmegaConf.create(keys).loss)

    def advantage_options(self, loss: Loss) -> dict[str, Any]:
        """Return the keyword arguments of :class:`gspo.data.Advantage`."""
        options: dict[str, Any] = dict(PRESETS[self.preset].config["advantages"])
        options["estimator"] = self.estimator
        needs = traits_of(loss).needs
        if "kl_coef" in needs or "entropy_coef" in needs:  # which a group of equal rewards feels
            options |= {"drop_dead_groups": False, "refill_dead_groups": False}
        return options


def _of_preset(name: str) -> dict[str, Any]:
    """Return what a preset sets beside its loss, by the names of a trainer's settings."""
    keys = PRESETS[name].config
    values = {"estimator": keys["advantages"]["estimator"]}
    if "group_size" in keys:
        values["group_size"] = keys["group_size"]
    if "optimizer" in keys:
        values["learning_rate"] = keys["optimizer"]["lr"]
    return values
