import signal
import threading

import pytest

from gptfast.training.signals import Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Harmless handlers, which `Interrupts` replaces."""
    mine = [lambda number, frame: None, signal.SIG_IGN]
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, mine, strict=True)]
    yield mine
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def current() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("first", SIGNALS)
def test_interrupts_raise_at_a_second_ctrl_c(first):
    with Interrupts():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", SIGNALS)
def test_interrupts_do_not_raise_at_repeated_sigterm(first):
    """A process manager may signal the process group, and its leader once more."""
    with Interrupts() as interrupts:
        assert not interrupts.requested
        try:
            for number in (first, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(number)
        except KeyboardInterrupt:  # would end pytest
            pytest.fail("SIGTERM raised KeyboardInterrupt")
    assert interrupts.requested


def test_interrupts_restore_the_handlers(handlers):
    with Interrupts():
        assert not set(current()) & set(handlers)
    assert current() == handlers
    with pytest.raises(KeyboardInterrupt), Interrupts():
        raise KeyboardInterrupt
    assert current() == handlers


def test_interrupts_do_nothing_outside_the_main_thread(handlers):
    found = []

    def run():
        with Interrupts() as interrupts:
            found.append(current())
        found.append(interrupts.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [handlers, False]
    assert current() == handlers
