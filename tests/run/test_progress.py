import logging
import math
import sys

import pytest
import torch

from gspo.run import Progress


def test_throughput_divides_slots_by_seconds():
    progress = Progress(3, torch.nn.Linear(2, 2), torch.device("cpu"), shown=False)
    with progress:
        speed = progress.advance({"_slots": 500.0})
    assert speed["tokens_per_second"] == 500.0 / speed["time/step"]
    assert speed.keys() == {"tokens_per_second", "time/step"}  # no GPU's


def test_the_bar_shows_a_dash_for_what_a_step_does_not_have():
    progress = Progress(3, torch.nn.Linear(2, 2), torch.device("cpu"), shown=False)
    shown = []
    with progress:
        progress._bar.set_postfix = shown.append
        progress.show({"eval/accuracy": 0.25})
        progress.show({"reward/mean": 0.5, "clip/any_document": 0.125})
        progress.show({"clip/any_document": math.nan, "tokens_per_second": 10.0})
    assert shown == [
        {"reward": "-", "held-out": "0.25", "clip": "-", "tok/s": "-"},
        {"reward": "0.5", "held-out": "0.25", "clip": "0.125", "tok/s": "-"},
        {"reward": "-", "held-out": "0.25", "clip": "-", "tok/s": "10"},
    ]


def test_a_gpu_s_share_of_its_peak_is_that_of_the_update_alone(monkeypatch):
    """Sampling is most of a step and none of the update."""
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    monkeypatch.setattr(cuda, "max_memory_reserved", lambda _: 4 * 2**30)
    monkeypatch.setattr(cuda, "memory_stats", lambda _: {"num_alloc_retries": 2})
    monkeypatch.setattr(cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    progress = Progress(3, torch.nn.Linear(2, 2), torch.device("cuda"), shown=False)
    with progress:
        progress._step_began -= 100
        speed = progress.advance({"_slots": 1e12, "time/update": 0.5})
    assert speed["mfu"] == 6 * 6 * 1e12 / (0.5 * 2 * 989e12)
    assert speed["peak_memory_gib"] == 3 and speed["reserved_memory_gib"] == 4
    assert speed["alloc_retries"] == 2


@pytest.mark.parametrize("name", ["gspo.alone", "torchtune.utils._logging"])
def test_a_warning_has_a_line_of_its_own_above_the_bar(monkeypatch, capsys, name):
    """Loggers of the pack have no handler, torchtune's has one for the console."""
    logger = logging.getLogger(name)
    handlers = [] if name == "gspo.alone" else [logging.StreamHandler(sys.stderr)]
    monkeypatch.setattr(logger, "handlers", handlers)
    monkeypatch.setattr(logger, "propagate", False)  # pytest listens at the root
    last_resort = logging.lastResort
    progress = Progress(3, torch.nn.Linear(2, 2), torch.device("cpu"), shown=True)
    with progress:
        progress.advance({"_slots": 5.0})
        logger.warning("look at this")
    assert "look at this" in capsys.readouterr().err.split("\n")
    assert logger.handlers is handlers and logging.lastResort is last_resort
