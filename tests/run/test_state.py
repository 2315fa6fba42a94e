import math

import pytest

from gspo.errors import InputError
from gspo.run import TrainState


def test_steps_are_numbered_from_1_in_the_warning_of_a_skipped_one(caplog):
    state = TrainState()
    state.finish_step(True, 1.0, max_skipped=1)
    state.finish_step(False, math.nan, max_skipped=1)
    assert caplog.messages == ["Step 2 is skipped: its gradient norm is nan."]
    state.finish_step(True, 1.0, max_skipped=1)
    state.finish_step(False, math.inf, max_skipped=1)
    with pytest.raises(InputError, match="^max_skipped_steps: 1 is exceeded: 2 steps in a row"):
        state.finish_step(False, math.inf, max_skipped=1)
    assert (state.step, state.num_skipped) == (5, 3)


def test_first_evaluation_is_kept_beside_the_last():
    state = TrainState()
    state.keep_evaluation({"eval/accuracy": 0.25})
    state.step = 7
    state.keep_evaluation({"eval/accuracy": 0.5})
    assert (state.accuracy_before, state.accuracy_after, state.evaluated_at) == (0.25, 0.5, 7)
