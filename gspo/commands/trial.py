"""Build the parts of a run that need no weights, so that what a run refuses at once is known.

Not here: what depends on the machine, such as a GPU and the number of ranks, and data on a hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gspo.config import Settings, build, build_loss
from gspo.config.arguments import option_name_problems
from gspo.errors import InputError, exits_raise
from gspo.policy import check_decoder
from gspo.rewards.reward import parse_reward
from gspo.sampling.fingerprint import check_tokenizer

_LOCAL_READERS = ("jsonl_prompts", "parquet_prompts")


def problems_of_parts(cfg: Settings, *, with_files: bool = True) -> list[InputError]:
    """Build a run's parts on tensors without values, and read its files but for the weights.

    Args:
        cfg: The settings, right by themselves.
        with_files: Read tokenizer, checkpointer's folder and local prompts too, and build a model
            that is made from files.

    Returns:
        All that the run would refuse.
    """
    trials = [_try_loss, _try_optimizer, _try_rewards]
    if with_files or "path" not in cfg.model:  # a model of transformers is built from its folder
        trials.insert(1, _try_model)
    if with_files:
        trials += [_try_checkpointers, _try_prompts]
    problems: list[InputError] = []
    for trial in trials:
        for build_part in trial(cfg):
            try:
                build_part()
            except InputError as error:
                problems.append(error)
    return problems


Parts = Iterator[Callable[[], Any]]


def _try_loss(cfg: Settings) -> Parts:
    yield partial(build_loss, cfg)


def _try_model(cfg: Settings) -> Parts:
    def build_model() -> None:
        with torch.device("meta"):
            decoder = build(cfg, "model")
        check_decoder(decoder, cfg)  # with its checkpoint too, if that is there already

    yield build_model


def _try_optimizer(cfg: Settings) -> Parts:
    def build_both() -> None:
        parameter = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = build(cfg, "optimizer", [parameter])
        build(cfg, "lr_scheduler", optimizer, num_training_steps=cfg.num_steps)

    yield build_both


def _try_rewards(cfg: Settings) -> Parts:
    for name, entry in cfg.rewards.items():
        if list(option_name_problems({name: entry})):
            continue  # reported already; no function takes such an option
        yield partial(_import_reward, name, entry)


def _import_reward(name: str, entry: dict[str, Any]) -> None:
    """Import a reward, as a worker does, where it would end the command without a word."""
    with exits_raise():
        parse_reward(name, entry)


def _try_checkpointers(cfg: Settings) -> Parts:
    for key in ("checkpointer", "reference_checkpointer"):
        yield partial(_build_checkpointer, cfg, key)


def _build_checkpointer(cfg: Settings, key: str) -> None:
    """Build a checkpointer, which reads no weights yet, and remove the folder that it makes."""
    component = getattr(cfg, key) or {}
    if component.get("checkpoint_files", "default") in ([], None):
        must = "names no file of weights"
        raise InputError(f"{key}.checkpoint_files", [], must, "name those in checkpoint_dir")
    folder = Path(str(component.get("output_dir", cfg.output_dir)))
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        build(cfg, key)
    finally:
        for path in absent:
            with contextlib.suppress(OSError, ValueError):  # it was not made, or cannot be
                path.rmdir()


def _try_prompts(cfg: Settings) -> Parts:
    tokenizer: list[Any] = []
    yield lambda: tokenizer.append(build(cfg, "tokenizer"))
    encoder = tokenizer[0] if tokenizer else None  # built by now, or refused
    if encoder is not None:
        yield lambda: check_tokenizer(encoder)
        yield lambda: build(cfg, "segments", encoder)
    if _is_local(cfg.prompts):
        yield lambda: build(cfg, "prompts", encoder, seed=cfg.seed, rank=0, world_size=1)
    if _is_local(cfg.eval_prompts):
        options = {"shuffle": False, "num_epochs": 1, "rank": 0, "world_size": 1}
        yield lambda: build(cfg, "eval_prompts", encoder, **options)


def _is_local(component: dict[str, Any] | None) -> bool:
    """Whether prompts are read from a file: a dataset on a hub would be fetched."""
    reader = (component or {}).get("_component_", "")
    package, _, name = reader.rpartition(".")
    return package.startswith("gspo.data") and name in _LOCAL_READERS
