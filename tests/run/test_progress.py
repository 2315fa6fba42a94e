import torch

from gspo.run import Progress


def test_throughput_divides_slots_by_seconds():
    progress = Progress(3, torch.nn.Linear(2, 2), torch.device("cpu"), shown=False)
    with progress:
        speed = progress.advance({"_slots": 500.0})
    assert speed["tokens_per_second"] == 500.0 / speed["time/step"]
    assert speed.keys() == {"tokens_per_second", "time/step"}  # no GPU's
