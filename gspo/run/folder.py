"""The folder of a run: every file in it is named, written and set aside here.

| file | what it holds |
|---|---|
| ``metrics.jsonl`` | a row for each optimizer step, and one for the evaluation before |
| ``completions[_rankN].jsonl`` | some groups of each rollout, one row each |
| ``held_out.jsonl`` | greedy answers of each evaluation, of the first rank's share |
| ``quarantine_rankN.jsonl`` | documents with a value that is not finite |
| ``dumps/step_N.safetensors`` | what the objective of a step saw |
| ``epoch_N/`` | the model after step N, in the format that it was read in |
| ``adapter_N/`` | its adapters, where it has some, in the format of ``peft`` |
| ``summary.json`` | accuracy before and after, steps, seconds, seed |

A disk that is full costs rows, and says so; it ends no run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtune import utils

from gspo.adapters import ADAPTER_PREFIX, AdapterCheckpointer
from gspo.config import Settings, build, refusals
from gspo.data.steps import StepBatches
from gspo.errors import InputError, require
from gspo.metrics import public
from gspo.parallel.mesh import Ranks
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.run import dump
from gspo.run.checkpoint import MODEL_PREFIX, ModelWriter, on_first
from gspo.run.lock import FolderLock
from gspo.run.rows import RowFile
from gspo.run.state import TrainState
from gspo.update import QuarantinedDocument, find_not_finite

log = utils.get_logger("INFO")

MAX_SPOILED_DUMPS = 10  # a run of steps that are not finite must not fill the disk
MAX_QUARANTINED = 1_000  # rows of a rank's file; more are counted in quarantined_documents alone
MAX_HELD_OUT = 64  # answers of an evaluation in held_out.jsonl


class RunFolder:
    """The files that one rank writes of a run.

    As a context it covers the run: an interruption leaves it with a message that says what was
    saved.

    Args:
        cfg: the settings.
        ranks: of the run; the first writes what is written once.
        state: of the run, which numbers what is written.

    Raises:
        InputError: The folder cannot be made, another run writes in it, or the models of this run
            would be written over those that it starts from.
    """

    def __init__(self, cfg: Settings, ranks: Ranks, state: TrainState) -> None:
        self._cfg = cfg
        self._ranks = ranks
        self._state = state
        self._path = Path(cfg.output_dir)
        self._models = Path(cfg.checkpointer.get("output_dir", self._path))
        suffix = "" if ranks.is_first else f"_rank{ranks.rank}"
        self._metrics = RowFile(self._path / "metrics.jsonl")
        self._held_out = RowFile(self._path / "held_out.jsonl")
        self._completions = RowFile(self._path / f"completions{suffix}.jsonl")
        self._quarantine = RowFile(self._path / f"quarantine_rank{ranks.rank}.jsonl")
        self._dumps = self._path / "dumps"
        self._logger: Any = None
        self._last_model: Path | None = None
        self._late_step: StepBatches | None = None  # whose late documents are in the next
        self._late: set[tuple[int, int]] = set()  # number of microbatch and document
        self._num_quarantined = 0  # rows in the file
        _check_not_overwritten("checkpointer", cfg.checkpointer, self._models)
        _check_not_overwritten("reference_checkpointer", cfg.reference_checkpointer, self._models)
        if cfg.adapter_path is not None:
            _check_not_among("adapter_path", cfg.adapter_path, self._models)
        with refusals("output_dir", "choose a folder that can be written"):
            self._path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self._path) if ranks.is_first else None

    def __enter__(self) -> RunFolder:
        """Return the folder."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files, and give an interruption its message."""
        self.close()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self._interruption()) from error

    def open(self) -> None:
        """Set the files of an earlier run aside and open the logger.

        It is called last, so that a run that is refused leaves earlier files as they are.
        """
        with refusals("output_dir", "choose a folder that can be written"):
            set_aside(self._completions.path)
            set_aside(self._quarantine.path)
            if self._ranks.is_first:
                set_aside(self._metrics.path)
                set_aside(self._held_out.path)
                set_aside(self._dumps)
                self._set_aside_other_ranks()
                self._metrics.path.touch()
        if self._ranks.is_first and self._cfg.metric_logger is not None:
            self._logger = build(self._cfg, "metric_logger")
            self._logger.log_config(self._cfg.resolved())

    def _set_aside_other_ranks(self) -> None:
        """Set aside the files of ranks that an earlier run had and this one has not."""
        for name in ("completions", "quarantine"):
            for path in sorted(self._path.glob(f"{name}_rank*.jsonl")):
                rank = path.stem.removeprefix(f"{name}_rank")
                if rank.isdecimal() and int(rank) >= self._ranks.world_size:
                    set_aside(path)

    def log(self, values: Mapping[str, float]) -> None:
        """Write the row of the last step, and give it to the metric logger when its turn has come.

        Args:
            values: metrics; none writes no row.
        """
        if not self._ranks.is_first or not values:
            return
        step = self._state.step
        row = public(values)
        self._metrics.append([{"step": step} | row])
        is_due = step % self._cfg.log_every_n_steps == 0 or "eval/reward" in row
        if self._logger is not None and is_due:
            with _unwritten_is_a_warning("The metric logger's row"):
                self._logger.log_dict(row, step=step)

    def write_completions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to this rank's completions."""
        self._completions.append(rows)

    def write_held_out(self, rows: list[dict[str, Any]]) -> None:
        """Append the first rows of an evaluation."""
        if self._ranks.is_first:
            shown = rows[:MAX_HELD_OUT]
            self._held_out.append({"step": self._state.step} | row for row in shown)

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
        if self._num_quarantined == MAX_QUARANTINED:
            return
        self._num_quarantined += 1
        row = {"step": self._state.step + 1, "stage": stage, **asdict(document)}
        self._quarantine.append([row])

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
        with _unwritten_is_a_warning(f"The dump of step {number}"):
            path = self._dumps / f"step_{number}.safetensors"
            dump.write(path, dump.Dump(microbatches_of_all, metadata))

    def save_model(self, checkpointer: Any, policy: Policy, dtype: torch.dtype) -> None:
        """Write the model through torchtune's checkpointer, in the format it was read in.

        Of a policy with adapters these are written, in the format of ``peft``, and the model with
        ``save_merged`` alone. What cannot be written is a warning, unless the run has ended.
        Collective.

        Args:
            checkpointer: torchtune's.
            policy: of the step.
            dtype: of the weights.

        Raises:
            InputError: On the first rank: the last model could not be written in its place.
        """
        models = []
        if not policy.adapters or self._cfg.save_merged:
            writer = ModelWriter(checkpointer, self._models, dtype)
            models.append((writer, on_first(policy.full_state_dict(), self._ranks)))
        if policy.adapters:
            of_adapters = AdapterCheckpointer(policy, checkpointer, self._models)
            writer = ModelWriter(of_adapters, self._models, dtype, prefix=ADAPTER_PREFIX)
            models.append((writer, on_first(policy.adapter_state_dict(), self._ranks)))
        failure: InputError | None = None
        if self._ranks.is_first:
            try:
                for writer, weights in models:
                    self._write_model(writer, weights)
            except InputError as error:
                failure = error
        dist.barrier()  # before the failure is raised: no rank waits for one that has ended
        if failure is not None:
            raise failure

    def _write_model(self, writer: ModelWriter, weights: dict[str, Tensor]) -> None:
        save = writer.save_last if self._state.has_ended else writer.try_to_save
        self._last_model = save(weights, self._state.step) or self._last_model

    def write_summary(self, seconds: float) -> None:
        """Note that the run has ended, so that its model is the last, and write ``summary.json``.

        Args:
            seconds: that training took.
        """
        self._state.has_ended = True
        if not self._ranks.is_first:
            return
        summary = {
            "accuracy_before": _rounded(self._state.accuracy_before),
            "accuracy_after": _rounded(self._state.accuracy_after),
            "steps": self._state.step,
            "seconds": round(seconds, 1),
            "seed": self._cfg.seed,
        }
        path = self._path / "summary.json"
        with _unwritten_is_a_warning(str(path)):
            path.write_text(json.dumps(summary, indent=2) + "\n")
        log.info("Done: %s", summary)

    def close(self) -> None:
        """Write the rows that wait, close the metric logger and give the folder free."""
        for rows in (self._metrics, self._held_out, self._completions, self._quarantine):
            rows.close()
        if self._logger is not None:
            self._logger.close()
            self._logger = None
        if self._lock is not None:
            self._lock.release()

    def _interruption(self) -> str:
        """Say how far the run had come and where its last model is; only the first rank does."""
        if not self._ranks.is_first:
            return ""
        saved = "nothing was saved yet"
        if self._last_model is not None:
            saved = f"the last saved model is {self._last_model}"
        return f"Interrupted after step {self._state.step}; {saved}."


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _check_not_overwritten(key: str, checkpointer: Mapping[str, Any] | None, models: Path) -> None:
    """Refuse a checkpoint in the folders that this run writes its models into."""
    for name in ("checkpoint_dir", "path"):
        folder = (checkpointer or {}).get(name)
        if isinstance(folder, str):  # a checkpointer of the user's own may have none
            _check_not_among(f"{key}.{name}", folder, models)


def _check_not_among(key: str, folder: str, models: Path) -> None:
    prefixes = tuple(f"{prefix}_" for prefix in (MODEL_PREFIX, ADAPTER_PREFIX))
    resolved = Path(folder).resolve()
    for path in (resolved, *resolved.parents):
        is_model = path.parent == models.resolve() and path.name.startswith(prefixes)
        require(
            not is_model,
            key,
            folder,
            f"lies in {models}, where this run writes its own models and may write over it",
            "set another output_dir",
        )


@contextlib.contextmanager
def _unwritten_is_a_warning(what: str) -> Iterator[None]:
    """Go on where something that a run can do without cannot be written."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be written: %s. The run goes on.", what, error)


def set_aside(path: Path) -> None:
    """Rename the file of an earlier run: ``metrics.jsonl`` to ``metrics.1.jsonl`` or the next."""
    if not path.exists():
        return
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
