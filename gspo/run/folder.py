"""The folder of a run: every file in it is named, written and set aside here.

| file | what it holds |
|---|---|
| ``metrics.jsonl`` | a row for each optimizer step, and one for the evaluation before |
| ``completions[_rankN].jsonl`` | some groups of each rollout, one row each |
| ``quarantine_rankN.jsonl`` | documents with a value that is not finite |
| ``dumps/step_N.safetensors`` | what the objective of a step saw |
| ``epoch_N/`` | the model after step N, in the format that it was read in |
| ``summary.json`` | accuracy before and after, steps, seconds, seed |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune import training, utils

from gspo.config import Settings, build, refusals
from gspo.data.steps import StepBatches
from gspo.metrics import public
from gspo.parallel.mesh import Ranks
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.run import dump
from gspo.run.state import TrainState
from gspo.update import QuarantinedDocument, find_not_finite

log = utils.get_logger("INFO")

MAX_SPOILED_DUMPS = 10  # a run of steps that are not finite must not fill the disk


class RunFolder:
    """The files that one rank writes of a run.

    Args:
        cfg: the settings.
        ranks: of the run; the first writes what is written once.
        state: of the run, which numbers what is written.

    Raises:
        InputError: The folder cannot be made.
    """

    def __init__(self, cfg: Settings, ranks: Ranks, state: TrainState) -> None:
        self._cfg = cfg
        self._ranks = ranks
        self._state = state
        self._path = Path(cfg.output_dir)
        suffix = "" if ranks.is_first else f"_rank{ranks.rank}"
        self._metrics = self._path / "metrics.jsonl"
        self._completions = self._path / f"completions{suffix}.jsonl"
        self._quarantine = self._path / f"quarantine_rank{ranks.rank}.jsonl"
        self._dumps = self._path / "dumps"
        self._logger: Any = None
        self._late_step: StepBatches | None = None  # whose late documents are in the next
        self._late: set[tuple[int, int]] = set()  # number of microbatch and document
        with refusals("output_dir", "choose a folder that can be written"):
            self._path.mkdir(parents=True, exist_ok=True)

    def open(self) -> None:
        """Set the files of an earlier run aside and open the logger.

        It is called last, so that a run that is refused leaves earlier files as they are.
        """
        with refusals("output_dir", "choose a folder that can be written"):
            set_aside(self._completions)
            set_aside(self._quarantine)
            if self._ranks.is_first:
                set_aside(self._metrics)
                set_aside(self._dumps)
                self._metrics.touch()
        if self._ranks.is_first and self._cfg.metric_logger is not None:
            self._logger = build(self._cfg, "metric_logger")
            self._logger.log_config(self._cfg.resolved())

    def log(self, values: Mapping[str, float]) -> None:
        """Write the row of the last step, and give it to the metric logger when its turn has come.

        Args:
            values: metrics; none writes no row.
        """
        if not self._ranks.is_first or not values:
            return
        step = self._state.step
        row = public(values)
        append_jsonl(self._metrics, [{"step": step} | row])
        is_due = step % self._cfg.log_every_n_steps == 0 or "eval/reward" in row
        if self._logger is not None and is_due:
            self._logger.log_dict(row, step=step)

    def write_completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to this rank's completions."""
        append_jsonl(self._completions, rows)

    def write_quarantined(self, record: Mapping[str, Any]) -> None:
        """Append a document that was quarantined before it reached a step.

        Args:
            record: of :class:`gspo.data.Advantage`.
        """
        values = {
            "advantage": repr(record["advantage"]),
            "logps": [repr(x) for x in record["logps"]],
            "reward": repr(record["reward"]),
            "rewards": {name: repr(x) for name, x in record["rewards"].items()},
        }
        document = QuarantinedDocument(
            record["prompt_id"], record["group_id"], record["cause"], record["tokens"], values
        )
        self._append_quarantined("rollout", document)

    def write_late(self, policy: Policy, microbatches: list[Microbatch], step: StepBatches) -> None:
        """Append the documents that were found not finite in a step's forward. Collective.

        A document is written once, however many updates use it.

        Args:
            policy: before the weights change.
            microbatches: of the step.
            step: they are of.
        """
        if step is not self._late_step:
            self._late_step = step
            self._late.clear()
        for i, microbatch in enumerate(microbatches):
            documents = find_not_finite(policy, microbatch, self._ranks.context)
            for number, document in documents.items():
                if self._ranks.draws and (i, number) not in self._late:
                    self._late.add((i, number))
                    self._append_quarantined("update", document)

    def _append_quarantined(self, stage: str, document: QuarantinedDocument) -> None:
        row = {"step": self._state.step + 1, "stage": stage, **asdict(document)}
        append_jsonl(self._quarantine, [row])

    def dumps_now(self, *, spoiled: bool) -> bool:
        """Whether the step under way is to be dumped: its turn has come, or it is spoiled.

        Args:
            spoiled: the step has a document that is not finite; at most ten such are dumped.
        """
        every = self._cfg.dump_every_n_steps
        if spoiled and self._state.num_spoiled_dumps < MAX_SPOILED_DUMPS:
            self._state.num_spoiled_dumps += 1
            return True
        return bool(every) and (self._state.step + 1) % every == 0

    def dump(
        self,
        policy: Policy,
        microbatches: list[Microbatch],
        step: StepBatches,
        values: Mapping[str, float],
    ) -> None:
        """Write all that the step's objective saw, before the weights change. Collective.

        Args:
            policy: gives the log-probabilities.
            microbatches: of the step.
            step: has its totals.
            values: metrics of the step so far.
        """
        number = self._state.step + 1  # as in metrics.jsonl
        microbatches_of_all = dump.collect(policy, microbatches, self._ranks.context)
        if not self._ranks.is_first:
            return
        metadata = {
            "step": number,
            "num_documents": step.num_documents,
            "num_label_tokens": step.num_label_tokens,
            "sampling": self._cfg.sampling.model_dump(),
            "seed": self._cfg.seed,
            "config": self._cfg.model_dump(),
            "metrics": public(values),
        }
        with refusals("output_dir", "choose a folder that can be written and has space"):
            path = self._dumps / f"step_{number}.safetensors"
            dump.write(path, dump.Dump(microbatches_of_all, metadata))

    def save_model(self, checkpointer: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write the model through torchtune's checkpointer, in the format it was read in.

        Collective.

        Args:
            checkpointer: torchtune's.
            weights: whole, on the first rank.
            dtype: of the weights.
        """
        if self._ranks.is_first:
            step = self._state.step
            checkpointer.save_checkpoint({training.MODEL_KEY: weights}, epoch=step)
            folder = self._cfg.checkpointer.get("output_dir", self._path)
            _name_dtype(Path(folder, f"epoch_{step}", "config.json"), dtype)
        dist.barrier()

    def write_summary(self, seconds: float) -> None:
        """Write ``summary.json``.

        Args:
            seconds: that training took.
        """
        if not self._ranks.is_first:
            return
        summary = {
            "accuracy_before": _rounded(self._state.accuracy_before),
            "accuracy_after": _rounded(self._state.accuracy_after),
            "steps": self._state.step,
            "seconds": round(seconds, 1),
            "seed": self._cfg.seed,
        }
        (self._path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        log.info("Done: %s", summary)

    def close(self) -> None:
        """Close the metric logger."""
        if self._logger is not None:
            self._logger.close()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Name the weights' dtype in a saved ``config.json``, which is a copy of the base model's."""
    if not file.exists():  # torchtune's and Meta's formats have none
        return
    config = json.loads(file.read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    file.unlink()  # it was copied with its permissions, which may forbid writing
    file.write_text(json.dumps(config, indent=2))


def set_aside(path: Path) -> None:
    """Rename the file of an earlier run: ``metrics.jsonl`` to ``metrics.1.jsonl`` or the next."""
    if not path.exists():
        return
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects, one a line, with null for a number that JSON cannot hold."""
    lines = []
    for row in rows:
        clean = {key: _or_null(value) for key, value in row.items()}
        lines.append(json.dumps(clean) + "\n")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def _or_null(value: Any) -> Any:
    is_no_json = isinstance(value, float) and not math.isfinite(value)
    return None if is_no_json else value
