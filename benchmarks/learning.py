"""Learning, compared: the tiny task under GSPO, its relatives and PPO, at equal budgets, with and without stress.

    python benchmarks/learning.py --work runs/learning --jobs 2
    python benchmarks/learning.py --work runs/learning --report --json benchmarks/results/DATE-learning.json \
        --picture benchmarks/results/DATE-learning.png

Every objective trains the same base policies (``python -m gspo.demo --base-only``, one for each seed) on the same
prompts, with as many completions and optimizer steps, through ``tune run`` and the config ``tiny/gspo`` with rollouts
of half its size: 16 prompts of 8 completions, two updates on each. What is not the same:

- The objective: ``preset`` of that name. ``dapo`` does not refill dead groups, which would draw more completions.
  ``ppo`` (``learning_parts.py``) has a value head, and trains on groups of equal rewards too, which tell it something.
- Learning rate and band: chosen for each objective by one sweep over the same grid, in the plain condition, with the
  seed 5, by the mean held-out accuracy of the last three evaluations; kept in the other conditions. The bands are the
  GSPO paper's, that of ``tiny/gspo``, and a wide one: the preset's own, or 0.2 for a document's ratio, as in TRL and
  verl.

Conditions: ``plain`` is that; ``stale`` syncs the sampler every 8 updates and trains on rollouts drawn two
ahead, so that a document is 4 to 11 optimizer steps old, 7.5 in the mean; ``noise`` errs by 0.03 nats (Gaussian) in
every log-probability of the sampler. ``staleness/mean`` and ``mismatch/rms_token`` of each run are in its JSON.

A run has collapsed if its last held-out accuracy is more than 5 points below its best or below the base policy's, or if
a gradient norm was not finite. Intervals are of the mean over seeds, 95 %, by Student's t.

Everything is resumable: a run has its folder with its log and command line under ``--work``, is done when ``run.json``
stands there, and is begun afresh otherwise. The whole is 84 runs of the sweep and 105 compared: an hour and a half
with ``--jobs 2`` on two cores that nothing else uses. With one ``--lrs`` and one ``--bands`` there is no sweep: all
objectives get these, as ``--conditions stale --objectives gspo grpo ppo --lrs 1e-4 --bands paper`` in another folder.
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

HERE = Path(__file__).resolve().parent
STEPS, EVERY = (
    400,
    40,
)  # optimizer steps, and those between evaluations: a multiple of every sync_every_steps
DOCUMENTS, GROUP = 128, 8  # of a rollout; tiny/gspo's group_size
SEEDS, SWEEP_SEED = (0, 1, 2, 3, 4), 5
LRS = (3e-5, 1e-4, 3e-4, 1e-3)
BANDS = {"paper": (3e-4, 4e-4), "tiny": (0.03, 0.04), "wide": (0.2, 0.2)}
WIDE = {"dapo": (0.2, 0.28), "cispo": (None, 5.0)}  # where the preset's own is another
PPO = (
    "loss=learning_parts.PPOLoss", "loss.aggregation=token", "loss.value_coef=0.1", "loss.gae_lambda=0.95",
    "advantages.drop_dead_groups=false",
)  # fmt: skip
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
MEANS = (  # over a run's optimizer steps, into its JSON
    "clip/binding_token", "clip/binding_document", "clip/any_document", "clip/low", "clip/high", "kl_new_old",
    "staleness/mean", "mismatch/rms_token", "grad_norm", "documents", "value/mse", "value/variance",
)  # fmt: skip
FALL = 0.05  # below its best, of a collapsed run
CLIP_BINS = (0.01, 0.05, 0.2, math.inf)  # upper ends of mean clip/binding_token
NOT_FINITE = "had a gradient norm that is not finite"  # in the recipe's message when it gives up
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
}  # 97.5 %


@dataclass(frozen=True)
class Run:
    """One training run; its name is that of its folder."""

    condition: str
    objective: str
    seed: int
    lr: float
    band: str
    steps: int

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.steps}-{self.condition}-{self.objective}-{self.band}-lr{self.lr:g}-seed{self.seed}"

    def command(self, work: Path) -> list[str]:
        """What a user would type."""
        recipe = "learning_parts" if self.objective == "ppo" else "gspo_full_finetune"
        base = work / f"base{self.seed}"
        band = WIDE.get(self.objective, BANDS["wide"]) if self.band == "wide" else BANDS[self.band]
        low, high = (
            (None if self.objective == "cispo" else band[0]),
            band[1],
        )  # cispo bounds from above alone
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
        } | ({} if low is None else {"loss.clip_low": low})
        own = [f"{key}={value}" for key, value in keys.items()]
        overrides = [*OBJECTIVES[self.objective], *CONDITIONS[self.condition], *own]
        return [
            str(Path(sys.executable).with_name("tune")),
            "run",
            recipe,
            "--config",
            "tiny/gspo",
            *overrides,
        ]


def main() -> None:
    """Bases, sweep, comparison, report; what is there already is not done again."""
    args = read_arguments()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.report:
        sweep = [
            Run("plain", objective, SWEEP_SEED, lr, band, args.steps)
            for objective in args.objectives
            for lr in args.lrs
            for band in args.bands
        ]
        sweep = (
            sweep if len(args.lrs) * len(args.bands) > 1 else []
        )  # else there is nothing to choose
        bases = [*([SWEEP_SEED] if sweep else []), *args.seeds]
        make, training = partial(make_base, work=args.work), partial(train, work=args.work)
        in_parallel(
            "bases",
            bases,
            done=lambda seed: args.work / f"base{seed}" / "done",
            work=make,
            jobs=args.jobs,
        )
        in_parallel(
            "sweep",
            sweep,
            done=lambda run: args.work / run.name / "run.json",
            work=training,
            jobs=args.jobs,
        )
        found = {objective: choose(args, objective) for objective in args.objectives}
        runs = [
            Run(condition, objective, seed, *found[objective], args.steps)
            for condition in args.conditions
            for seed in args.seeds  # objectives innermost: what is there after a while can be compared
            for objective in args.objectives
        ]
        in_parallel(
            "runs",
            runs,
            done=lambda run: args.work / run.name / "run.json",
            work=training,
            jobs=args.jobs,
        )
    report(args)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/learning"), help="folder of the runs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(SEEDS), help=f"other than {SWEEP_SEED}"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--lrs", nargs="+", type=float, default=list(LRS), help="of the sweep")
    parser.add_argument(
        "--bands", nargs="+", choices=BANDS, default=list(BANDS), help="of the sweep"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there")
    parser.add_argument(
        "--json", type=Path, help="write the result here; default: learning.json in the work folder"
    )
    parser.add_argument(
        "--picture", type=Path, help="draw it here; default: learning.png in the work folder"
    )
    args = parser.parse_args()
    if SWEEP_SEED in args.seeds or len(args.seeds) > max(STUDENT):
        parser.error(
            f"--seeds: {max(STUDENT)} at most, without {SWEEP_SEED}, on which the settings are chosen"
        )
    return args


def in_parallel(
    what: str, items: Iterable[Any], *, done: Callable[[Any], Path], work: Any, jobs: int
) -> None:
    """``work`` on each item whose file ``done`` is not there; ends the program if any failed."""
    left, failures = [item for item in items if not done(item).exists()], []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(left), desc=what, unit="run", smoothing=0) as bar,
    ):
        try:
            for future in as_completed([pool.submit(work, item) for item in left]):
                failures += filter(None, [future.result()])
                bar.update()
        except BaseException:  # an interrupt must not go on to the next runs
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        sys.exit("Failed, and begun afresh when called again:\n" + "\n".join(failures))


def make_base(seed: int, *, work: Path) -> str | None:
    """The demo's base policy of a seed; says what failed."""
    folder, log = work / f"base{seed}", work / f"base{seed}.log"
    command = [
        sys.executable,
        "-m",
        "gspo.demo",
        "--base-only",
        "--seed",
        str(seed),
        "--output",
        str(folder),
    ]
    if run_process(command, log) != 0:
        return f"{shlex.join(command)}: see {log}"
    (folder / "done").touch()
    return None


