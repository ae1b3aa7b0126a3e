"""Being asked to stop: the step is finished, the code is the documented one, the old handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from perl_vlm.errors import PerlVlmError
from perl_vlm.train.signals import StopOnSignal, Stopped


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_the_code_tells_why(number: int, code: int) -> None:
    before = signal.getsignal(number)
    done: list[object] = []

    def loop() -> None:
        with StopOnSignal() as stop:
            for step in range(1, 10):
                if step == 3:
                    assert not stop.requested
                    kill(number)
                done.append(step)
                if stop.requested:
                    done.append("saved")
                stop.raise_if_requested()

    with pytest.raises(Stopped) as caught:
        loop()
    assert done == [1, 2, 3, "saved"]
    assert caught.value.code == code
    assert isinstance(caught.value, PerlVlmError)
    assert "--resume" in str(caught.value)
    assert signal.getsignal(number) is before


def test_a_second_interrupt_stops_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def loop() -> None:
        with StopOnSignal() as stop:
            for step in range(3):
                kill(signal.SIGINT)
                assert stop.requested
                done.append(step)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert done == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_repeated_sigterm_is_patient_and_the_first_cause_counts() -> None:
    with pytest.raises(Stopped) as caught, StopOnSignal():
        [kill(number) for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)]
    assert caught.value.code == 143


def test_the_first_interrupt_says_how_to_stop_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped), StopOnSignal():
        kill(signal.SIGINT)
    captured = capfd.readouterr()
    assert "again" in captured.err
    assert captured.out == ""


def test_a_request_that_nobody_acted_on_is_not_lost() -> None:
    with pytest.raises(Stopped) as caught, StopOnSignal():
        kill(signal.SIGTERM)
    assert caught.value.code == 143


def test_another_error_passes_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        kill(signal.SIGTERM) or 1 / 0


def test_without_a_signal_nothing_happens_and_a_second_block_is_clean() -> None:
    stop = StopOnSignal()
    with stop:
        stop.raise_if_requested()
        with pytest.raises(Stopped), StopOnSignal():
            kill(signal.SIGTERM)
        assert not stop.requested
    assert stop.code is None


def test_in_another_thread_it_does_nothing() -> None:
    failures: list[BaseException] = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        try:
            with StopOnSignal() as stop:
                assert signal.getsignal(signal.SIGTERM) is before
                stop.raise_if_requested()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
