"""Code of the user's that would end a run says so instead, and Ctrl-C stays what it is."""

import os
import signal

import pytest

from gspo.errors import exits_raise, first_line


def test_exit_of_the_process_raises():
    end_process = os._exit
    with pytest.raises(SystemExit, match=r"os\._exit\(3\)"), exits_raise():
        os._exit(3)
    assert os._exit is end_process


def test_a_forked_process_ends():
    with exits_raise():
        child = os.fork()
        if child == 0:
            os._exit(3)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3


def test_interrupt_of_a_statement_is_an_exit():
    with pytest.raises(SystemExit, match="^KeyboardInterrupt: mine"), exits_raise():
        raise KeyboardInterrupt("mine")


def test_ctrl_c_stays_an_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), exits_raise():
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("text", "line"), [("", ""), ("one", "one"), ("one\ntwo", "one")])
def test_first_line_of_an_error(text, line):
    assert first_line(ValueError(text)) == line
