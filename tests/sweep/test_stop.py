"""Signals: an orderly end while trials run, an interrupt before that, and an end at once on a second Ctrl-C."""

import signal
import subprocess
import sys
import threading

import pytest

from sweep.execution.signals import SIGNALS, StopRequest

PROGRAM = """
import time
from sweep.execution.signals import StopRequest
with StopRequest(exits=True) as stop:
    stop.graceful = True
    print("ready", flush=True)
    while not stop.requested.is_set():  # an Event that a handler sets must not be waited for
        time.sleep(0.02)
    print("orderly", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_interrupts_unless_trials_run(number: signal.Signals) -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    with StopRequest() as stop:
        stop.graceful = True
        signal.raise_signal(number)
        assert stop.requested.is_set()


def test_second_ctrl_c_exits_and_second_term_does_not() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "orderly\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 75


def test_second_ctrl_c_interrupts_a_caller_in_python() -> None:
    with StopRequest() as stop:
        stop.graceful = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_restored_and_other_threads_have_none() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []

    def enter() -> None:
        with StopRequest():
            inside.extend(signal.getsignal(number) for number in SIGNALS)

    (thread := threading.Thread(target=enter)).start()
    thread.join()
    assert inside == before
    enter()
    assert inside[len(before) :] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
