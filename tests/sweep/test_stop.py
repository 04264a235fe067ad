"""Signals: an orderly end where there is something to end, at once where there is not, or on a second Ctrl-C."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys, time
from sweep.execution.signals import Stop
try:
    (stop := Stop()).install()
    stop.patient = {patient}
    print("ready", flush=True)
    while not stop.asked.is_set():
        time.sleep(0.02)
    print("orderly", flush=True)
    time.sleep({busy})
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.exit(3)
"""


def begin(patient: bool, busy: float = 0.0) -> subprocess.Popen[str]:
    code = PROGRAM.format(patient=patient, busy=busy)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert heard(process) == "ready"
    return process


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(("patient", "word"), [(True, "orderly"), (False, "interrupted")])
def test_a_signal_asks_for_the_end(number: signal.Signals, patient: bool, word: str) -> None:
    process = begin(patient)
    process.send_signal(number)
    assert heard(process) == word
    assert process.wait(10) == 3


def test_a_second_ctrl_c_ends_at_once_and_a_second_term_does_not() -> None:
    process = begin(patient=True, busy=60)
    process.send_signal(signal.SIGTERM)
    assert heard(process) == "orderly"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 75
