"""Reinforcement-learning fine-tuning of a language model with a sequence- or token-level policy objective.

The loop, top to bottom: draw microbatches until the global document count reaches ``docs_per_step``, run their
backwards under the totals of the whole step, update, and every ``sync_every_steps`` hand the weights to the sampler.
One path serves 1..N devices. Copy this file with ``tune cp gspo_full_finetune my_recipe.py`` to change it.

Not here: exact resume of an interrupted run, and samplers that live in another process.
"""

import json
import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune import config, training, utils
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from gspo import evaluation, metrics, parallel
from gspo.compat import mend_stochastic_rounding
from gspo.config.checks import check_config, keeps_sampled_weights, refusals, require
from gspo.config.command_line import parse
from gspo.data.graph import GraphOptions, build_graph
from gspo.data.pack import check_bin_length
from gspo.data.record import Record
from gspo.data.sample import check_params
from gspo.data.share import ShareOverContext
from gspo.data.steps import FetchSteps, StepBatches
from gspo.diagnosis import Advisor, UpdateAudit
from gspo.errors import InputError
from gspo.kernels import KERNELS
from gspo.losses.presets import LENGTHS, effective_weights
from gspo.parallel.context import ContextAxis
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.policy.sharding import load_weights, shard_policy
from gspo.rewards.pool import RewardPool
from gspo.run import dump
from gspo.sampling.fingerprint import tokenizer_fingerprint
from gspo.types import PackedBatch, SamplingParams
from gspo.update import accumulate_gradients

log = utils.get_logger("INFO")

REQUIRED_KEYS = (
    "output_dir", "seed", "device", "dtype", "model", "tokenizer", "checkpointer", "loss", "optimizer", "prompts",
    "rewards", "sampler", "sampling", "group_size", "prompts_per_rollout", "packing", "docs_per_step", "num_steps",
)  # fmt: skip
OPTIONAL_KEYS = {
    "preset": None,
    "reference_checkpointer": None,
    "lr_scheduler": None,
    "clip_grad_norm": None,
    "advantages": {
        "estimator": "group_mean_std",
        "drop_dead_groups": True,
        "refill_dead_groups": False,
    },
    "segments": None,
    "reward_pool": {},
    "old_logps": "sampler",
    "sync_every_steps": 1,
    "ppo_epochs": 1,
    "min_ess": None,
    "prefetch": 0,
    "eval_prompts": None,
    "eval": {"every_n_steps": 0, "num_samples": 0},
    "save_every_n_steps": 0,
    "dump_every_n_steps": 0,
    "max_skipped_steps": 10,
    "kernel": "auto",
    "head_chunk_size": None,
    "enable_activation_checkpointing": False,
    "compile": False,
    "fsdp_cpu_offload": False,
    "fsdp_reshard_after_forward": True,
    "reduce_every_microbatch": True,
    "data_parallel_replicate_size": 1,
    "context_parallel_size": 1,
    "metric_logger": None,
    "log_every_n_steps": 1,
    "log_completions": 4,
    "profiler": None,
}
SECTIONS = {
    "sampling": SamplingParams,
    "packing": (
        "tokens_per_microbatch",
        "bin_length",
        "buffer_size",
        "flush_every_rollout",
        "share_prompts",
    ),
    "reward_pool": RewardPool,
}
PASSED = {  # arguments that the recipe gives to a component itself
    "prompts": ("tokenizer", "seed", "rank", "world_size"),
    "eval_prompts": ("tokenizer", "shuffle", "rank", "world_size", "num_epochs"),
    "reward_pool": ("rewards",),
    "sampler": ("model", "tokenizer"),
    "segments": ("tokenizer",),
    "optimizer": ("params",),
    "lr_scheduler": ("optimizer", "num_training_steps"),
}
COMPONENTS = (
    "model", "tokenizer", "checkpointer", "loss", "optimizer", "prompts", "sampler", "reference_checkpointer",
    "lr_scheduler", "segments", "eval_prompts", "metric_logger",
)  # fmt: skip
_GET_MODEL = "correct the path, or get the model first: the head of a copy made with `tune cp` has the commands"
REMEDIES = {
    "tokenizer": _GET_MODEL,
    "checkpointer": _GET_MODEL,
    "reference_checkpointer": _GET_MODEL,
}
MOST_SPOILED_DUMPS = (
    10  # of steps with a document that is not finite: a run of them must not fill the disk
)
AT_LEAST_1 = (
    "docs_per_step", "num_steps", "group_size", "prompts_per_rollout", "sync_every_steps", "ppo_epochs",
    "data_parallel_replicate_size", "context_parallel_size", "log_every_n_steps", "packing.tokens_per_microbatch",
)  # fmt: skip
AT_LEAST_0 = (
    "prefetch", "save_every_n_steps", "dump_every_n_steps", "max_skipped_steps", "log_completions", "seed",
    "eval.every_n_steps", "eval.num_samples",
)  # fmt: skip
SWITCHES = (
    "enable_activation_checkpointing", "compile", "fsdp_cpu_offload", "fsdp_reshard_after_forward",
    "reduce_every_microbatch", "advantages.drop_dead_groups", "advantages.refill_dead_groups",
)  # fmt: skip
VALUES = (  # keys, what fits, and that in words
    (AT_LEAST_1, lambda x: type(x) is int and x >= 1, "a whole number of 1 or more"),
    (AT_LEAST_0, lambda x: type(x) is int and x >= 0, "a whole number of 0 or more"),
    (
        ("packing.bin_length", "packing.buffer_size", "head_chunk_size"),
        lambda x: x is None or (type(x) is int and x >= 1),
        "a whole number of 1 or more, or left out",
    ),
    (
        ("packing.flush_every_rollout", "packing.share_prompts"),
        lambda x: x is None or type(x) is bool,
        "true or false, or left out",
    ),
    (SWITCHES, lambda x: type(x) is bool, "true or false"),
    (("kernel",), lambda x: x in KERNELS, f"one of {', '.join(KERNELS)}"),
    (
        ("min_ess",),
        lambda x: x is None or (type(x) in (int, float) and 0 < x <= 1),
        "a share above 0 and up to 1, or null for no bound",
    ),
    (("old_logps",), lambda x: x in ("sampler", "recompute"), "sampler or recompute"),
    (("dtype",), lambda x: x in ("fp32", "bf16"), "fp32 or bf16"),
    (
        ("clip_grad_norm",),
        lambda x: x is None or (type(x) in (int, float) and x > 0),
        "a number above 0, or null for no clipping",
    ),
)


