"""Reinforcement-learning fine-tuning with a sequence- or token-level policy objective.

One optimizer step, as ``train`` goes through it: every rank draws microbatches (``_rollouts``)
until the documents of all ranks are ``docs_per_step``; log-probabilities that need a model are
filled in (``_prepare``); the backwards run under the totals of the whole step, and the weights move
(``_update``); every ``sync_every_steps`` the sampler gets them (``_sync_sampler``). One path serves
1..N devices.

To change it: ``tune cp gspo_full_finetune my_recipe.py``. Every config key is a field of
``gspo.config.Settings``, with its meaning and range; a copy adds its own by subclassing that.

Not here: the files of a run (``gspo.run``), the parts of an optimizer step (``gspo.update``).
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torchdata.nodes import BaseNode
from torchtune import config, training, utils

from gspo import evaluation, parallel, update
from gspo.adapters import build_replica, starting_adapters
from gspo.compat import patch_stochastic_rounding
from gspo.config import Settings, build, build_loss, parse, refusals
from gspo.data import (
    Advantage,
    FetchSteps,
    Pack,
    Record,
    Sample,
    Score,
    Segment,
    ShareOverContext,
    StepBatches,
    prefetched,
)
from gspo.diagnosis import Advisor, UpdateAudit, log_document_weights
from gspo.metrics import Metrics, StepMetrics, Time, batch_metrics
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy, check_decoder
from gspo.rewards.pool import RewardPool
from gspo.run import Progress, RunFolder, TrainState, build_profiler
from gspo.sampling.fingerprint import check_tokenizer, check_vocabulary, tokenizer_fingerprint
from gspo.types import PackedBatch, Prompt, SamplingParams

log = utils.get_logger("INFO")


class GSPOFullFinetuneRecipe:
    """Trains all weights of a policy or its adapters; the module tells the loop."""

    def __init__(self, cfg: Settings) -> None:
        self._cfg = cfg
        self._device = parallel.find_device(cfg.device)
        with refusals("dtype", "use fp32"):
            self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        parallel.prepare_device(self._device)
        parallel.init_process_group(self._device, cfg.collective_timeout)
        self._ranks = parallel.Ranks.of(
            self._device,
            replicate=cfg.data_parallel_replicate_size,
            context=cfg.context_parallel_size,
            timeout=cfg.collective_timeout,
        )
        training.set_seed(cfg.seed)
        self._params = SamplingParams(**cfg.sampling.model_dump())
        self._state = TrainState()
        self._run = RunFolder(cfg, self._ranks, self._state)

    def setup(self) -> None:
        """Build everything that the loop uses, in the order in which a mistake is cheapest."""
        cfg, ranks = self._cfg, self._ranks
        self._tokenizer = build(cfg, "tokenizer")
        check_tokenizer(self._tokenizer)
        self._checkpointer = build(cfg, "checkpointer")
        self._pool = RewardPool(cfg.rewards, **cfg.reward_pool.model_dump())
        prompts = self._build_prompts()
        loss = build_loss(cfg)
        log_document_weights(loss)
        self._policy = self._build_policy("checkpointer", self._checkpointer, loss)
        self._sampled = None
        self._reference: Any = self._policy.base
        if cfg.reference_checkpointer is not None:
            checkpointer = build(cfg, "reference_checkpointer")
            self._reference = self._build_policy("reference_checkpointer", checkpointer)
        if cfg.keeps_sampled_weights:  # optimizer steps move on from the weights that sampled
            self._sampled = self._build_policy("checkpointer", self._checkpointer)
        patch_stochastic_rounding()
        self._optimizer = build(cfg, "optimizer", self._policy.trained_parameters())
        self._audit = UpdateAudit(self._policy.parameters())
        self._advisor = Advisor(loss, warns=ranks.is_first)
        self._lr_scheduler = build(
            cfg, "lr_scheduler", self._optimizer, num_training_steps=cfg.num_steps
        )

        replica = partial(build_replica, self._build_decoder, self._device)
        self._sampler = build(cfg, "sampler", replica, self._tokenizer)
        self._sampler.update(self._policy, self._state.version)
        rollouts = self._rollouts(prompts) if ranks.draws else None
        shared = ShareOverContext(rollouts, ranks.context)
        self._steps = FetchSteps(
            shared,
            docs_per_step=cfg.docs_per_step,
            context_size=ranks.context.size,
            empty_shape=cfg.empty_shape,
        )
        self._profiler = build_profiler(cfg.profiler)
        self._run.open()  # last: a run that is refused leaves earlier files as they are
        self._progress = Progress(cfg.num_steps, self._policy, self._device, shown=ranks.is_first)

    def _rollouts(self, prompts: BaseNode[Prompt]) -> BaseNode[PackedBatch]:
        """Prompts in, microbatches out: put a node of your own between any two of these."""
        cfg = self._cfg
        node: BaseNode[Any] = Sample(
            prompts,
            self._sampler,
            prompts_per_rollout=cfg.prompts_per_rollout // self._ranks.num_data_ranks,
            group_size=cfg.group_size,
            params=self._params,
            max_tokens=cfg.packing.longest_document,
            tokenizer=tokenizer_fingerprint(self._tokenizer),
            seed=cfg.seed,
            **self._ranks.data_share,
        )
        node = Score(node, self._pool)
        with refusals("advantages"):
            advantages = cfg.advantages.model_dump()
            node = Advantage(node, on_quarantine=self._run.write_quarantined, **advantages)
        if cfg.segments is not None:
            node = Segment(node, build(cfg, "segments", self._tokenizer))
        node = Record(node, self._run.write_completions, num_per_rollout=cfg.log_completions)
        with refusals("packing"):
            max_seq_len = self._policy.decoder.max_seq_len
            node = Pack(node, max_seq_len=max_seq_len, **cfg.pack_options)
        return prefetched(node, cfg.prefetch) if cfg.prefetch else node

    def _build_prompts(self) -> BaseNode[Prompt]:
        """Build this rank's prompts to train on, and read those to evaluate on."""
        cfg, ranks = self._cfg, self._ranks
        cfg.check_data_ranks(ranks.num_data_ranks)
        held_out = build(
            cfg, "eval_prompts", self._tokenizer, shuffle=False, num_epochs=1, **ranks.share
        )
        self._held_out = [] if held_out is None else list(held_out)
        return build(cfg, "prompts", self._tokenizer, seed=cfg.seed, **ranks.data_share)

    def _build_decoder(self) -> Any:
        with training.set_default_dtype(self._dtype), torch.device("meta"):
            return build(self._cfg, "model")

    def _build_policy(self, key: str, checkpointer: Any, loss: Any = None) -> Policy:
        """Build a sharded policy from a checkpoint; without a loss it is only evaluated."""
        cfg = self._cfg
        decoder = self._build_decoder()
        check_decoder(decoder, cfg, key)
        check_vocabulary(self._tokenizer, decoder.tok_embeddings.num_embeddings)
        with refusals(key, "correct the path, or get the model first"):
            checkpoint = checkpointer.load_checkpoint()
        weights = checkpoint[training.MODEL_KEY]
        if key == "checkpointer":
            weights |= starting_adapters(cfg.adapter_path, decoder, checkpointer)
        options = PolicyOptions(**cfg.policy_options)
        return build_policy(
            decoder, weights, loss, ranks=self._ranks, device=self._device, options=options, key=key
        )

    def train(self) -> None:
        """Run the loop to ``num_steps`` optimizer steps, or until the prompts end."""
        cfg, state = self._cfg, self._state
        held_out = self._evaluate()
        self._run.log(held_out)  # as step 0
        with self._progress, self._profiler:
            self._progress.show(held_out)
            while state.step < cfg.num_steps:
                began = time.perf_counter()
                step = next(self._steps, None)
                if step is None:
                    log.info("The prompts have ended after step %d.", state.step)
                    break
                waited = time.perf_counter() - began
                stats: list[Metrics] = [{"time/data_wait": Time(waited)}]
                if self._ranks.draws:
                    stats += step.stats
                microbatches = [self._prepare(batch) for batch in step.batches]
                num_updates = min(cfg.ppo_epochs, cfg.num_steps - state.step)
                for _ in range(num_updates):
                    values = self._update(microbatches, step, stats)
                    stats = []  # counted once, with the first update that uses them
                    self._after_step(values)
                    ess = values.get("ratio/ess", 1.0)  # the same on all ranks
                    if ess < (cfg.min_ess or 0.0):
                        self._sync_sampler()  # or the next rollout would be as far away
                        break
        self._finish()

    def _prepare(self, batch: PackedBatch) -> Microbatch:
        """Take this rank's part to the device, with log-probabilities that a model computes."""
        update.check_versions(batch, self._state.version)
        microbatch = Microbatch.prepare(batch, self._device, self._ranks.context)
        if self._cfg.old_logps == "recompute":
            self._advisor.look_for_older(batch, self._state.version)
            sampler_logps = microbatch.batch.old_logps
            policy = self._sampled or self._policy
            old_logps = policy.logps(microbatch)
            microbatch = microbatch.replace(old_logps=old_logps, sampler_logps=sampler_logps)
        if self._reference is not None:
            ref_logps = self._reference.logps(microbatch)
            microbatch = microbatch.replace(ref_logps=ref_logps)
        return microbatch

    def _update(
        self, microbatches: list[Microbatch], step: StepBatches, stats: Sequence[Metrics]
    ) -> dict[str, float]:
        """Make an optimizer step over all microbatches and return its metrics."""
        began = time.perf_counter()
        policy = self._policy
        sums = StepMetrics(stats)
        denominator = update.denominator_of(policy, step.num_documents, step.num_label_tokens)
        for output in update.accumulate_gradients(
            policy,
            microbatches,
            denominator,
            reduce_every_microbatch=self._cfg.reduce_every_microbatch,
        ):
            sums.add(output.metrics, output.not_finite)
        if self._ranks.draws:
            for batch in step.batches:
                sums.add(batch_metrics(batch, self._state.step))
        values = sums.reduce()
        if sums.has_not_finite:
            factor = update.take_out(policy, sums.not_finite, step, denominator)
            values["loss"] *= factor
            self._run.write_late(policy, microbatches, step)
        values["lr"] = float(training.get_lr(self._optimizer))  # before the schedule moves on
        if self._run.dumps_now(spoiled=sums.has_not_finite):
            self._run.dump(policy, microbatches, step, values)
        values |= self._move_weights()
        values["time/update"] = time.perf_counter() - began
        return values

    def _move_weights(self) -> dict[str, float]:
        """Clip and apply the gradients, or skip the step on all ranks alike."""
        cfg, state = self._cfg, self._state
        with self._audit:
            grad_norm = update.clip_gradients(self._policy, cfg.clip_grad_norm)
            update.seed_rounding(cfg.seed, state.step, self._ranks)
            moved = update.step_if_finite(self._optimizer, grad_norm)
        if moved and state.step == state.num_skipped:  # the first step that moves the weights
            update.check_moved_weights(self._policy, state.step + 1)
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        state.finish_step(moved, grad_norm, max_skipped=cfg.max_skipped_steps)
        audit = StepMetrics([self._audit.metrics()]).reduce()
        return {"grad_norm": grad_norm, **audit}

    def _after_step(self, values: dict[str, float]) -> None:
        """Hand the weights to the sampler, evaluate, log and save, each when its turn has come."""
        cfg, step = self._cfg, self._state.step
        last = step == cfg.num_steps
        fresh = cfg.old_logps == "sampler" and values["staleness/max"] == 0
        began = time.perf_counter()
        if last or _is_due(step, cfg.sync_every_steps):
            self._sync_sampler()
        values["time/sync"] = time.perf_counter() - began
        if last or _is_due(step, cfg.eval.every_n_steps):
            values |= self._evaluate()
        values |= self._advisor.look(values, fresh=fresh)
        values["skipped_steps"] = self._state.num_skipped
        values |= self._progress.advance(values)
        self._run.log(values)
        if _is_due(step, cfg.save_every_n_steps) and not last:
            self._save()
        self._profiler.step()

    def _sync_sampler(self) -> None:
        """Give the sampler the weights of the last step; they are version ``step``."""
        state = self._state
        if state.version != state.step:
            state.version = state.step
            self._sampler.update(self._policy, state.version)
            if self._sampled is not None:
                self._sampled.take_weights(self._policy)

    def _evaluate(self) -> dict[str, float]:
        """Return held-out metrics of the weights that the sampler holds, over all ranks."""
        cfg = self._cfg
        if cfg.eval_prompts is None:
            return {}
        metrics = evaluation.evaluate(
            self._sampler,
            self._pool,
            self._held_out,
            params=self._params,
            num_samples=cfg.eval.num_samples,
            on_greedy=self._run.write_held_out,
        )
        values = StepMetrics([metrics]).reduce()
        self._state.keep_evaluation(values)
        return values

    def _save(self) -> None:
        """Write the model in the format that it was read in, or its adapters."""
        self._run.save_model(self._checkpointer, self._policy, self._dtype)

    def _finish(self) -> None:
        """Do what a run that ended before ``num_steps`` has not done, sum up, and save."""
        if self._state.evaluated_at != self._state.step:
            self._sync_sampler()
            self._run.log(self._evaluate())
        self._run.write_summary(self._progress.seconds)
        self._save()

    def cleanup(self) -> None:
        """End worker processes, loggers and the process group."""
        self._pool.close()
        dist.destroy_process_group()


def _is_due(step: int, every: int) -> bool:
    """Whether something that is done ``every`` so many steps, 0 for never, is due after a step."""
    return every > 0 and step % every == 0


@parse(Settings)
def recipe_main(cfg: Settings) -> None:
    """Configuration comes from the YAML file, then from key=value on the command line."""
    recipe = GSPOFullFinetuneRecipe(cfg)  # makes the process group, so that one rank logs alone
    config.log_config(recipe_name="GSPOFullFinetuneRecipe", cfg=cfg.resolved())
    with recipe._run:  # says what was saved when the run is interrupted
        recipe.setup()
        recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
