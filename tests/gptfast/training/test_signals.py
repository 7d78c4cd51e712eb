import signal
import threading

import pytest

from gptfast.training.signals import Interrupts

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers of the program around, under which signals are harmless."""
    mine = [lambda number, frame: None, signal.SIG_IGN]
    before = [signal.signal(number, handler) for number, handler in zip(BOTH, mine, strict=True)]
    yield mine
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_interrupts_nothing(number):
    with Interrupts() as interrupts:
        assert not interrupts.requested
        signal.raise_signal(number)
        assert interrupts.requested


@pytest.mark.parametrize("first", BOTH)
def test_a_second_ctrl_c_interrupts_at_once(first):
    with Interrupts():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", BOTH)
def test_more_of_sigterm_does_not(first):
    """Those who end processes may send it to a whole group, and to its first process once more."""
    raised = []
    with Interrupts() as interrupts:
        try:
            for number in (first, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(number)
        except KeyboardInterrupt as error:  # which would end pytest
            raised.append(error)
    assert (interrupts.requested, raised) == (True, [])


def current() -> list:
    return [signal.getsignal(number) for number in BOTH]


def test_the_handlers_of_before_are_put_back(handlers):
    with Interrupts():
        assert not set(current()) & set(handlers)
    assert current() == handlers
    with pytest.raises(KeyboardInterrupt), Interrupts():
        raise KeyboardInterrupt
    assert current() == handlers


def test_one_within_the_other(handlers):
    with Interrupts() as outer:
        with Interrupts() as inner:
            signal.raise_signal(signal.SIGINT)
        assert (outer.requested, inner.requested) == (False, True)
        signal.raise_signal(signal.SIGINT)
        assert outer.requested
    assert current() == handlers


def test_in_another_thread_nothing_happens(handlers):
    found = []

    def elsewhere():
        with Interrupts() as interrupts:
            found.append(current())
        found.append(interrupts.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [handlers, False]
    assert current() == handlers
