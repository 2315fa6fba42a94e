"""What a loss of the user's own returns is refused by its name where it is nonsense."""

import pytest
import torch

from gspo.errors import InputError
from gspo.losses.checked import CheckedLoss, denominator_of
from gspo.metrics import Mean, NotFinite


class Mine:
    """A loss that returns what the test gives it."""

    def __init__(self, alter=None, stated=4.0):
        self.alter = alter
        self.stated = stated

    def __call__(self, logps, entropy, inputs):
        return self.alter(-logps.sum())

    def denominator(self, num_documents, num_label_tokens):
        return self.stated


def call(alter):
    logps = torch.full((3,), -1.0, requires_grad=True)
    return CheckedLoss(Mine(alter))(logps, torch.zeros(3), None)


def with_metric(value, name="own/x"):
    return lambda loss: (loss, {name: value})


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda loss: loss, "a loss and its metrics, and gave tensor"),
        (lambda loss: None, "a loss and its metrics, and gave None"),
        (lambda loss: (loss, {}, None, 1), "a loss and its metrics, and gave (tensor"),
        (lambda loss: (loss.item(), {}), "one loss sum, a tensor of one element, and gave 3.0"),
        (lambda loss: (loss * torch.ones(2), {}), "one loss sum, a tensor of one element"),
        (lambda loss: (loss.detach(), {}), "a loss with a gradient by logps"),
        (lambda loss: (loss, None), "its metrics as a mapping, and gave None"),
        (lambda loss: (loss, {}, 3), "a NotFinite or None as its third result, and gave 3"),
        (with_metric((1, 1), 5), "metrics by names of printable text, and gave 5"),
        (with_metric((1, 1), "a\nb"), "metrics by names of printable text, and gave 'a"),
        (with_metric(5), "the metric 'own/x' as a pair of numbers, value and weight, and gave 5"),
        (with_metric((1, 2, 3)), "the metric 'own/x' as a pair of numbers"),
        (with_metric(("a", "b")), "the metric 'own/x' as a pair of numbers"),
        (with_metric((torch.ones(3), 1.0)), "the metric 'own/x' as a pair of numbers"),
        (with_metric((10**5000, 1.0)), "the metric 'own/x' as a pair of numbers"),
        (with_metric(Mean("a", 1)), "the metric 'own/x' as a pair of numbers"),
    ],
    ids=[
        *("bare", "none", "four", "number", "vector", "detached", "no_metrics", "no_counts"),
        *("number_as_name", "line_break", "no_pair", "triple", "texts", "tensors", "huge", "mean"),
    ],
)
def test_nonsense_is_refused_by_the_name_of_the_loss(alter, message):
    with pytest.raises(InputError) as caught:
        call(alter)
    assert str(caught.value).startswith(f"loss: 'Mine' must return {message}")


def test_plain_results_and_full_ones_pass():
    metrics = {"own/a": (torch.ones(()), 1), "own/b": Mean(float("nan"), 2.0)}
    loss, same, not_finite = call(lambda loss: (loss, metrics))
    assert (loss.item(), same, not_finite) == (3.0, metrics, None)
    assert call(lambda loss: (loss, {}, NotFinite(0, 0))).not_finite == NotFinite(0, 0)


def test_a_loss_without_a_gradient_passes_where_none_is_asked_for():
    loss = CheckedLoss(Mine(lambda loss: (loss, {})))
    with torch.no_grad():
        assert float(loss(torch.zeros(3), torch.zeros(3), None).loss) == 0


@pytest.mark.parametrize("stated", [0, -5, float("nan"), float("inf"), "x", None, 10**400])
def test_denominator_is_a_number_above_0(stated):
    loss = CheckedLoss(Mine(stated=stated))
    with pytest.raises(InputError, match="^loss: 'Mine' must have a denominator above 0 for 9 tok"):
        denominator_of(loss, 3, 9)
    assert denominator_of(loss, 0, 0) == 1  # nothing is left


@pytest.mark.parametrize("stated", [0.25, 3, torch.tensor(7.0)])
def test_denominator_is_taken_as_it_is(stated):
    assert denominator_of(CheckedLoss(Mine(stated=stated)), 3, 9) == float(stated)
