"""Every key of a config: its meaning, unit, range and default, in this one place.

A recipe gets its config as :class:`Settings`. A copied recipe adds keys by subclassing it.
``docs/configuration.md`` is made from this file.

Components, such as ``model``, stay mappings with a ``_component_`` and its arguments: their own
signatures say what they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from gspo.advantages import check_group_size, get_estimator
from gspo.config import arguments
from gspo.config.value_types import (
    Component,
    Count,
    CountOrZero,
    Folder,
    Given,
    GroupSize,
    Must,
    OptionalComponent,
    OptionalCount,
    OptionalFolder,
    OptionalSwitch,
    ProcessCount,
    PromptCount,
    QueueLength,
    SampleCountOrZero,
    Seconds,
    Seed,
    Share,
    Switch,
    Temperature,
    Text,
    is_above_zero_or_none,
    is_share_or_none,
    one_of,
)
from gspo.config.value_types import Mapping as AnyMapping
from gspo.errors import InputError, require
from gspo.kernels import KERNELS
from gspo.rewards.reward import reward_problems


class Section(BaseModel):
    """A mapping of keys inside a config; a key that is no field is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    RETIRED: ClassVar[Mapping[str, str]] = {}  # keys of before, with what to do about them


class BaseSettings(BaseModel):
    """The base of a recipe's settings: the top level of a config.

    Keys that are no fields are variables of the user's, to which other values refer as ``${name}``;
    :func:`gspo.config.checks.check` refuses the rest.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    def problems(self) -> Iterator[InputError]:
        """Yield what does not fit together, for values that are right by themselves."""
        yield from ()

    def resolved(self) -> DictConfig:
        """Return all keys, with defaults and without interpolations, for logs and dumps."""
        return OmegaConf.create(self.model_dump())

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the settings with other values, by dotted key; their ranges are not checked."""
        values = self.resolved()
        for key, value in changes.items():
            OmegaConf.update(values, key, value, merge=False)
        plain = OmegaConf.to_container(values)
        assert isinstance(plain, dict)
        return type(self).model_validate(plain)


class Sampling(Section):
    """How completions are drawn. The trainer takes log-probabilities of the same distribution."""

    RETIRED = {
        "top_p": "leave it out: the trainer needs the full distribution",
        "top_k": "leave it out: the trainer needs the full distribution",
    }

    temperature: Temperature = Field(
        1.0, description="Divisor of the logits, in the sampler and in the trainer alike."
    )
    max_new_tokens: Count = Field(
        256, description="Longest completion, in tokens, its stop token included."
    )


