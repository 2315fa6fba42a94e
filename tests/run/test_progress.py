import math

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