def train(run: Run, *, work: Path) -> str | None:
    """One run in a process of its own; says what failed."""
    folder = work / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command, log = run.command(work), folder / "log.txt"
    started = time.perf_counter()
    code = run_process(command, log)
    if code != 0 and NOT_FINITE not in log.read_text():
        return f"{shlex.join(command)}: exit status {code}, see {log}"
    found = {
        "command": shlex.join(command),
        "folder": str(folder),
        "seconds": time.perf_counter() - started,
    }
    record = asdict(run) | summarize(folder, steps=run.steps) | found
    for checkpoint in folder.glob("epoch_*"):
        shutil.rmtree(checkpoint)
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")  # last: the run is done
    return None


def run_process(command: list[str], log: Path) -> int:
    """Runs a command on one thread, its output in ``log``; the exit status."""
    tqdm.write(f"{log.parent}: {shlex.join(command)}")
    paths = [str(HERE), str(HERE.parent / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TQDM_MININTERVAL": "20",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with log.open("w") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode


def summarize(folder: Path, *, steps: int) -> dict[str, Any]:
    """What a run's ``metrics.jsonl`` says; a metric is left out where it is not a number."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    trained = [row for row in rows if "lr" in row]
    base, final, best = curve[0][1], curve[-1][1], max(accuracy for _, accuracy in curve)
    finite = rows[-1]["step"] == steps and all("grad_norm" in row for row in trained)
    reasons = {
        "not finite": not finite,
        "fell from its best": final < best - FALL,
        "below the base": final < base,
    }
    return {
        "curve": curve,
        "base": base,
        "final": final,
        "best": best,
        "collapsed": [reason for reason, holds in reasons.items() if holds],
        "skipped_steps": trained[-1]["skipped_steps"],
        "staleness/max": max(row["staleness/max"] for row in trained),
        "means": {
            name: statistics.fmean(found)
            for name in MEANS
            if (found := [r[name] for r in rows if name in r])
        },
    }


def read_runs(work: Path, steps: int) -> list[dict[str, Any]]:
    """The records of all runs of so many steps."""
    return [json.loads(file.read_text()) for file in sorted(work.glob(f"{steps}-*/run.json"))]


def choose(args: argparse.Namespace, objective: str) -> tuple[float, str]:
    """Learning rate and band of the sweep's best run."""
    grid = [(lr, band) for lr in args.lrs for band in args.bands]
    if len(grid) == 1:
        return grid[0]
    records = [
        r
        for r in read_runs(args.work, args.steps)
        if (r["objective"], r["seed"]) == (objective, SWEEP_SEED)
    ]
    scores = {(r["lr"], r["band"]): score(r) for r in records}
    return max(grid, key=lambda setting: scores[setting])


def score(record: dict[str, Any]) -> float:
    """What the sweep goes by."""
    return statistics.fmean(accuracy for _, accuracy in record["curve"][-3:])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; not a number for one value."""
    count = len(values)
    half = STUDENT[count] * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(values), half


def report(args: argparse.Namespace) -> None:
    """Table, JSON and picture of what is there."""
    records = read_runs(args.work, args.steps)
    compared = [r for r in records if r["seed"] != SWEEP_SEED and r["condition"] in args.conditions]
    compared = [
        r for r in compared if r["objective"] in args.objectives and r["seed"] in args.seeds
    ]
    if not compared:
        sys.exit(f"There is no finished run of {args.steps} steps in {args.work} to report.")
    table = [row_of(group, compared) for group in groups(compared)]
    sweep = [r for r in records if r["seed"] == SWEEP_SEED]
    relation = [
        *clip_relation("compared", compared),
        *clip_relation("with the sweep's", [*compared, *sweep]),
    ]
    print_rows(
        f"{args.steps} steps; mean over seeds, with half the width of its 95 % interval (t)", table
    )
    settings = ("objective", "lr", "band", "final", "best", "collapsed", "clip/binding_token")
    swept = [{k: (r | r["means"]).get(k) for k in settings} | {"score": score(r)} for r in sweep]
    print_rows(
        f"sweep (plain, seed {SWEEP_SEED}); the highest score of an objective is taken", swept
    )
    print_rows("final accuracy and collapses by a run's mean clip/binding_token", relation)
    to = args.json or args.work / "learning.json"
    found = {
        "hardware": hardware(),
        "steps": args.steps,
        "table": table,
        "sweep": swept,
        "clip": relation,
    }
    of_this_machine = ("command", "folder")
    runs = [{k: v for k, v in r.items() if k not in of_this_machine} for r in records]
    found |= {"rank_correlation": rank_correlations(compared), "runs": runs}
    print(
        "Spearman's correlation of clip/binding_token and final accuracy:",
        json.dumps(found["rank_correlation"]),
    )
    to.write_text(json.dumps(without_nan(found), indent=2) + "\n")
    picture = args.picture or args.work / "learning.png"
    draw(compared, [c for c in CONDITIONS if any(r["condition"] == c for r in compared)], picture)
    print(f"\nWritten: {to}, {picture}")


def groups(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ by their seed alone, conditions and objectives in their own order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (*(record[k] for k in ("condition", "objective", "lr", "band")),)
        found.setdefault(key, []).append(record)
    order = list(CONDITIONS), list(OBJECTIVES)
    return [
        found[key]
        for key in sorted(found, key=lambda k: (order[0].index(k[0]), order[1].index(k[1]), k[2:]))
    ]


def row_of(group: list[dict[str, Any]], compared: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table; ``minus gspo`` is over the seeds that both have, which share a base policy."""
    first = group[0]
    final, half = interval([r["final"] for r in group])
    row = {k: first[k] for k in ("condition", "objective", "lr", "band")} | {
        "seeds": len(group),
        "base": statistics.fmean(r["base"] for r in group),
        "final": final,
        "+-": half,
        "best": statistics.fmean(r["best"] for r in group),
        "collapsed": sum(bool(r["collapsed"]) for r in group),
    }
    rivals = [
        r for r in compared if r["objective"] == "gspo" and r["condition"] == first["condition"]
    ]
    at_this_rate = [r for r in rivals if r["lr"] == first["lr"]]
    rival = {r["seed"]: r for r in at_this_rate or rivals}
    differences = [r["final"] - rival[r["seed"]]["final"] for r in group if r["seed"] in rival]
    row["minus gspo"], row["its +-"] = (
        interval(differences) if differences else (math.nan, math.nan)
    )
    for name in ("clip/binding_token", "clip/any_document", "staleness/mean", "mismatch/rms_token"):
        values = [r["means"][name] for r in group if name in r["means"]]
        row[name] = statistics.fmean(values) if values else math.nan
    row["seconds"] = statistics.fmean(r["seconds"] for r in group)
    return row


def clip_relation(runs: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of each objective by how much of their tokens the clip stopped."""
    rows = []
    for objective in OBJECTIVES:
        own = [
            r for r in records if r["objective"] == objective and "clip/binding_token" in r["means"]
        ]
        for low, high in zip((0.0, *CLIP_BINS), CLIP_BINS, strict=False):
            inside = [r for r in own if low <= r["means"]["clip/binding_token"] < high]
            if inside:
                row = {
                    "runs": runs,
                    "objective": objective,
                    "from": low,
                    "to": high,
                    "count": len(inside),
                }
                final = statistics.fmean(r["final"] for r in inside)
                rows.append(
                    row | {"final": final, "collapsed": sum(bool(r["collapsed"]) for r in inside)}
                )
    return rows


def rank_correlations(records: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's, over the runs of an objective in all conditions; an objective that never clips has none."""
    found = {}
    for objective in OBJECTIVES:
        own = [
            r for r in records if r["objective"] == objective and "clip/binding_token" in r["means"]
        ]
        pairs = np.array([(r["means"]["clip/binding_token"], r["final"]) for r in own]).reshape(
            -1, 2
        )
        if len(pairs) > 2 and np.ptp(pairs, axis=0).all():
            ranks = [
                [(column < x).mean() + (column <= x).mean() for x in column] for column in pairs.T
            ]
            found[objective] = round(float(np.corrcoef(ranks)[0, 1]), 3)
    return found


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    lines = [list(rows[0]), *([shown(x) for x in row.values()] for row in rows)] if rows else []
    print("\n".join(["", title, *(aligned(lines) if lines else [])]))


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "no"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def draw(records: list[dict[str, Any]], conditions: list[str], path: Path) -> None:
    """Two panels for each condition: held-out accuracy, and its difference to GSPO's on the same base policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(conditions), figsize=(5 * len(conditions), 8), sharex=True, sharey="row", squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for (above, below), condition in zip(axes.T, conditions, strict=True):
        rival: dict[int, dict[int, float]] = {}
        for group in groups(r for r in records if r["condition"] == condition):
            objective, curves = (
                group[0]["objective"],
                {r["seed"]: dict(map(tuple, r["curve"])) for r in group},
            )
            rival = curves if objective == "gspo" else rival
            look = {
                "color": f"C{list(OBJECTIVES).index(objective)}",
                "label": objective,
                "markersize": 3,
            }
            plot(above, list(curves.values()), look)
            paired = [
                {
                    step: value - rival[seed][step]
                    for step, value in curve.items()
                    if step in rival[seed]
                }
                for seed, curve in curves.items()
                if seed in rival
            ]
            plot(below, paired, look)
        above.set_title(condition, fontsize=10)
        below.set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("held-out accuracy, mean over seeds")
    axes[1, 0].set_ylabel("less GSPO's of the same seed, mean and 95 % interval")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot(axis: Any, curves: list[dict[int, float]], look: dict[str, Any]) -> None:
    """The mean of curves by step; of differences, which start at 0, with its interval."""
    steps = (
        sorted(set.intersection(*map(set, curves))) if curves else []
    )  # one that gave up is shorter
    found = np.array([interval([curve[step] for curve in curves]) for step in steps]).reshape(-1, 2)
    mean, half = found[:, 0], np.nan_to_num(found[:, 1])
    axis.plot(steps, mean, marker="o", **look)
    if mean.size and mean[0] == 0:
        axis.fill_between(
            steps, mean - half, mean + half, color=look["color"], alpha=0.1, linewidth=0
        )
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
