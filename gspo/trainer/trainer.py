"""The trainer: the recipe's loop as an object that is called step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torchdata.nodes import BaseNode
from torchtune import training

from gspo import evaluation, parallel, update
from gspo.adapters import PeftFormat, build_replica
from gspo.compat import patch_stochastic_rounding, with_output_dir
from gspo.data import Advantage, FetchSteps, Pack, Score, StepBatches
from gspo.data.bins import MULTIPLE
from gspo.data.sample import length_stats, prompt_seed
from gspo.decoder import unique_state
from gspo.diagnosis import Advisor, UpdateAudit
from gspo.errors import InputError, require
from gspo.losses.inputs import Loss, traits_of
from gspo.metrics import Metrics, StepMetrics, Time, batch_metrics, public
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy
from gspo.run.checkpoint import MODEL_PREFIX, on_first
from gspo.run.state import TrainState
from gspo.sampling.fingerprint import check_tokenizer, check_vocabulary
from gspo.sampling.local import LocalSampler
from gspo.trainer.models import as_tokenizer, check_model, num_embeddings, take_over
from gspo.trainer.queries import QueryReader, check_columns
from gspo.trainer.rewards import CalledRewards
from gspo.trainer.settings import GSPOConfig
from gspo.types import Group, GroupBatch, PackedBatch, Prompt


class GSPOTrainer:
    """A policy that learns from rewards, a step at a time.

    On one process it needs no launcher. Under torchrun it joins the ranks, or a process group that
    is there (with gloo for the CPU): every rank makes the same calls with the same queries, takes
    every ``world_size``-th of them, and is given the metrics of all.

    The model is the trainer's from then on: its weights are moved into shards, and it can be read
    through :meth:`save` alone.

    Args:
        model: a causal language model of transformers, or a decoder of torchtune, with its weights.
        tokenizer: of the same model, of either library.
        config: None for the defaults.

    Raises:
        InputError: The model, the tokenizer or the objective cannot be used.
    """

    def __init__(self, model: Any, tokenizer: Any, config: GSPOConfig | None = None) -> None:
        self.config = cfg = config or GSPOConfig()
        loss = cfg.build_loss()
        check_model(model)
        self.tokenizer = as_tokenizer(tokenizer, model)
        check_tokenizer(self.tokenizer)
        check_vocabulary(self.tokenizer, num_embeddings(model))
        self._queries = QueryReader(self.tokenizer, add_bos=cfg.add_bos)
        self._advantage_options = cfg.advantage_options(loss)
        self._device = parallel.find_device(next(model.parameters()).device.type)
        parallel.prepare_device(self._device)
        if not dist.is_initialized():
            parallel.init_process_group(self._device)
        self._ranks = parallel.Ranks.of(self._device)
        self.state = TrainState()
        self._num_queries = 0  # drawn so far, over all ranks
        self._build(model, loss)

    def _build(self, model: Any, loss: Loss) -> None:
        """Make the policy, its reference, the optimizer and the sampler."""
        cfg = self.config
        start = take_over(model)
        self._model_config = start.config
        self._max_seq_len = start.decoder.max_seq_len
        options = PolicyOptions(
            kernel=cfg.kernel,
            activation_checkpointing=cfg.enable_activation_checkpointing,
            compile_layers=self._on_cuda if cfg.compile is None else cfg.compile,
        )
        build = partial(
            build_policy, ranks=self._ranks, device=self._device, options=options, key="model"
        )
        self.policy: Policy = build(start.decoder, start.weights, loss)
        self._reference: Any = self.policy.base
        if self._reference is None and "kl_coef" in traits_of(loss).needs:
            self._reference = build(start.another_decoder(), start.weights, None)
        start.weights.clear()
        self.optimizer = self._build_optimizer()
        self._audit = UpdateAudit(self.policy.parameters())
        self._advisor = Advisor(loss, warns=self._ranks.is_first)
        self._sampler = LocalSampler(
            partial(build_replica, start.another_decoder, self._device),
            self.tokenizer,
            stop_token_ids=cfg.stop_token_ids,
            max_batch_size=cfg.max_batch_size,
        )
        self._sampler.update(self.policy, self.state.version)

    def _build_optimizer(self) -> Optimizer:
        cfg = self.config
        parameters = self.policy.trained_parameters()
        if callable(cfg.optimizer):
            return cfg.optimizer(parameters, lr=cfg.learning_rate)
        if cfg.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=0.0, fused=True)
        from torchao.optim import AdamW8bit

        patch_stochastic_rounding()
        return AdamW8bit(
            parameters, lr=cfg.learning_rate, weight_decay=0.0, bf16_stochastic_round=True
        )

    def train_step(
        self,
        queries: Sequence[Any],
        reward_function: Callable[..., Any],
        **columns: Sequence[Any],
    ) -> dict[str, float]:
        """Sample completions of queries, reward them, and make ``ppo_epochs`` optimizer steps.

        Args:
            queries: texts, or chats: lists of ``{"role": ..., "content": ...}``.
            reward_function: called in this process, without a time limit. Either as TRL calls one,
                ``(prompts, completions, **columns)`` to a list of numbers, or for one completion at
                a time, ``(prompt, completion, answer, metadata)`` to a number; see
                :class:`gspo.trainer.rewards.CalledRewards`.
            columns: what belongs to the queries, such as ``answer``: lists as long as ``queries``.

        Returns:
            The recipe's row of metrics: what was drawn, and the last of the updates. It is the same
            on all ranks. Queries without a group to learn from make no update.

        Raises:
            InputError: A query, a column, the reward function or what it returns cannot be used, or
                too many steps in a row had a gradient that is not finite.
        """
        require(len(queries) > 0, "queries", queries, "is empty", "give one at least")
        check_columns(columns, len(queries))
        rewards = CalledRewards(reward_function)
        drawn = self._draw(queries, columns)
        scored = self._score(drawn, rewards)
        step = self._pack(scored, num_drawn=len(queries) * self.config.group_size)
        if step is None:
            return {"step": self.state.step} | public(StepMetrics([scored.stats]).reduce())
        stats = step.stats
        microbatches = [self._prepare(batch) for batch in step.batches]
        row: dict[str, float] = {}
        for _ in range(self.config.ppo_epochs):
            values = self._update(microbatches, step, stats)
            stats = []  # counted once, with the first update that uses them
            row |= self._after_update(values)
            ess = values.get("ratio/ess", 1.0)  # the same on all ranks
            if ess < (self.config.min_ess or 0.0):
                self.sync()
                break
        return {"step": self.state.step} | public(row)

    def evaluate(
        self,
        queries: Sequence[Any],
        reward_function: Callable[..., Any],
        *,
        num_samples: int = 0,
        **columns: Sequence[Any],
    ) -> dict[str, float]:
        """Return metrics of greedy completions by the weights that the sampler has.

        These are those of the last update with ``sync_every_steps`` 1; else call :meth:`sync`
        first.

        Args:
            queries: see :meth:`train_step`.
            reward_function: see :meth:`train_step`.
            num_samples: k, completions drawn for pass@k beside the greedy one; 0 for none.
            columns: see :meth:`train_step`.
        """
        check_columns(columns, len(queries))
        metrics = evaluation.evaluate(
            self._sampler,
            CalledRewards(reward_function),
            self._read(queries, columns, "evaluation", first=0),
            params=self.config.params,
            num_samples=num_samples,
        )
        return public(StepMetrics([metrics]).reduce())

    def sync(self) -> None:
        """Give the sampler the newest weights, which then are the old policy. Collective."""
        state = self.state
        if state.version != state.step:
            state.version = state.step
            self._sampler.update(self.policy, state.version)

    def save(self, folder: str | Path, checkpointer: Any = None, *, merged: bool = False) -> Path:
        """Write a Hugging Face folder, which transformers loads. Collective.

        Of a model with adapters these are written, in the format of ``peft``.

        Args:
            folder: where to; made if it is not there.
            checkpointer: for a model of torchtune, the one that it was loaded with, which writes
                ``epoch_N`` in there, N the number of optimizer steps.
            merged: write the whole model with its adapters merged in.

        Returns:
            The folder of the model or the adapters.

        Raises:
            InputError: There is no checkpointer for a model of torchtune.
        """
        if self._model_config is None and checkpointer is None:
            must = "is needed for a model of torchtune"
            raise InputError("checkpointer", None, must, "give the one that it was loaded with")
        folder = Path(folder)
        if self.policy.adapters and not merged:
            self._write_adapters(folder, checkpointer)
        elif checkpointer is None:
            self._write_model(folder)
        else:
            writer = with_output_dir(checkpointer, folder)
            folder = folder / f"{MODEL_PREFIX}_{self.state.step}"
            weights = on_first(self.policy.full_state_dict(), self._ranks)
            if self._ranks.is_first:
                writer.save_checkpoint({training.MODEL_KEY: weights}, epoch=self.state.step)
        dist.barrier()
        return folder

    def _write_adapters(self, folder: Path, checkpointer: Any) -> None:
        policy = self.policy
        if checkpointer is None:
            checkpointer = SimpleNamespace(path=self._model_config._name_or_path)
        form = PeftFormat(policy.adapters, unique_state(policy.decoder), checkpointer)
        weights = on_first(policy.adapter_state_dict(), self._ranks)
        if self._ranks.is_first:
            form.write(folder, weights)

    def _write_model(self, folder: Path) -> None:
        from gspo.models.huggingface import write_model

        weights = on_first(self.policy.full_state_dict(), self._ranks)
        if not self._ranks.is_first:
            return
        write_model(self._model_config, weights, folder)
        generation = getattr(self.policy.decoder, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if hasattr(self.tokenizer, "inner"):
            self.tokenizer.inner.save_pretrained(folder)

    def _draw(self, queries: Sequence[Any], columns: dict[str, Sequence[Any]]) -> GroupBatch:
        """Sample this rank's share of the queries."""
        cfg = self.config
        first = self._num_queries
        numbers = self._share(len(queries), first)
        prompts = self._read(queries, columns, "query", first=first)
        self._num_queries += len(queries)
        began = time.perf_counter()
        groups: list[Group] = []
        if prompts:
            seeds = [prompt_seed(cfg.seed, number) for number in numbers]
            drawn = self._sampler.sample(
                prompts, group_size=cfg.group_size, params=cfg.params, seeds=seeds
            )
            for number, prompt, completions in zip(numbers, prompts, drawn, strict=True):
                groups.append(Group(number, prompt, completions))
        seconds = time.perf_counter() - began
        return GroupBatch(groups, {"time/sample": Time(seconds), **length_stats(groups)})

    def _read(
        self, queries: Sequence[Any], columns: dict[str, Sequence[Any]], name: str, *, first: int
    ) -> list[Prompt]:
        """Return this rank's share of the queries as prompts, numbered from ``first`` on."""
        prompts = []
        for number in self._share(len(queries), first):
            index = number - first
            row = {column: values[index] for column, values in columns.items()}
            prompt = self._queries.read(queries[index], f"{name} {number}", row)
            prompts.append(prompt)
        return prompts

    def _share(self, num_queries: int, first: int) -> list[int]:
        """Return the numbers of this rank's queries, counted over all calls."""
        ranks = self._ranks
        return list(range(first + ranks.data_rank, first + num_queries, ranks.num_data_ranks))

    def _score(self, drawn: GroupBatch, rewards: CalledRewards) -> GroupBatch:
        """Return the groups to learn from, with rewards and advantages."""
        scored = Score(_Once(drawn), rewards)
        return next(Advantage(scored, **self._advantage_options))

    def _pack(self, scored: GroupBatch, *, num_drawn: int) -> StepBatches | None:
        """Pack the groups for one optimizer step; None where no rank has any. Collective."""
        cfg = self.config
        longest = self._max_seq_len // MULTIPLE * MULTIPLE
        node = Pack(
            _Once(scored),
            tokens_per_microbatch=cfg.tokens_per_microbatch,
            bin_length=self._bin_length,
            fixed_shape=self._on_cuda,
            max_seq_len=longest,
        )
        steps = FetchSteps(node, docs_per_step=num_drawn, empty_shape=node.empty_shape)
        return next(steps, None)

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    @property
    def _bin_length(self) -> int | None:
        """The setting, or on CUDA, which compiles each shape, the longest that fits."""
        cfg = self.config
        if cfg.bin_length is not None or not self._on_cuda:
            return cfg.bin_length
        longest = min(cfg.tokens_per_microbatch, self._max_seq_len)
        num_bins = -(-cfg.tokens_per_microbatch // longest)
        while cfg.tokens_per_microbatch % num_bins:
            num_bins += 1
        return cfg.tokens_per_microbatch // num_bins

    def _prepare(self, batch: PackedBatch) -> Microbatch:
        """Take a batch to the device, with log-probabilities of the reference if there is one."""
        update.check_versions(batch, self.state.version)
        microbatch = Microbatch.prepare(batch, self._device, self._ranks.context)
        if self._reference is not None:
            ref_logps = self._reference.logps(microbatch)
            microbatch = microbatch.replace(ref_logps=ref_logps)
        return microbatch

    def _update(
        self, microbatches: list[Microbatch], step: StepBatches, stats: Sequence[Metrics]
    ) -> dict[str, float]:
        """Make an optimizer step over all microbatches and return its metrics."""
        began = time.perf_counter()
        policy = self.policy
        sums = StepMetrics(stats)
        denominator = update.denominator_of(policy, step.num_documents, step.num_label_tokens)
        for output in update.accumulate_gradients(policy, microbatches, denominator):
            sums.add(output.metrics, output.not_finite)
        for batch in step.batches:
            sums.add(batch_metrics(batch, self.state.step))
        values = sums.reduce()
        if sums.has_not_finite:
            values["loss"] *= update.take_out(policy, sums.not_finite, step, denominator)
        values["lr"] = float(training.get_lr(self.optimizer))
        values |= self._move_weights()
        values["time/update"] = time.perf_counter() - began
        return values

    def _move_weights(self) -> dict[str, float]:
        """Clip and apply the gradients, or skip the step on all ranks alike."""
        cfg, state = self.config, self.state
        devices = [self._device] if self._on_cuda else []
        with self._audit, torch.random.fork_rng(devices):  # the caller's random state is kept
            grad_norm = update.clip_gradients(self.policy, cfg.clip_grad_norm)
            update.seed_rounding(cfg.seed, state.step, self._ranks)
            moved = update.step_if_finite(self.optimizer, grad_norm)
        if moved and state.step == state.num_skipped:  # the first step that moves the weights
            update.check_moved_weights(self.policy, state.step + 1)
        state.finish_step(moved, grad_norm, max_skipped=cfg.max_skipped_steps)
        audit = StepMetrics([self._audit.metrics()]).reduce()
        return {"grad_norm": grad_norm, **audit}

    def _after_update(self, values: dict[str, float]) -> dict[str, float]:
        """Hand the weights to the sampler when its turn has come, and look at the metrics."""
        fresh = values["staleness/max"] == 0
        began = time.perf_counter()
        if self.state.step % self.config.sync_every_steps == 0:
            self.sync()
        seconds = time.perf_counter() - began
        advice = self._advisor.look(values, fresh=fresh)
        counts = {"time/sync": seconds, "skipped_steps": float(self.state.num_skipped)}
        return values | counts | advice


class _Once(BaseNode[GroupBatch]):
    """A node that yields one rollout."""

    def __init__(self, rollout: GroupBatch) -> None:
        super().__init__()
        self._waiting = [rollout]

    def next(self) -> GroupBatch:
        if not self._waiting:
            raise StopIteration
        return self._waiting.pop()

    def get_state(self) -> dict[str, Any]:
        return {}
