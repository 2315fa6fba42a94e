"""The command line of ``python -m gspo plan``, and its report as text.

Not here: any number that is not on the command line or in the plan.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from gspo.commands.output import write_json
from gspo.commands.validate import read_checked
from gspo.config.checks import require
from gspo.config.command_line import show_errors
from gspo.errors import InputError
from gspo.plan.estimate import DEFAULT_RATES, GIB, Machine, Planner
from gspo.plugin import CONFIGS_OF_OTHER_RECIPES

_UNITS = {"GIB": 2**30, "MIB": 2**20, "TIB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}


@show_errors
def main(arguments: list[str]) -> None:
    """Plans a config, a file or a registered name, with the ``key=value`` overrides that follow it.

    Raises:
        InputError: an option is not understood, or the config cannot run on so many ranks or at all.
    """
    args = _parse(arguments)
    require(
        args.world_size >= 1,
        "--world-size",
        args.world_size,
        "must be at least 1",
        "give the number of ranks",
    )
    require(
        args.ranks_per_node >= 1,
        "--ranks-per-node",
        args.ranks_per_node,
        "must be at least 1",
        "give a node's ranks",
    )
    require(
        args.config not in CONFIGS_OF_OTHER_RECIPES, "--config", args.config,
        "is for a recipe of torchtune's own", "plan one for gspo_full_finetune",
    )  # fmt: skip
    memory = parse_memory(args.gpu_memory)
    cfg = read_checked([args.config, *args.overrides])
    rates = DEFAULT_RATES["cpu" if cfg.device == "cpu" else "cuda"]
    given = {
        name: getattr(args, name) if getattr(args, name) is not None else rate
        for name, rate in rates.items()
    }
    for name, rate in given.items():
        require(
            rate > 0,
            f"--{name.replace('_', '-')}",
            rate,
            "must be above 0",
            "give the rate that is reached",
        )
    machine = Machine(memory=memory, ranks_per_node=args.ranks_per_node, **given)
    planner = Planner(cfg, machine, args.mean_document_tokens)
    plan = {"config": args.config} | planner.plan(args.world_size)
    plan["remedies"] = [] if plan["memory"]["fits"] else planner.remedies(args.world_size)
    if args.json is None:
        print(report(plan))
    elif args.json == "-":
        print(json.dumps(plan))
    else:
        write_json(args.json, json.dumps(plan, indent=2))
        print(f"wrote {args.json}", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gspo plan",
        description="Memory and time of an optimizer step on a machine that is not here.",
    )
    parser.add_argument("--config", required=True, help="a file or a registered name")
    parser.add_argument("--world-size", type=int, required=True, help="ranks, one per GPU")
    parser.add_argument(
        "--gpu-memory", default="80GiB", help="of a rank's device; default %(default)s"
    )
    parser.add_argument(
        "--mean-document-tokens", type=int, help="prompt and completion; default: a stated guess"
    )
    parser.add_argument("--tflops", type=float, help="1e12 operations a second that are reached")
    parser.add_argument(
        "--link-gbps", type=float, help="1e9 bits a second of a rank inside a node, one direction"
    )
    parser.add_argument("--node-link-gbps", type=float, help="the same between nodes")
    parser.add_argument(
        "--memory-gbytes", type=float, help="1e9 bytes a second of the device's memory"
    )
    parser.add_argument("--ranks-per-node", type=int, default=8, help="default %(default)s")
    parser.add_argument(
        "--json", metavar="FILE", help="write the plan as JSON, - for the standard output"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def parse_memory(text: str) -> int:
    """Bytes of a text such as ``80GiB`` or ``141 GB``.

    Raises:
        InputError: it is not such a text.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise InputError(
            f"--gpu-memory: {text!r} is not an amount of memory; write one such as 80GiB or 80GB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def report(plan: dict[str, Any]) -> str:
    """The plan in lines for people."""
    layout, memory = plan["layout"], plan["memory"]
    limit, peak = memory["limit"], memory["peak"]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    lines = [
        f"{plan['config']} on {plan['world_size']} ranks: {verdict}. Expected, nothing here is measured.",
        f"{layout['parameters']:,} parameters in {layout['dtype']}, {layout['num_layers']} layers; mesh "
        f"{layout['replicate_size']} replicate x {layout['data_ranks'] // layout['replicate_size']} shard x "
        f"{layout['context_size']} context; {layout['bins']} bins of {layout['bin_length']:,}, "
        f"{layout['places']:,} tokens on a rank",
        "",
        f"Memory of a rank at its peak, {peak['moment']}:",
        *(
            f"  {_gib(size)}  {name}"
            for name, size in sorted(peak["parts"].items(), key=lambda x: -x[1])
            if size > 1e5
        ),
        f"  {_gib(peak['bytes'])}  in all; {_gib(memory['reserve']).strip()} reserved, of {_gib(limit).strip()}",
        "",
        "Peak of each moment:",
        *(
            f"  {_gib(sum(parts.values()))}  {moment}"
            for moment, parts in memory["moments"].items()
        ),
        "",
        "Held all the time, and the gradients during the backward:",
        *(f"  {_gib(size)}  {name}" for name, size in memory["always"].items()),
        "Kept by all layers for the backward:",
        *_activations(memory["activations"]),
        "",
        *_work_lines(plan),
    ]
    if plan["remedies"]:
        lines += ["", "What would help, each planned (peak, saving):"]
        for r in plan["remedies"]:
            verdict = "fits" if r["fits"] else "does not fit"
            lines.append(
                f"  {_gib(r['peak'])}  saves {_gib(r['saves']).strip():>11}  {verdict:12}  {r['change']}"
            )
    return "\n".join([*lines, "", "Assumed:", *(f"- {line}" for line in plan["assumptions"])])


def _activations(found: dict[str, Any]) -> list[str]:
    used = found["checkpointing"]
    return [
        f"  {_gib(found['kept_with_checkpointing'])}  with checkpointing{', as configured' * used}",
        f"  {_gib(found['kept_without_checkpointing'])}  without{', as configured' * (not used)}",
    ]


def _work_lines(plan: dict[str, Any]) -> list[str]:
    work, seconds, machine = plan["work"], plan["time"], plan["machine"]
    lines = [f"Operations of an optimizer step on a rank, {work['microbatches']} microbatches:"]
    lines += [
        f"  {count / 1e12:10,.2f} T  {name}" for name, count in work["operations"].items() if count
    ]
    lines += ["", "Received by a rank in an optimizer step (of that between nodes):"]
    for row in plan["transfers"]:
        if row["received"] > 1e5:
            lines.append(
                f"  {_gib(row['received'])} ({_gib(row['received_between_nodes']).strip()})  {row['purpose']}, "
                f"{row['kind']} over {row['ranks']} ranks, {row['calls']:.0f} calls, {row['seconds']:.3g} s"
            )
    lines += [
        "",
        f"Expected time at {machine['tflops']:g} TFLOP/s, {machine['link_gbps']:g} Gbit/s inside a node of "
        f"{machine['ranks_per_node']} and {machine['node_link_gbps']:g} between nodes:",
        f"  {seconds['update']:8.3g} s  update, FSDP2's transfers behind the products",
        f"  {seconds['update_without_overlap']:8.3g} s  update, nothing behind anything",
        f"  {seconds['sync']:8.3g} s  weights to the sampler, a step's share",
    ]
    if "sampling" in seconds:
        rate = f"{machine['memory_gbytes']:g} GB/s"
        lines.append(
            f"  {seconds['sampling']:8.3g} s  sampling at least, a step's share, memory read at {rate}"
        )
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:8.2f} MiB"
