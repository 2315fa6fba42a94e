"""Learning, compared: the tiny task under GSPO, its relatives and PPO, at equal budgets.

    python benchmarks/learning.py --work runs/learning --jobs 2
    python benchmarks/learning.py --work runs/learning --report \
        --json benchmarks/results/DATE-learning.json \
        --picture benchmarks/results/DATE-learning.png

Every objective trains the same base policies (``python -m gspo.demo --base-only``, one for each
seed) on the same prompts, with as many completions and optimizer steps, through ``tune run`` and
the config ``tiny/gspo`` with rollouts of half its size: 16 prompts of 8 completions, two updates on
each. What is not the same:

- The objective: ``preset`` of that name. ``dapo`` does not refill dead groups, which would draw
  more completions. ``ppo`` (``learning_parts.py``) has a value head, and trains on groups of equal
  rewards too, which tell it something.
- Learning rate and clip range (``band``): chosen for each objective by one sweep over the same
  grid, in the plain condition, with the seed 5, by the mean held-out accuracy of the last three
  evaluations; kept in the other conditions. The clip ranges are the GSPO paper's, that of
  ``tiny/gspo``, and a wide one: the preset's own, or 0.2 for a document's ratio, as in TRL and
  verl.

Conditions: ``plain`` is that; ``stale`` syncs the sampler every 8 updates and trains on rollouts
drawn two ahead, so that a document is 4 to 11 optimizer steps old, 7.5 in the mean; ``noise`` errs
by 0.03 nats (Gaussian) in every log-probability of the sampler. ``staleness/mean`` and
``mismatch/rms_token`` of each run are in its JSON.

A run has collapsed if its last held-out accuracy is more than 5 points below its best or below the
base policy's, or if a gradient norm was not finite. Intervals are of the mean over seeds, 95 %, by
Student's t.

Everything is resumable: a run has its folder with its log and command line under ``--work``, is
done when ``run.json`` stands there, and is begun afresh otherwise. The whole is 84 runs of the
sweep and 105 compared: an hour and a half with ``--jobs 2`` on two cores that nothing else uses.
With one ``--lrs`` and one ``--bands`` there is no sweep: all objectives get these, as
``--conditions stale --objectives gspo grpo ppo --lrs 1e-4 --bands paper`` in another folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hardware import hardware
from tqdm import tqdm

from gspo.commands.output import aligned, without_nan
from gspo.config import Settings

HERE = Path(__file__).resolve().parent
STEPS = 400  # optimizer steps
EVERY = 40  # steps between evaluations: a multiple of every sync_every_steps
DOCUMENTS, GROUP = 128, 8  # of a rollout; tiny/gspo's group_size
SEEDS, SWEEP_SEED = (0, 1, 2, 3, 4), 5
LRS = (3e-5, 1e-4, 3e-4, 1e-3)
BANDS = {"paper": (3e-4, 4e-4), "tiny": (0.03, 0.04), "wide": (0.2, 0.2)}
WIDE = {"dapo": (0.2, 0.28), "cispo": (None, 5.0)}  # where the preset's own is another
PPO = (
    "loss=learning_parts.PPOLoss",
    "loss.aggregation=token",
    "loss.value_coef=0.1",
    "loss.gae_lambda=0.95",
    "advantages.drop_dead_groups=false",
)
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "gspo": ("preset=gspo",),
    "gspo_token": ("preset=gspo_token",),
    "grpo": ("preset=grpo",),
    "dr_grpo": ("preset=dr_grpo",),
    "dapo": ("preset=dapo", "advantages.refill_dead_groups=false"),
    "cispo": ("preset=cispo",),
    "ppo": PPO,
}
STRESSED = "sampler=learning_parts.StressedSampler"
CONDITIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "stale": ("sync_every_steps=8", STRESSED, "sampler.rollouts_ahead=2"),
    "noise": (STRESSED, "sampler.noise=0.03"),
}
# Metrics whose mean over a run's optimizer steps is in its JSON.
MEANS = (
    "clip/binding_token",
    "clip/binding_document",
    "clip/any_document",
    "clip/low",
    "clip/high",
    "kl_new_old",
    "staleness/mean",
    "mismatch/rms_token",
    "grad_norm",
    "documents",
    "value/mse",
    "value/variance",
)
TABLE_MEANS = ("clip/binding_token", "clip/any_document", "staleness/mean", "mismatch/rms_token")
FALL = 0.05  # below its best, of a collapsed run
CLIP_BINS = (0.01, 0.05, 0.2, math.inf)  # upper ends of mean clip/binding_token
MAX_SKIPPED = Settings.model_fields["max_skipped_steps"].default  # in a row, until a run gives up
# Student's t, 97.5 %, by the number of values.
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}

Record = dict[str, Any]  # what ``run.json`` holds


@dataclass(frozen=True)
class Run:
    """One training run."""

    condition: str
    objective: str
    seed: int
    lr: float
    band: str  # name of a clip range
    steps: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        setting = f"{self.band}-lr{self.lr:g}"
        return f"{self.steps}-{self.condition}-{self.objective}-{setting}-seed{self.seed}"

    @property
    def clip_range(self) -> tuple[float | None, float]:
        """``clip_low`` (None: there is none) and ``clip_high``."""
        low, high = BANDS[self.band]
        if self.band == "wide":
            low, high = WIDE.get(self.objective, (low, high))
        if self.objective == "cispo":  # bounds from above alone
            return None, high
        return low, high

    def command(self, work: Path) -> list[str]:
        """Return the words that a user would type."""
        recipe = "learning_parts" if self.objective == "ppo" else "gspo_full_finetune"
        tune = str(Path(sys.executable).with_name("tune"))
        overrides = [*OBJECTIVES[self.objective], *CONDITIONS[self.condition]]
        overrides += [f"{key}={value}" for key, value in self.keys(work).items()]
        return [tune, "run", recipe, "--config", "tiny/gspo", *overrides]

    def keys(self, work: Path) -> dict[str, Any]:
        """Return the config keys that are the run's alone, or those of all runs."""
        base = work / f"base{self.seed}"
        low, high = self.clip_range
        keys = {
            "output_dir": work / self.name,
            "base_dir": base / "base",
            "data_dir": base / "data",
            "seed": self.seed,
            "optimizer.lr": self.lr,
            "num_steps": self.steps,
            "prompts_per_rollout": DOCUMENTS // GROUP,
            "docs_per_step": DOCUMENTS,
            "eval.every_n_steps": EVERY,
            "log_completions": 0,
            "loss.clip_high": high,
        }
        if low is not None:
            keys["loss.clip_low"] = low
        return keys