class Packing(Section):
    """How documents, each a prompt with one completion, are laid out in microbatches."""

    tokens_per_microbatch: Count = Field(
        description="Slots of a microbatch on a rank, or on the ranks of its context axis."
    )
    bin_length: OptionalCount = Field(
        None,
        description="Slots of a bin. A GPU needs an int: its block masks skip other documents, and "
        "each new shape is compiled. null chooses what costs least under a CPU's dense masks.",
    )
    buffer_size: Count = Field(
        512,
        description="Documents that wait for a microbatch, without flush_every_rollout. More "
        "means fuller bins and staler documents.",
    )
    flush_every_rollout: Switch = Field(
        True, description="Empty the buffer before the next rollout is drawn."
    )
    share_prompts: Switch = Field(
        True, description="Keep one copy of a group's prompt in a bin; the gradient is the same."
    )

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document that a bin takes; its last is only ever a label."""
        return (self.bin_length or self.tokens_per_microbatch) + 1


class Advantages(Section):
    """How the rewards of a group become advantages."""

    estimator: Any = Field(
        "group_mean_std",
        description="Name of an estimator, group_mean_std, group_mean or leave_one_out, or the "
        "dotted path of a function of a group's rewards.",
    )
    drop_dead_groups: Switch = Field(
        True,
        description="Take groups of equal rewards out before the update. Their documents stay in "
        "the denominators.",
    )
    refill_dead_groups: Switch = Field(
        False,
        description="Count only documents of live groups toward docs_per_step, as DAPO does. "
        "Needs drop_dead_groups.",
    )


class RewardWorkers(Section):
    """The processes that call the rewards."""

    num_workers: ProcessCount = Field(2, description="Processes on each rank.")
    timeout: Seconds = Field(10.0, description="Seconds that one call of one reward may take.")
    on_failure: Annotated[str, one_of("zero", "error")] = Field(
        "zero", description="zero counts a failed call as 0; error ends the run at the first."
    )
    max_failure_share: Share = Field(
        0.5,
        description="Share of a reward's calls in the last three rollouts or evaluations, eight "
        "calls at least, beyond which its failures end the run; 1 never does.",
    )


class Evaluation(Section):
    """Evaluation on eval_prompts, before the first step and after the last one in any case."""

    every_n_steps: CountOrZero = Field(
        0, description="Steps between evaluations, a multiple of sync_every_steps; 0 for none."
    )
    num_samples: SampleCountOrZero = Field(
        0, description="Completions drawn for each prompt, for pass@k; 0 for greedy ones alone."
    )


class Settings(BaseSettings):
    """All keys of the recipe ``gspo_full_finetune``."""

    # What a run is
    output_dir: Folder = Field(description="Folder for all that a run writes.")
    seed: Seed = Field(description="Seed of the prompts' order, the draws and the rounding.")
    device: Text = Field(description="Type of the device: cpu or cuda.")
    dtype: Annotated[str, one_of("fp32", "bf16")] = Field(
        description="Dtype of the weights; objectives are computed in float32."
    )
    num_steps: Count = Field(description="Optimizer steps of the run.")
    preset: Annotated[str | None, Must("a name", lambda x: x is None or isinstance(x, str))] = (
        Field(
            None,
            description="Objective by name, laid under the config's own keys. `python -m gspo "
            "presets` lists them.",
        )
    )

    # Model
    model: Component = Field(description="Builder of a torchtune decoder.")
    tokenizer: Component = Field(description="torchtune tokenizer of the model.")
    checkpointer: Component = Field(
        description="torchtune checkpointer: where the weights come from, and where they go."
    )
    check_model_config: Switch = Field(
        True,
        description="Refuse a model that differs from the `config.json` in checkpoint_dir, such as "
        "in rope_base.",
    )
    reference_checkpointer: OptionalComponent = Field(
        None,
        description="Weights of the reference policy that kl_coef keeps the policy near; null is "
        "the base model where adapters are trained.",
    )
    adapter_path: OptionalFolder = Field(
        None, description="Folder of adapters, in the format of peft, to go on from."
    )
    save_merged: Switch = Field(
        False, description="Save the whole model with adapters merged in, beside the adapters."
    )

    # Data
    prompts: Annotated[Component, Given(("tokenizer", "seed", "rank", "world_size"))] = Field(
        description="Reader of the prompts to train on."
    )
    eval_prompts: Annotated[
        OptionalComponent, Given(("tokenizer", "shuffle", "rank", "world_size", "num_epochs"))
    ] = Field(None, description="Reader of the prompts to evaluate on.")
    rewards: AnyMapping = Field(
        description="Rewards by name: function (a dotted path), weight (1.0) and its own options."
    )
    reward_pool: RewardWorkers = Field(
        RewardWorkers(), description="Processes that call the rewards."
    )
    segments: Annotated[OptionalComponent, Given(("tokenizer",))] = Field(
        None, description="What cuts completions into segments with a ratio of their own."
    )

    # Sampling
    sampler: Annotated[Component, Given(("build_decoder", "tokenizer"))] = Field(
        description="What draws the completions."
    )
    sampling: Sampling = Field(description="How they are drawn.")
    group_size: GroupSize = Field(
        description="Completions of each prompt, compared with one another."
    )
    prompts_per_rollout: PromptCount = Field(
        description="Prompts of one call of the sampler, over all ranks."
    )
    prefetch: QueueLength = Field(
        0,
        description="Microbatches made ahead on a thread while the policy trains; 0 makes each "
        "when it is asked for. On a GPU it needs a sampler that runs elsewhere.",
    )
    sync_every_steps: Count = Field(
        1, description="Optimizer steps between two hand-overs of the weights to the sampler."
    )

    # Objective
    loss: Component = Field(description="Objective, a component of gspo.losses or your own.")
    advantages: Advantages = Field(Advantages(), description="How rewards become advantages.")
    old_logps: Annotated[str, one_of("sampler", "recompute")] = Field(
        "sampler",
        description="Whose log-probabilities stand in the ratio: the sampler's own, or the "
        "trainer's of the weights that sampled.",
    )
    ppo_epochs: Count = Field(1, description="Optimizer steps on the documents of one step.")
    min_ess: Annotated[
        float | None, Must("a share above 0 and up to 1, or null for no bound", is_share_or_none)
    ] = Field(
        None,
        description="Effective sample size of the ratios below which the remaining ppo_epochs are "
        "skipped, as a share.",
    )

    # Optimizer step
    optimizer: Annotated[Component, Given(("params",))] = Field(
        description="Optimizer of torch or torchao."
    )
    lr_scheduler: Annotated[OptionalComponent, Given(("optimizer", "num_training_steps"))] = Field(
        None, description="Schedule of the learning rate over num_steps."
    )
    docs_per_step: Count = Field(
        description="Documents of an optimizer step over all ranks, dropped and quarantined ones "
        "included."
    )
    packing: Packing = Field(description="Layout of the documents in microbatches.")
    clip_grad_norm: Annotated[
        float | None, Must("a number above 0, or null for no clipping", is_above_zero_or_none)
    ] = Field(None, description="Largest norm of the gradient; a larger one is scaled down to it.")
    max_skipped_steps: CountOrZero = Field(
        10, description="Steps in a row whose gradient is not finite before the run ends."
    )

    # Speed and memory
    kernel: Annotated[str, one_of(*KERNELS)] = Field(
        "auto", description="Backend of the loss head; auto chooses by device and vocabulary."
    )
    head_chunk_size: OptionalCount = Field(
        None, description="Labelled tokens whose logits are held at a time; null chooses by device."
    )
    enable_activation_checkpointing: Switch = Field(
        False, description="Keep the input of each layer alone and compute the rest again."
    )
    compile: OptionalSwitch = Field(
        None, description="Compile the decoder's layers; null does on CUDA."
    )
    fsdp_cpu_offload: Switch = Field(
        False, description="Keep weights, gradients and optimizer state in the host's memory."
    )
    fsdp_reshard_after_forward: Switch = Field(
        True, description="Free gathered weights after the forward and gather them again."
    )
    reduce_every_microbatch: Switch = Field(
        True,
        description="Reduce gradients after each microbatch. False adds up unsharded float32 "
        "gradients and reduces them once.",
    )
    data_parallel_replicate_size: Count = Field(
        1, description="Replicas of the sharded weights (HSDP)."
    )
    context_parallel_size: Count = Field(
        1, description="Ranks that share each microbatch, which is split over them."
    )

    collective_timeout: Seconds = Field(
        1800.0,
        description="Seconds that a rank waits for the others before the run ends: for the slowest "
        "sampler, or for the first rank to save.",
    )

    # What a run writes
    eval: Evaluation = Field(Evaluation(), description="Evaluation in the run.")
    save_every_n_steps: CountOrZero = Field(
        0, description="Steps between saved models; 0 saves the last one alone."
    )
    dump_every_n_steps: CountOrZero = Field(
        0, description="Steps between dumps for `python -m gspo replay`; 0 for none."
    )
    log_every_n_steps: Count = Field(
        1, description="Steps between rows for metric_logger; metrics.jsonl has every step."
    )
    log_completions: CountOrZero = Field(
        4, description="Groups of each rollout that completions.jsonl keeps."
    )
    metric_logger: OptionalComponent = Field(
        None, description="torchtune metric logger, beside metrics.jsonl."
    )
    profiler: Annotated[
        dict[str, Any] | None,
        Must("a mapping, or null", lambda x: x is None or isinstance(x, dict)),
    ] = Field(None, description="Arguments of torchtune's setup_torch_profiler.")

    @property
    def on_cuda(self) -> bool:
        """Whether the policy trains on CUDA."""
        return self.device.split(":")[0] == "cuda"

    @property
    def compiles_layers(self) -> bool:
        """Whether the decoder's layers are compiled."""
        return self.on_cuda if self.compile is None else self.compile

    @property
    def empty_shape(self) -> tuple[int, int] | None:
        """Bins, and their length, of a microbatch without a document, where all have one shape."""
        length = self.packing.bin_length
        if not self.on_cuda or length is None:
            return None
        return self.packing.tokens_per_microbatch // length, length

    @property
    def pack_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`gspo.data.Pack` that are settings."""
        return self.packing.model_dump() | {"fixed_shape": self.on_cuda}

    @property
    def keeps_sampled_weights(self) -> bool:
        """Whether old log-probabilities need weights that the policy leaves before a sync."""
        return self.old_logps == "recompute" and self.sync_every_steps > self.ppo_epochs

    @property
    def policy_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`gspo.policy.PolicyOptions`."""
        return {
            "kernel": self.kernel,
            "head_chunk_size": self.head_chunk_size,
            "activation_checkpointing": self.enable_activation_checkpointing,
            "compile_layers": self.compiles_layers,
            "reshard_after_forward": self.fsdp_reshard_after_forward,
            "cpu_offload": self.fsdp_cpu_offload,
            "adapter_seed": self.seed,
        }

    def check_data_ranks(self, num_data_ranks: int) -> None:
        """Refuse a number of prompts that the ranks cannot share.

        Raises:
            InputError: ``prompts_per_rollout`` is no multiple of the ranks that draw prompts.
        """
        require(
            self.prompts_per_rollout % num_data_ranks == 0,
            "prompts_per_rollout",
            self.prompts_per_rollout,
            f"must be a multiple of the {num_data_ranks} data-parallel ranks that share the "
            "prompts",
            "change one of them",
        )

    def problems(self) -> Iterator[InputError]:
        """Yield what does not fit together."""
        yield from super().problems()
        if self.eval.every_n_steps % self.sync_every_steps:
            yield InputError(
                "eval.every_n_steps",
                self.eval.every_n_steps,
                f"must be a multiple of sync_every_steps ({self.sync_every_steps}): evaluation "
                "uses the sampler's weights",
                f"use {_round_up(self.eval.every_n_steps, self.sync_every_steps)}",
            )
        if self.advantages.refill_dead_groups and not self.advantages.drop_dead_groups:
            yield InputError(
                "advantages.refill_dead_groups",
                True,
                "needs drop_dead_groups: true; kept groups cannot be replaced",
                "set it",
            )
        yield from self._cuda_problems()
        yield from self._estimator_problems()
        yield from reward_problems(self.rewards)
        yield from arguments.option_name_problems(self.rewards)
        yield from self._argument_problems()
        length = self.packing.bin_length or 0  # null fits bins to any size
        if length % self.context_parallel_size:
            yield InputError(
                "packing.bin_length",
                length,
                f"must be a multiple of context_parallel_size ({self.context_parallel_size}), "
                "which splits every bin",
                f"use {_round_up(length, self.context_parallel_size)}",
            )

    def _argument_problems(self) -> Iterator[InputError]:
        """Yield arguments of components that these do not check."""
        yield from arguments.sampler_problems(self.sampler)
        for key in ("checkpointer", "reference_checkpointer"):
            yield from arguments.checkpointer_problems(key, getattr(self, key))
        yield from arguments.optimizer_problems(self.optimizer)
        yield from arguments.not_finite_numbers("optimizer", self.optimizer)
        yield from arguments.not_finite_numbers("lr_scheduler", self.lr_scheduler)
        yield from arguments.warmup_problems(self.lr_scheduler)
        yield from arguments.profiler_problems(self.profiler)

    def _cuda_problems(self) -> Iterator[InputError]:
        """Yield what runs on a CPU and not, or not well, on CUDA."""
        if not self.on_cuda:
            return
        if self.packing.bin_length is None:
            tokens = self.packing.tokens_per_microbatch
            yield InputError(
                "packing.bin_length",
                None,
                "must be a number on CUDA, where attention is compiled anew for each shape",
                f"set it to {tokens}, or to a divisor of it that the model's max_seq_len takes",
            )
        if self.prefetch and self.sampler["_component_"] in arguments.LOCAL_SAMPLERS:
            yield InputError(
                "prefetch",
                self.prefetch,
                "needs a sampler that runs elsewhere: on one GPU sampling and training would take "
                "turns all the same, and hold their memory at once",
                "set it to 0",
            )

    def _estimator_problems(self) -> Iterator[InputError]:
        estimator = self.advantages.estimator
        try:
            get_estimator(estimator)
        except InputError as error:
            yield error.within("advantages")
            return
        try:
            check_group_size(estimator, self.group_size)
        except InputError as error:
            yield error


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
