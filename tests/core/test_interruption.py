"""Signals: what is in hand is finished first, a second one ends at once, and other handlers come back."""

import os
import signal
import threading

import pytest
from processes import environment, start

from diffalign.core import interruption
from diffalign.core.interruption import SIGNALS, Interrupted, Interruption, ends_at_once

pytestmark = pytest.mark.usefixtures("signals")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_work_in_hand(number, capfd):
    done = []
    with Interruption("the update in hand is saved") as work:
        for i in range(5):
            if i == 2:
                os.kill(os.getpid(), number)
            done.append(i)
            if work.number:
                break
    assert done == [0, 1, 2]
    assert work.number == number
    said = capfd.readouterr().err.strip()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert said == f"{name}: the update in hand is saved; a second one ends at once"


def test_work_that_can_be_left_out_is_broken_off():
    done = []
    with Interruption("") as work:
        with work.breaks_off():
            done.append("begun")
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("not reached")
        done.append("saved")
        with work.breaks_off():
            done.append("only one signal is answered")
    assert done == ["begun", "saved", "only one signal is answered"]


def test_outside_of_loops_a_signal_ends_at_once():
    """It passes what forgives errors."""

    def work(number):
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("swallowed")

    for number in SIGNALS:
        with pytest.raises(Interrupted) as caught, ends_at_once():
            work(number)
        assert caught.value.exit_code == 128 + number
        assert isinstance(caught.value, KeyboardInterrupt)


def test_ignored_signals_stay_ignored_and_threads_install_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ends_at_once(), Interruption("") as work:
            os.kill(os.getpid(), signal.SIGHUP)
            assert work.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)

    def other():
        with Interruption("") as work:
            found.append(work.number)

    found = []
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(second):
    variables = {k: v for k, v in environment().items() if k != "LOCAL_RANK"}
    process = start("second_signal", env=variables)
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(second)
    process.communicate()
    assert process.returncode == -second


def test_a_signal_that_a_launcher_repeats_is_one_signal(monkeypatch):
    """Of torchrun: the terminal's, and the launcher's right after it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(interruption, "SETTLING", 60)
    with Interruption("") as work:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert work.number == signal.SIGINT
