"""``python -m gspo plan``: the command line, and the plan as text.

Not here: any number that is not on the command line or in the plan.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from gspo.commands.output import add_json_option, write_result
from gspo.commands.validate import add_recipe_option, read_checked, settings_of
from gspo.config import BaseSettings, Settings, show_errors
from gspo.errors import InputError, require
from gspo.plan.estimate import Planner
from gspo.plan.machine import DEFAULT_RATES, GIB, Machine
from gspo.plan.remedies import remedies
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES

_UNITS = {"GIB": 2**30, "MIB": 2**20, "TIB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}
MAX_WORLD_SIZE = 2**16  # a mesh of torch takes 0.1 ms and 140 bytes a rank, several times over
_SMALLEST_SHOWN = 1e5  # bytes


@show_errors
def main(arguments: list[str]) -> None:
    """Print the memory and time of an optimizer step on a machine that is not here.

    Raises:
        InputError: An option is not understood, or the config cannot run on so many ranks or at
            all.
    """
    args = _parse(arguments)
    _check(args)
    memory = parse_memory(args.gpu_memory)
    cfg = _read(args)
    rates = _rates(args, cfg)
    machine = Machine(memory=memory, ranks_per_node=args.ranks_per_node, **rates)
    planner = Planner(cfg, machine, args.mean_document_tokens)
    world_size = args.world_size
    plan = {"config": args.config} | planner.plan(world_size)
    fits = plan["memory"]["fits"]
    plan["remedies"] = [] if fits else remedies(planner, world_size)
    write_result(plan, report, args.json)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gspo plan",
        description="Memory and time of an optimizer step on a machine that is not here.",
    )
    option = parser.add_argument
    option("--config", required=True, help="a file or a registered name")
    add_recipe_option(parser)
    option("--world-size", type=int, required=True, help="ranks, one per GPU")
    option("--gpu-memory", default="80GiB", help="of a rank's device; default %(default)s")
    option(
        "--mean-document-tokens", type=int, help="prompt and completion; default: a stated guess"
    )
    option("--tflops", type=float, help="1e12 operations a second that are reached")
    option(
        "--link-gbps", type=float, help="1e9 bits a second of a rank inside a node, one direction"
    )
    option("--node-link-gbps", type=float, help="the same between nodes")
    option("--memory-gbytes", type=float, help="1e9 bytes a second of the device's memory")
    option("--launch-us", type=float, help="1e-6 seconds from one kernel's launch to the next")
    option("--ranks-per-node", type=int, default=8, help="default %(default)s")
    add_json_option(parser)
    option("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def _check(args: argparse.Namespace) -> None:
    require(
        args.world_size >= 1,
        "--world-size",
        args.world_size,
        "must be at least 1",
        "give the number of ranks",
    )
    require(
        args.world_size <= MAX_WORLD_SIZE,
        "--world-size",
        args.world_size,
        f"must be at most {MAX_WORLD_SIZE}",
        "give fewer ranks",
    )
    require(
        args.ranks_per_node >= 1,
        "--ranks-per-node",
        args.ranks_per_node,
        "must be at least 1",
        "give a node's ranks",
    )
    require(
        args.config not in CONFIGS_OF_OTHER_RECIPES,
        "--config",
        args.config,
        "is for a recipe of torchtune's own",
        "plan one for gspo_full_finetune",
    )


def _read(args: argparse.Namespace) -> Settings:
    settings: type[BaseSettings] = Settings
    if args.recipe is not None:
        settings = settings_of(args.recipe)
    cfg = read_checked([args.config, *args.overrides], settings)
    if not isinstance(cfg, Settings):
        raise InputError(
            "--recipe",
            args.recipe,
            "has settings of its own kind, which a plan cannot read",
            "derive them from gspo.config.Settings",
        )
    return cfg


def _rates(args: argparse.Namespace, cfg: Settings) -> dict[str, float]:
    """Return the rates of the command line, the defaults where it says nothing."""
    rates = {}
    defaults = DEFAULT_RATES["cpu" if cfg.device == "cpu" else "cuda"]
    for name, default in defaults.items():
        stated = getattr(args, name)
        rate = default if stated is None else stated
        option = f"--{name.replace('_', '-')}"
        is_right = rate > 0 or (rate == 0 and name == "launch_us")
        require(is_right, option, rate, "must be above 0", "give the rate that is reached")
        rates[name] = rate
    return rates


def parse_memory(text: str) -> int:
    """Return the bytes of a text such as ``80GiB`` or ``141 GB``.

    Raises:
        InputError: It is not such a text.
    """
    num_bytes = 0.0
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match:
        number = float(match[1])
        unit = match[2].upper()
        num_bytes = number * _UNITS.get(unit, 0)
    if not num_bytes:
        raise InputError(
            "--gpu-memory", text, "is not an amount of memory", "write one such as 80GiB or 80GB"
        )
    return int(num_bytes)


def report(plan: dict[str, Any]) -> str:
    """Return the plan in lines for people."""
    lines = [
        *_head_lines(plan),
        "",
        *_peak_lines(plan["memory"]),
        "",
        *_memory_lines(plan["memory"]),
        "",
        *_operation_lines(plan["work"]),
        "",
        *_transfer_lines(plan["transfers"]),
        "",
        *_time_lines(plan["time"], plan["machine"]),
        *_remedy_lines(plan["remedies"]),
        "",
        "Assumed:",
    ]
    lines += [f"- {sentence}" for sentence in plan["assumptions"]]
    return "\n".join(lines)


def _head_lines(plan: dict[str, Any]) -> Iterator[str]:
    layout = plan["layout"]
    verdict = "fits" if plan["memory"]["fits"] else "DOES NOT FIT"
    num_shards = layout["data_ranks"] // layout["replicate_size"]
    yield (
        f"{plan['config']} on {plan['world_size']} ranks: {verdict}. "
        "Expected, nothing here is measured."
    )
    yield (
        f"{layout['parameters']:,} parameters in {layout['dtype']}, {layout['num_layers']} layers; "
        f"mesh {layout['replicate_size']} replicate x {num_shards} shard x "
        f"{layout['context_size']} context; {layout['bins']} bins of {layout['bin_length']:,}, "
        f"{layout['slots']:,} tokens on a rank"
    )


def _peak_lines(memory: dict[str, Any]) -> Iterator[str]:
    peak = memory["peak"]
    yield f"Memory of a rank at its peak, {peak['moment']}:"
    largest_first = sorted(peak["parts"].items(), key=lambda item: -item[1])
    for name, size in largest_first:
        if size > _SMALLEST_SHOWN:
            yield f"  {_gib(size)}  {name}"
    reserve = _gib(memory["reserve"]).strip()
    limit = _gib(memory["limit"]).strip()
    yield f"  {_gib(peak['bytes'])}  in all; {reserve} reserved, of {limit}"


def _memory_lines(memory: dict[str, Any]) -> Iterator[str]:
    yield "Peak of each moment:"
    for moment, parts in memory["moments"].items():
        size = sum(parts.values())
        yield f"  {_gib(size)}  {moment}"
    yield ""
    yield "Held all the time, and the gradients during the backward:"
    for name, size in memory["always"].items():
        yield f"  {_gib(size)}  {name}"
    yield "Kept by all layers for the backward:"
    activations = memory["activations"]
    with_it = _gib(activations["kept_with_checkpointing"])
    without = _gib(activations["kept_without_checkpointing"])
    of_with = of_without = ""
    if activations["checkpointing"]:
        of_with = ", as configured"
    else:
        of_without = ", as configured"
    yield f"  {with_it}  with checkpointing{of_with}"
    yield f"  {without}  without{of_without}"


def _operation_lines(work: dict[str, Any]) -> Iterator[str]:
    yield f"Operations of an optimizer step on a rank, {work['microbatches']} microbatches:"
    for name, count in work["operations"].items():
        if count:
            trillions = count / 1e12
            yield f"  {trillions:10,.2f} T  {name}"


def _transfer_lines(transfers: list[dict[str, Any]]) -> Iterator[str]:
    yield "Received by a rank in an optimizer step (of that between nodes):"
    for row in transfers:
        if row["received"] > _SMALLEST_SHOWN:
            received = _gib(row["received"])
            between = _gib(row["received_between_nodes"]).strip()
            yield (
                f"  {received} ({between})  {row['purpose']}, {row['kind']} over "
                f"{row['ranks']} ranks, {row['calls']:.0f} calls, {row['seconds']:.3g} s"
            )


def _time_lines(seconds: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Expected time at {machine['tflops']:g} TFLOP/s, {machine['link_gbps']:g} Gbit/s inside a "
        f"node of {machine['ranks_per_node']} and {machine['node_link_gbps']:g} between nodes:"
    )
    rate = f"{machine['memory_gbytes']:g} GB/s"
    launch = f"{machine['launch_us']:g} us a launch"
    described = {
        "update": "update, FSDP2's transfers behind the products",
        "update_without_overlap": "update, nothing behind anything",
        "loops": "of either, norms, rotations and activations in layers that are not compiled",
        "sync": "weights to the sampler, a step's share",
        "sampling": f"sampling at least, a step's share, memory read at {rate}, {launch}",
    }
    for name, description in described.items():
        if name in seconds:
            of_name = seconds[name]
            yield f"  {of_name:8.3g} s  {description}"


def _remedy_lines(remedies: list[dict[str, Any]]) -> Iterator[str]:
    if not remedies:
        return
    yield ""
    yield "What would help, each planned (peak, saving):"
    for remedy in remedies:
        peak = _gib(remedy["peak"])
        saving = _gib(remedy["saves"]).strip()
        verdict = "fits" if remedy["fits"] else "does not fit"
        yield f"  {peak}  saves {saving:>11}  {verdict:12}  {remedy['change']}"


def _gib(size: float) -> str:
    if size >= GIB / 10:
        return f"{size / GIB:8.2f} GiB"
    return f"{size / 2**20:8.2f} MiB"