def main() -> None:
    """Make bases, sweep, comparison and report; what is there already is not done again."""
    args = read_arguments()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.report:
        train_all(args)
    report(args)


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/learning"), help="folder of the runs")
    add("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    add("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    seeds_help = f"other than {SWEEP_SEED}"
    add("--seeds", nargs="+", type=int, default=list(SEEDS), help=seeds_help)
    add("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    add("--lrs", nargs="+", type=float, default=list(LRS), help="of the sweep")
    bands_help = "clip ranges of the sweep"
    add("--bands", nargs="+", choices=BANDS, default=list(BANDS), help=bands_help)
    add("--report", action="store_true", help="train nothing: report what is there")
    default = "default: learning.{} in the work folder"
    add("--json", type=Path, help=f"write the result here; {default.format('json')}")
    add("--picture", type=Path, help=f"draw it here; {default.format('png')}")
    args = parser.parse_args()
    if SWEEP_SEED in args.seeds or len(args.seeds) > max(STUDENT):
        parser.error(
            f"--seeds: {max(STUDENT)} at most, without {SWEEP_SEED}, on which the settings are "
            "chosen"
        )
    return args


def train_all(args: argparse.Namespace) -> None:
    """Make the base policies, the sweep and the runs to compare."""
    sweep = runs_of_sweep(args)
    bases = [SWEEP_SEED, *args.seeds] if sweep else args.seeds
    unmade = [seed for seed in bases if not (args.work / f"base{seed}" / "done").exists()]
    training = partial(train, work=args.work)
    in_parallel("bases", unmade, work=partial(make_base, work=args.work), jobs=args.jobs)
    in_parallel("sweep", unfinished(sweep, args.work), work=training, jobs=args.jobs)
    compared = runs_to_compare(args)
    in_parallel("runs", unfinished(compared, args.work), work=training, jobs=args.jobs)


def runs_of_sweep(args: argparse.Namespace) -> list[Run]:
    """Return the runs of the sweep; none where there is nothing to choose."""
    settings = grid(args)
    if len(settings) == 1:
        return []
    runs = []
    for objective in args.objectives:
        for lr, band in settings:
            runs.append(Run("plain", objective, SWEEP_SEED, lr, band, args.steps))
    return runs


def runs_to_compare(args: argparse.Namespace) -> list[Run]:
    """Return the runs after the sweep, each objective with its best setting.

    Objectives are innermost: what is there after a while can be compared.
    """
    best = {objective: choose(args, objective) for objective in args.objectives}
    runs = []
    for condition in args.conditions:
        for seed in args.seeds:
            for objective in args.objectives:
                lr, band = best[objective]
                runs.append(Run(condition, objective, seed, lr, band, args.steps))
    return runs


def unfinished(runs: list[Run], work: Path) -> list[Run]:
    """Return the runs that are not done."""
    return [run for run in runs if not (work / run.name / "run.json").exists()]


def in_parallel(
    title: str, items: Sequence[Any], *, work: Callable[[Any], str | None], jobs: int
) -> None:
    """Call ``work``, which says what failed, on each item; end the program if any did."""
    failures = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(items), desc=title, smoothing=0) as bar:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                if failure := future.result():
                    failures.append(failure)
                bar.update()
        except BaseException:  # an interrupt must not go on to the next runs
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        sys.exit("Failed, and begun afresh when called again:\n" + "\n".join(failures))


def make_base(seed: int, *, work: Path) -> str | None:
    """Make the demo's base policy of a seed, and say what failed."""
    folder, log = work / f"base{seed}", work / f"base{seed}.log"
    options = ["--base-only", "--seed", str(seed), "--output", str(folder)]
    command = [sys.executable, "-m", "gspo.demo", *options]
    if run_process(command, log) != 0:
        return f"{shlex.join(command)}: see {log}"
    (folder / "done").touch()
    return None


def train(run: Run, *, work: Path) -> str | None:
    """Make one run in a process of its own, and say what failed."""
    folder = work / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command, log = run.command(work), folder / "log.txt"
    started = time.perf_counter()
    code = run_process(command, log)
    seconds = time.perf_counter() - started
    if code != 0 and not has_given_up(folder):
        return f"{shlex.join(command)}: exit status {code}, see {log}"
    record = asdict(run) | summarize(folder, steps=run.steps)
    record["command"] = shlex.join(command)
    record["folder"] = str(folder)
    record["seconds"] = seconds
    for checkpoint in folder.glob("epoch_*"):
        shutil.rmtree(checkpoint)
    text = json.dumps(record, indent=2)
    (folder / "run.json").write_text(text + "\n")  # last: the run is done
    return None


def run_process(command: list[str], log: Path) -> int:
    """Run a command on one thread with its output in ``log``, and return the exit status."""
    tqdm.write(f"{log.parent}: {shlex.join(command)}")
    paths = [str(HERE), str(HERE.parent / "recipes")]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = "1"
    env["TQDM_MININTERVAL"] = "20"
    env["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("w") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; a metric that is no number is left out."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def has_given_up(folder: Path) -> bool:
    """Whether a run has ended over gradients that are not finite: its last steps have no norm."""
    last = trained_rows(read_rows(folder))[-MAX_SKIPPED:]
    return bool(last) and not any("grad_norm" in row for row in last)


def summarize(folder: Path, *, steps: int) -> Record:
    """Return what a run's ``metrics.jsonl`` says."""
    rows = read_rows(folder)
    curve = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    trained = trained_rows(rows)
    accuracies = [accuracy for _, accuracy in curve]
    has_ended = rows[-1]["step"] == steps
    is_finite = has_ended and all("grad_norm" in row for row in trained)
    return {
        "curve": curve,
        "base": accuracies[0],
        "final": accuracies[-1],
        "best": max(accuracies),
        "collapsed": reasons_of_collapse(accuracies, is_finite),
        "skipped_steps": trained[-1]["skipped_steps"],
        "staleness/max": max(row["staleness/max"] for row in trained),
        "means": means_of(rows),
    }


def trained_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of optimizer steps, without those of evaluations alone."""
    return [row for row in rows if "lr" in row]


def reasons_of_collapse(accuracies: list[float], is_finite: bool) -> list[str]:
    """Return why a run counts as collapsed; nothing if it does not.

    Args:
        accuracies: of the evaluations, the base policy's first.
        is_finite: whether the run has all its steps, and each a finite gradient.
    """
    final = accuracies[-1]
    reasons = []
    if not is_finite:
        reasons.append("not finite")
    if final < max(accuracies) - FALL:
        reasons.append("fell from its best")
    if final < accuracies[0]:
        reasons.append("below the base")
    return reasons


def means_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over the rows of the metrics that are there."""
    means = {name: mean_of(rows, name) for name in MEANS}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def read_runs(work: Path, steps: int) -> list[Record]:
    """Return the records of all runs of so many steps."""
    return [json.loads(file.read_text()) for file in sorted(work.glob(f"{steps}-*/run.json"))]


def grid(args: argparse.Namespace) -> list[tuple[float, str]]:
    """Return the settings of the sweep: learning rate and clip range."""
    return [(lr, band) for lr in args.lrs for band in args.bands]


def choose(args: argparse.Namespace, objective: str) -> tuple[float, str]:
    """Return the setting of the sweep's best run."""
    settings = grid(args)
    if len(settings) == 1:
        return settings[0]
    scores = {}
    for record in read_runs(args.work, args.steps):
        if record["objective"] == objective and record["seed"] == SWEEP_SEED:
            scores[record["lr"], record["band"]] = score(record)
    return max(settings, key=lambda setting: scores[setting])


def score(record: Record) -> float:
    """Return the mean accuracy of the last three evaluations, by which the sweep chooses."""
    return statistics.fmean(accuracy for _, accuracy in record["curve"][-3:])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval, which for one value is NaN."""
    count = len(values)
    mean = statistics.fmean(values)
    if count == 1:
        return mean, math.nan
    return mean, STUDENT[count] * statistics.stdev(values) / math.sqrt(count)


def report(args: argparse.Namespace) -> None:
    """Print, write and draw what is there."""
    records = read_runs(args.work, args.steps)
    compared = [record for record in records if is_compared(record, args)]
    if not compared:
        sys.exit(f"There is no finished run of {args.steps} steps in {args.work} to report.")
    result = results_of(args.steps, records, compared)
    print_result(result)
    json_file = args.json or args.work / "learning.json"
    picture = args.picture or args.work / "learning.png"
    json_file.write_text(json.dumps(without_nan(result), indent=2) + "\n")
    draw(compared, picture)
    print(f"\nWritten: {json_file}, {picture}")


def is_compared(record: Record, args: argparse.Namespace) -> bool:
    """Whether a run is one of those to compare."""
    return (
        record["seed"] != SWEEP_SEED
        and record["seed"] in args.seeds
        and record["condition"] in args.conditions
        and record["objective"] in args.objectives
    )


def results_of(steps: int, records: list[Record], compared: list[Record]) -> dict[str, Any]:
    """Return what the JSON holds."""
    sweep = [record for record in records if record["seed"] == SWEEP_SEED]
    clip = clip_relation("compared", compared)
    clip += clip_relation("with the sweep's", [*compared, *sweep])
    runs = []
    for record in records:
        # The other two are of this machine.
        runs.append({k: v for k, v in record.items() if k not in ("command", "folder")})
    return {
        "hardware": hardware(),
        "steps": steps,
        "table": [row_of(group, compared) for group in groups(compared)],
        "sweep": [sweep_row(record) for record in sweep],
        "clip": clip,
        "rank_correlation": rank_correlations(compared),
        "runs": runs,
    }


def print_result(result: dict[str, Any]) -> None:
    """Print the tables and the rank correlations."""
    print_rows(
        f"{result['steps']} steps; mean over seeds, with half the width of its 95 % interval (t)",
        result["table"],
    )
    print_rows(
        f"sweep (plain, seed {SWEEP_SEED}); the highest score of an objective is taken",
        result["sweep"],
    )
    print_rows("final accuracy and collapses by a run's mean clip/binding_token", result["clip"])
    correlations = json.dumps(result["rank_correlation"])
    print(f"Spearman's correlation of clip/binding_token and final accuracy: {correlations}")


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Return runs that differ by their seed alone together, in the order of the options."""
    by_key: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record["condition"], record["objective"], record["lr"], record["band"])
        by_key.setdefault(key, []).append(record)
    conditions, objectives = list(CONDITIONS), list(OBJECTIVES)

    def order(key: tuple[Any, ...]) -> tuple[Any, ...]:
        condition, objective, lr, band = key
        return conditions.index(condition), objectives.index(objective), lr, band

    return [by_key[key] for key in sorted(by_key, key=order)]


def row_of(group: list[Record], compared: list[Record]) -> dict[str, Any]:
    """Return a line of the table for runs that differ by their seed."""
    first = group[0]
    row = {key: first[key] for key in ("condition", "objective", "lr", "band")}
    row["seeds"] = len(group)
    row["base"] = mean_of(group, "base")
    row["final"], row["+-"] = interval([record["final"] for record in group])
    row["best"] = mean_of(group, "best")
    row["collapsed"] = count_collapsed(group)
    row["minus gspo"], row["its +-"] = minus_gspo(group, compared)
    means = [record["means"] for record in group]
    for name in TABLE_MEANS:
        row[name] = mean_of(means, name)
    row["seconds"] = mean_of(group, "seconds")
    return row


def mean_of(records: list[Record], key: str) -> float:
    """Return the mean over the records that have the key, or NaN."""
    values = [record[key] for record in records if key in record]
    return statistics.fmean(values) if values else math.nan


def minus_gspo(group: list[Record], compared: list[Record]) -> tuple[float, float]:
    """Return the interval of the difference to GSPO, over the seeds that both have.

    Runs of a seed share a base policy. GSPO's are those at the group's learning rate, if any.
    """
    first = group[0]
    rivals = []
    for record in compared:
        if record["objective"] == "gspo" and record["condition"] == first["condition"]:
            rivals.append(record)
    at_this_rate = [record for record in rivals if record["lr"] == first["lr"]]
    rival_final = {record["seed"]: record["final"] for record in at_this_rate or rivals}
    differences = []
    for record in group:
        if record["seed"] in rival_final:
            differences.append(record["final"] - rival_final[record["seed"]])
    return interval(differences) if differences else (math.nan, math.nan)


def count_collapsed(records: Iterable[Record]) -> int:
    """Return the number of runs that have collapsed."""
    return sum(bool(record["collapsed"]) for record in records)


def sweep_row(record: Record) -> dict[str, Any]:
    """Return a line of the sweep's table."""
    values = record | record["means"]
    names = ("objective", "lr", "band", "final", "best", "collapsed", "clip/binding_token")
    return {name: values.get(name) for name in names} | {"score": score(record)}


def clipping_runs(records: list[Record], objective: str) -> list[Record]:
    """Return the runs of an objective that have a share of clipped tokens."""
    chosen = []
    for record in records:
        if record["objective"] == objective and "clip/binding_token" in record["means"]:
            chosen.append(record)
    return chosen


def clip_relation(title: str, records: list[Record]) -> list[dict[str, Any]]:
    """Return rows on the runs of each objective, by the share of tokens that the clip stopped."""
    rows = []
    for objective in OBJECTIVES:
        runs = clipping_runs(records, objective)
        for low, high in zip((0.0, *CLIP_BINS), CLIP_BINS, strict=False):
            inside = [run for run in runs if low <= run["means"]["clip/binding_token"] < high]
            if not inside:
                continue
            row = {
                "runs": title,
                "objective": objective,
                "from": low,
                "to": high,
                "count": len(inside),
                "final": statistics.fmean(run["final"] for run in inside),
                "collapsed": count_collapsed(inside),
            }
            rows.append(row)
    return rows


def rank_correlations(records: list[Record]) -> dict[str, float]:
    """Return Spearman's correlations over the runs of an objective in all conditions.

    An objective that never clips has none.
    """
    correlations = {}
    for objective in OBJECTIVES:
        runs = clipping_runs(records, objective)
        shares = np.array([run["means"]["clip/binding_token"] for run in runs])
        finals = np.array([run["final"] for run in runs])
        if len(runs) > 2 and np.ptp(shares) and np.ptp(finals):
            coefficients = np.corrcoef(ranks_of(shares), ranks_of(finals))
            correlations[objective] = round(float(coefficients[0, 1]), 3)
    return correlations


def ranks_of(values: np.ndarray) -> list[float]:
    """Return ranks up to a linear change; equal values share theirs."""
    return [(values < value).mean() + (values <= value).mean() for value in values]


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table below its title."""
    print(f"\n{title}")
    if rows:
        cells = [[cell(value) for value in row.values()] for row in rows]
        for line in aligned([list(rows[0]), *cells]):
            print(line)


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, list):
        return ", ".join(value) or "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def draw(records: list[Record], path: Path) -> None:
    """Draw, for each condition, held-out accuracy and its difference to GSPO's of the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = {record["condition"] for record in records}
    conditions = [condition for condition in CONDITIONS if condition in there]
    figure, axes = pyplot.subplots(
        2,
        len(conditions),
        figsize=(5 * len(conditions), 8),
        sharex=True,
        sharey="row",
        squeeze=False,
        constrained_layout=True,
    )
    for (above, below), condition in zip(axes.T, conditions, strict=True):
        of_condition = [record for record in records if record["condition"] == condition]
        draw_condition(of_condition, above, below)
        above.set_title(condition, fontsize=10)
        below.set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("held-out accuracy, mean over seeds")
    axes[1, 0].set_ylabel("less GSPO's of the same seed, mean and 95 % interval")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


Curve = dict[int, float]  # accuracy by step


def draw_condition(records: list[Record], above: Any, below: Any) -> None:
    """Draw the curves of each objective, and below the differences to GSPO's."""
    rival: dict[int, Curve] = {}  # by seed
    for group in groups(records):
        objective = group[0]["objective"]
        curves = {record["seed"]: dict(record["curve"]) for record in group}
        if objective == "gspo":
            rival = curves
        color = f"C{list(OBJECTIVES).index(objective)}"
        look = {"color": color, "label": objective, "markersize": 3}
        plot(above, list(curves.values()), look)
        paired = []
        for seed, curve in curves.items():
            if seed in rival:
                paired.append(difference(curve, rival[seed]))
        plot(below, paired, look)


def difference(curve: Curve, other: Curve) -> Curve:
    """Return one curve less the other, at the steps of both."""
    return {step: value - other[step] for step, value in curve.items() if step in other}


def plot(axis: Any, curves: list[Curve], look: dict[str, Any]) -> None:
    """Plot the mean of curves by step; for differences, which start at 0, with its interval."""
    # A run that gave up has a shorter curve.
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    means, low, high = [], [], []
    for step in steps:
        mean, half = interval([curve[step] for curve in curves])
        half = 0.0 if math.isnan(half) else half
        means.append(mean)
        low.append(mean - half)
        high.append(mean + half)
    axis.plot(steps, means, marker="o", **look)
    if means and means[0] == 0:
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.1, linewidth=0)
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