class GSPOFullFinetuneRecipe:
    """Trains all weights of a policy; see the module for the loop and the config for every knob."""

    def __init__(self, cfg: DictConfig) -> None:
        self._check_values(cfg)
        self._cfg = cfg
        self._output_dir = Path(cfg.output_dir)
        self._metrics_file = self._output_dir / "metrics.jsonl"
        self._dumps = self._output_dir / "dumps"
        self._device = parallel.find_device(cfg.device)
        with refusals("dtype", "use fp32"):
            self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        parallel.init_process_group(self._device)
        self._rank = dist.get_rank()
        suffix = f"_rank{self._rank}" if self._rank else ""
        self._completions_file = self._output_dir / f"completions{suffix}.jsonl"
        self._quarantine_file = self._output_dir / f"quarantine_rank{self._rank}.jsonl"
        self._mesh = parallel.build_mesh(
            self._device,
            data_parallel_replicate_size=cfg.data_parallel_replicate_size,
            context_parallel_size=cfg.context_parallel_size,
        )
        self._context = ContextAxis.of(self._mesh)
        self._draws = (
            self._context.rank == 0
        )  # rollouts; the other ranks of its context axis train on the same
        training.set_seed(cfg.seed)
        self._step = 0  # optimizer steps done
        self._version = 0  # of the weights; the sampler's lags behind by at most sync_every_steps
        self._skipped_in_a_row = 0
        self._num_skipped = 0
        self._num_spoiled_dumps = 0
        self._quarantined: set[tuple[int, int]] = (
            set()
        )  # microbatch and document, of the step's batches
        self._held_out: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._last_evaluation = -1
        self._told_of_older = False

    @staticmethod
    def _check_values(cfg: DictConfig) -> None:
        for key in COMPONENTS:
            value = cfg[key]
            named = value is None or (isinstance(value, DictConfig) and "_component_" in value)
            require(
                named,
                key,
                value,
                "must be a mapping with a _component_",
                f"write {key}._component_={value}",
            )
        for keys, fits, must in VALUES:
            for key in keys:
                value = OmegaConf.select(cfg, key)
                require(fits(value), key, value, f"must be {must}", "change it")
        check_params(SamplingParams(**cfg.sampling))
        every = cfg.eval.every_n_steps
        require(
            every % cfg.sync_every_steps == 0, "eval.every_n_steps", every,
            f"must be a multiple of sync_every_steps ({cfg.sync_every_steps}): evaluation uses the sampler's weights",
            f"use {math.ceil(every / cfg.sync_every_steps) * cfg.sync_every_steps}",
        )  # fmt: skip
        penalized = cfg.loss.get("kl_coef", 0) > 0 or cfg.loss.get("entropy_coef", 0) > 0
        drops = cfg.advantages.drop_dead_groups and not cfg.advantages.refill_dead_groups
        require(
            not (penalized and drops), "advantages.drop_dead_groups", True,
            "must be false where the loss has a KL or entropy term, which a group of equal rewards feels too",
            "set it to false, or set refill_dead_groups: true to replace such groups",
        )  # fmt: skip
        correction = cfg.loss.get("correction")
        require(
            correction is None or cfg.old_logps == "recompute", "loss.correction", correction,
            "needs old_logps: recompute, since the sampler's own already stand in the ratio", "set that, or drop it",
        )  # fmt: skip
        length = cfg.packing.get("bin_length") or 0  # null fits bins to any size
        require(
            length % cfg.context_parallel_size == 0, "packing.bin_length", length,
            f"must be a multiple of context_parallel_size ({cfg.context_parallel_size}), which splits every bin",
            f"use {math.ceil(length / cfg.context_parallel_size) * cfg.context_parallel_size}",
        )  # fmt: skip
        needs_reference = cfg.loss.get("kl_coef", 0) > 0 and cfg.reference_checkpointer is None
        require(
            not needs_reference, "loss.kl_coef", cfg.loss.get("kl_coef", 0), "needs a reference policy",
            "set reference_checkpointer to the model to stay near, e.g. reference_checkpointer='${checkpointer}'",
        )  # fmt: skip

    def setup(self) -> None:
        """Builds everything that the loop uses, in the order in which a mistake is cheapest to find."""
        cfg = self._cfg
        with refusals("output_dir", "choose a folder that can be written"):
            self._output_dir.mkdir(parents=True, exist_ok=True)
        self._tokenizer = self._component("tokenizer")
        self._checkpointer = self._component("checkpointer")
        self._pool = RewardPool(
            OmegaConf.to_container(cfg.rewards, resolve=True), **cfg.reward_pool
        )
        self._params = SamplingParams(**cfg.sampling)
        data_rank, data_size = parallel.data_parallel_rank(self._mesh)
        require(
            cfg.prompts_per_rollout % data_size == 0, "prompts_per_rollout", cfg.prompts_per_rollout,
            f"must be a multiple of the {data_size} data-parallel ranks that share the prompts", "change one of them",
        )  # fmt: skip
        prompts = self._component(
            "prompts", self._tokenizer, seed=cfg.seed, rank=data_rank, world_size=data_size
        )
        self._eval_prompts = self._take_eval_prompts()

        loss = self._component("loss")
        require(
            getattr(loss, "ratio_level", "") != "segment" or cfg.segments is not None, "segments", None,
            f"leaves completions whole, and {type(loss).__name__} has a ratio per segment",
            "cut them, e.g. with segments._component_=gspo.data.segments.AtDelimiter, or name gspo.losses.GSPOLoss",
        )  # fmt: skip
        if self._rank == 0:
            lengths = ", ".join(map(str, LENGTHS))
            try:
                weights = ", ".join(f"{weight:.3g}" for weight in effective_weights(loss))
                log.info("In a step of documents of %s tokens, each weighs %s.", lengths, weights)
            except (
                Exception
            ) as error:  # a loss of the user's, which may need more than it is given here
                log.info("What documents of %s tokens weigh could not be found: %r", lengths, error)
        self._policy = self._build_policy("checkpointer", self._checkpointer, loss=loss)
        self._reference = None
        if cfg.reference_checkpointer is not None:
            key = "reference_checkpointer"
            self._reference = self._build_policy(key, self._component(key), loss=None)
        self._sampled = (
            None  # the policy as the sampler has it, where optimizer steps move on from that
        )
        if keeps_sampled_weights(cfg):
            self._sampled = self._build_policy("checkpointer", self._checkpointer, loss=None)
        mend_stochastic_rounding()
        self._optimizer = self._component("optimizer", self._policy.parameters())
        self._audit = UpdateAudit(self._policy.parameters())
        self._advisor = Advisor(
            has_band=any(getattr(loss, key, 1) is not None for key in ("clip_low", "clip_high"))
        )
        self._lr_scheduler = None
        if cfg.lr_scheduler is not None:
            self._lr_scheduler = self._component(
                "lr_scheduler", self._optimizer, num_training_steps=cfg.num_steps
            )

        self._sampler = self._component("sampler", self._build_decoder(), self._tokenizer)
        self._sampler.update(self._policy, self._version)
        self._steps = FetchSteps(
            ShareOverContext(
                self._build_graph(prompts, data_rank, data_size) if self._draws else None,
                self._context,
            ),
            docs_per_step=cfg.docs_per_step,
            device=self._device,
            context_size=self._context.size,
        )
        self._num_parameters = sum(p.numel() for p in self._policy.parameters())
        self._profiler, _ = self._setup_profiler()
        self._metric_logger = None
        if self._rank == 0 and cfg.metric_logger is not None:
            self._metric_logger = self._component("metric_logger")
            self._metric_logger.log_config(cfg)
        self._open_files()  # last: a run that is refused leaves those of an earlier one as they are

    def _build_graph(self, prompts: Any, data_rank: int, data_size: int) -> Any:
        """The nodes from prompts to microbatches of this data-parallel rank."""
        cfg = self._cfg
        return build_graph(
            prompts,
            sampler=self._sampler,
            pool=self._pool,
            options=GraphOptions(
                prompts_per_rollout=cfg.prompts_per_rollout // data_size,
                group_size=cfg.group_size,
                params=self._params,
                seed=cfg.seed,
                prefetch=cfg.prefetch,
                max_seq_len=self._policy.decoder.max_seq_len,
                **cfg.packing,
                **cfg.advantages,
            ),
            rank=data_rank,
            world_size=data_size,
            tokenizer=tokenizer_fingerprint(self._tokenizer),
            on_quarantine=self._write_quarantined,
            splitter=None if cfg.segments is None else self._component("segments", self._tokenizer),
            record=partial(
                Record,
                path=self._completions_file,
                num_per_rollout=cfg.log_completions,
            ),
        )

    def _open_files(self) -> None:
        with refusals("output_dir", "choose a folder that can be written"):
            metrics.set_aside(self._completions_file)
            metrics.set_aside(self._quarantine_file)
            if self._rank == 0:
                metrics.set_aside(self._metrics_file)
                metrics.set_aside(self._dumps)
                self._metrics_file.touch()

    def _component(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """The component that the config names at ``key``; what it refuses is shown as the user's input."""
        with refusals(key, REMEDIES.get(key, "correct its arguments")):
            return config.instantiate(self._cfg[key], *args, **kwargs)

    def _build_decoder(self, device: torch.device | None = None) -> TransformerDecoder:
        with training.set_default_dtype(self._dtype), device or self._device:
            return self._component("model")

    def _build_policy(self, key: str, checkpointer: Any, loss: nn.Module | None) -> Policy:
        cfg = self._cfg
        decoder = self._build_decoder(torch.device("meta"))
        check_bin_length(cfg.packing.get("bin_length"), decoder.max_seq_len)
        with refusals(key, REMEDIES[key]):
            weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
        policy = Policy(
            decoder, loss, chunk_size=cfg.head_chunk_size, kernel=cfg.kernel, context=self._context
        )
        policy.requires_grad_(loss is not None)
        shard_policy(
            policy,
            parallel.fsdp_mesh(self._mesh),
            activation_checkpointing=cfg.enable_activation_checkpointing and loss is not None,
            compile_layers=cfg.compile,
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        load_weights(policy, weights, self._device, cpu_offload=cfg.fsdp_cpu_offload)
        return policy

    def _take_eval_prompts(self) -> list:
        if self._cfg.eval_prompts is None:
            return []
        options = {
            "shuffle": False,
            "rank": self._rank,
            "world_size": dist.get_world_size(),
            "num_epochs": 1,
        }
        return list(self._component("eval_prompts", self._tokenizer, **options))

    def _setup_profiler(self) -> tuple[Any, Any]:
        default = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}
        given = (
            OmegaConf.to_container(self._cfg.profiler, resolve=True) if self._cfg.profiler else {}
        )
        return config.instantiate(OmegaConf.create(default | given))

    def train(self) -> None:
        """Runs the loop to ``num_steps`` optimizer steps, or until the prompts end."""
        cfg = self._cfg
        started = time.perf_counter()
        self._held_out_before = self._evaluate()
        self._write(self._held_out_before)  # as step 0
        self._logged_at = time.perf_counter()
        self._bar = tqdm(
            total=cfg.num_steps, disable=self._rank != 0, desc="steps", dynamic_ncols=True
        )
        with self._profiler:
            while self._step < cfg.num_steps:
                begin = time.perf_counter()
                step = next(self._steps, None)
                if step is None:
                    if self._rank == 0:
                        log.info(
                            "The prompts have ended after %d of %d steps.",
                            self._step,
                            cfg.num_steps,
                        )
                    break
                rollout_stats = [{"time/data_wait": (time.perf_counter() - begin, 1.0)}]
                if self._draws:
                    rollout_stats += [batch.stats for batch in step.batches]
                microbatches = [self._prepare(batch) for batch in step.batches]
                self._quarantined.clear()
                for left in reversed(range(min(cfg.ppo_epochs, cfg.num_steps - self._step))):
                    values = self._update(microbatches, step, rollout_stats)
                    rollout_stats = []  # counted once, with the first update that uses them
                    if left and values.get("ratio/ess", 1.0) < (
                        cfg.min_ess or 0.0
                    ):  # the same on all ranks
                        self._sync_sampler()  # or the next rollout would be as far away
                        break
        self._bar.close()
        self._finish(time.perf_counter() - started)

    def _prepare(self, batch: PackedBatch) -> Microbatch:
        microbatch = Microbatch.prepare(batch, self._device, self._context)
        if self._cfg.old_logps == "recompute":
            self._look_for_older(batch)
            microbatch.batch.sampler_logps = microbatch.batch.old_logps
            microbatch.batch.old_logps = (self._sampled or self._policy).logps(microbatch)
        if self._reference is not None:
            microbatch.batch.ref_logps = self._reference.logps(microbatch)
        return microbatch

    def _look_for_older(self, batch: PackedBatch) -> None:
        oldest = (
            int(batch.policy_version[batch.label_counts > 0].amin()) if batch.ids else self._version
        )
        if oldest < self._version and self._rank == 0 and not self._told_of_older:
            self._told_of_older = True
            log.warning(
                "old_logps: recompute takes the weights that the sampler has, of step %d, and documents came from "
                "those of step %d. What lies between is in mismatch/*, and in no ratio: set loss.correction to weigh "
                "it, or sync when a rollout is used up (sync_every_steps) and do without prefetch.",
                self._version,
                oldest,
            )

    def _update(
        self, microbatches: list[Microbatch], step: StepBatches, stats: list[dict]
    ) -> dict[str, float]:
        """One optimizer step over all microbatches, under the totals of the whole step; its metrics."""
        begin = time.perf_counter()
        sums = metrics.StepMetrics(reward.name for reward in self._pool.rewards)
        denominator = self._denominator(step.num_documents, step.num_label_tokens)
        for pairs in accumulate_gradients(
            self._policy,
            microbatches,
            denominator,
            reduce_every_microbatch=self._cfg.reduce_every_microbatch,
        ):
            sums.add(pairs)
        if self._draws:
            for batch in step.batches:
                sums.add(metrics.batch_pairs(batch, self._step))
        for pairs in stats:
            sums.add(pairs)
        values = sums.reduce(self._device)
        if values.get("_late_documents"):
            self._quarantine(microbatches, values, step, denominator)
        values["lr"] = float(
            training.get_lr(self._optimizer)
        )  # of this step: the schedule moves on with it
        every = self._cfg.dump_every_n_steps
        spoiled = (
            bool(values.get("_late_documents")) and self._num_spoiled_dumps < MOST_SPOILED_DUMPS
        )
        if spoiled or (every and (self._step + 1) % every == 0):
            self._num_spoiled_dumps += spoiled
            self._dump(microbatches, step, values)
        self._audit.begin()
        values["grad_norm"] = self._optimizer_step()
        changed, looked_at = parallel.sum_over_ranks(self._audit.end(), self._device)
        values["update/changed_fraction"] = changed / looked_at
        values["time/update"] = time.perf_counter() - begin
        self._after_step(values)
        return values

    def _denominator(self, num_documents: int, num_label_tokens: int) -> float:
        return max(
            self._policy.loss.denominator(num_documents, num_label_tokens), 1.0
        )  # 0 when nothing is left

    def _optimizer_step(self) -> float:
        """Clips and applies the gradients; skips the update, on all ranks alike, if their norm is not finite."""
        max_norm = self._cfg.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters(), max_norm)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(grad_norm):
            # Stochastic rounding draws from this seed: replicas of a shard must round alike, shards each by themselves.
            shards = self._mesh["shard"].size() * self._context.size
            torch.manual_seed(self._cfg.seed + self._step * shards + self._rank % shards)
            self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            self._skip_step(grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self._step += 1
        return grad_norm

    def _skip_step(self, grad_norm: float) -> None:
        self._num_skipped += 1
        self._skipped_in_a_row += 1
        log.warning("Step %d is skipped: its gradient norm is %s.", self._step, grad_norm)
        if self._skipped_in_a_row > self._cfg.max_skipped_steps:
            raise InputError(
                f"{self._skipped_in_a_row} steps in a row had a gradient norm that is not finite ({grad_norm}); "
                "max_skipped_steps allows no more. Lower optimizer.lr, set clip_grad_norm, or look into the quarantine "
                f"files in {self._output_dir} for the documents that cause it."
            )

    def _quarantine(
        self,
        microbatches: list[Microbatch],
        values: dict[str, float],
        step: StepBatches,
        denominator: float,
    ) -> None:
        """Takes documents found not finite in the forward out of the denominator, and writes down which they are."""
        remaining = self._denominator(
            int(step.num_documents - values["_late_documents"]),
            int(step.num_label_tokens - values["_late_tokens"]),
        )
        factor = denominator / remaining  # every objective is linear in 1 / denominator
        training.scale_grads(self._policy, torch.tensor(factor, device=self._device))
        values["loss"] *= factor
        for i, microbatch in enumerate(microbatches):
            logps = microbatch.shard.collect(self._policy.logps(microbatch), self._context)
            whole = microbatch.whole(self._context)
            found = metrics.not_finite_documents(whole, logps.cpu()) if self._draws else {}
            for document, record in found.items():
                if (
                    i,
                    document,
                ) not in self._quarantined:  # else an earlier one of ppo_epochs has written it
                    self._quarantined.add((i, document))
                    self._write_quarantined({"step": self._step} | record)

    def _dump(
        self, microbatches: list[Microbatch], step: StepBatches, values: dict[str, float]
    ) -> None:
        """Writes all that the step's objective saw, with its log-probabilities, before the weights change."""
        found = dump.collect(self._policy, microbatches, self._context)
        if self._rank != 0:
            return
        metadata = {
            "step": self._step + 1,  # as in metrics.jsonl
            "num_documents": step.num_documents,
            "num_label_tokens": step.num_label_tokens,
            "sampling": asdict(self._params),
            "seed": self._cfg.seed,
            "config": OmegaConf.to_container(self._cfg, resolve=True),
            "metrics": metrics.public(values),
        }
        with refusals("output_dir", "choose a folder that can be written and has space"):
            dump.write(
                self._dumps / f"step_{self._step + 1}.safetensors", dump.Dump(found, metadata)
            )

    def _write_quarantined(self, record: dict[str, Any]) -> None:
        metrics.append_jsonl(self._quarantine_file, record)

    def _after_step(self, values: dict[str, float]) -> None:
        """Hands the weights to the sampler, evaluates, logs and saves, each when its turn has come."""
        cfg = self._cfg
        fresh = values["staleness/max"] == 0
        last = self._step == cfg.num_steps
        begin = time.perf_counter()
        if last or self._step % cfg.sync_every_steps == 0:
            self._sync_sampler()
        values["time/sync"] = time.perf_counter() - begin
        if last or (cfg.eval.every_n_steps and self._step % cfg.eval.every_n_steps == 0):
            values |= self._evaluate()
        if fresh and cfg.old_logps == "sampler":
            values |= metrics.noise_floor(values)
        if self._rank == 0:
            self._advisor.look(values)
        values["skipped_steps"] = self._num_skipped
        self._log(values)
        if cfg.save_every_n_steps and self._step % cfg.save_every_n_steps == 0 and not last:
            self._save()
        self._profiler.step()

    def _sync_sampler(self) -> None:
        if self._version != self._step:
            self._version = self._step
            self._sampler.update(self._policy, self._version)
            if self._sampled is not None:
                self._sampled.take_weights(self._policy)

    def _evaluate(self) -> dict[str, float]:
        """Held-out metrics of the weights that the sampler holds, over all ranks."""
        if self._cfg.eval_prompts is None:
            return {}
        pairs = evaluation.evaluate(
            self._sampler,
            self._pool,
            self._eval_prompts,
            params=self._params,
            num_samples=self._cfg.eval.num_samples,
        )
        sums = metrics.StepMetrics()
        sums.add(pairs)
        self._held_out = sums.reduce(self._device)
        self._last_evaluation = self._step
        return self._held_out

    def _log(self, values: dict[str, float]) -> None:
        now = time.perf_counter()
        values["time/step"] = now - self._logged_at
        self._logged_at = now
        values |= metrics.throughput(values, self._num_parameters, self._device)
        self._bar.update()
        self._write(values)
        shown = {
            "reward": "reward/mean",
            "held-out": "eval/accuracy",
            "clip": "clip/any_document",
            "tok/s": "tokens_per_second",
        }
        self._seen |= self._held_out | metrics.public(
            values
        )  # what a step does not have is shown as it last was
        self._bar.set_postfix(
            {k: f"{self._seen[v]:.3g}" for k, v in shown.items() if v in self._seen}
        )

    def _write(self, values: dict[str, float]) -> None:
        """A row of ``metrics.jsonl``, and for the metric logger if its turn has come or there was an evaluation."""
        if self._rank != 0 or not values:
            return
        public = metrics.public(values)
        metrics.append_jsonl(self._metrics_file, {"step": self._step} | public)
        due = self._step % self._cfg.log_every_n_steps == 0 or "eval/reward" in public
        if self._metric_logger is not None and due:
            self._metric_logger.log_dict(public, step=self._step)

    def _save(self) -> None:
        """Writes the model through torchtune's checkpointer, in the format it was read in."""
        weights = training.gather_cpu_state_dict(
            self._policy.decoder, self._rank == 0, self._device
        )
        if self._rank == 0:
            self._checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=self._step)
            self._write_dtype()
        dist.barrier()

    def _write_dtype(self) -> None:
        """Names the weights' dtype in the saved ``config.json``, which is a copy of the base model's."""
        folder = self._cfg.checkpointer.get("output_dir", self._output_dir)
        file = Path(folder, f"epoch_{self._step}", "config.json")
        if file.exists():  # torchtune's and Meta's formats have none
            dtype = str(self._dtype).removeprefix("torch.")
            found = json.loads(file.read_text())
            file.unlink()  # it was copied with its permissions, which may forbid writing
            file.write_text(
                json.dumps(
                    found | {k: dtype for k in ("dtype", "torch_dtype") if k in found}, indent=2
                )
            )

    def _finish(self, seconds: float) -> None:
        """The last evaluation, the final model, and ``summary.json``."""
        if self._last_evaluation != self._step:  # the prompts ended before num_steps
            self._sync_sampler()
            self._write(self._evaluate())
        self._save()
        if self._rank != 0:
            return
        before, after = (
            found.get("eval/accuracy") for found in (self._held_out_before, self._held_out)
        )
        summary = {
            "accuracy_before": None if before is None else round(before, 4),
            "accuracy_after": None if after is None else round(after, 4),
            "steps": self._step,
            "seconds": round(seconds, 1),
            "seed": self._cfg.seed,
        }
        (self._output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        log.info("Done: %s", summary)

    def cleanup(self) -> None:
        """Ends worker processes and the process group."""
        self._pool.close()
        if self._metric_logger is not None:
            self._metric_logger.close()
        dist.destroy_process_group()


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Configuration comes from the YAML file, then from key=value on the command line."""
    cfg = check_config(
        cfg, required=REQUIRED_KEYS, optional=OPTIONAL_KEYS, sections=SECTIONS, passed=PASSED
    )
    recipe = GSPOFullFinetuneRecipe(
        cfg
    )  # makes the process group, without which every rank would log the config
    config.log_config(recipe_name="GSPOFullFinetuneRecipe", cfg=cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
