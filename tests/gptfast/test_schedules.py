import pytest

from gptfast.optim import learning_rate


def rates(schedule: str, decay_share: float = 0.2) -> list[float]:
    """A run of 110 steps with 10 of warm-up, from 0.1 to 1."""
    return [learning_rate(schedule, step, 110, 1.0, 0.1, 10, decay_share) for step in range(110)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_all_warm_up_along_a_line(schedule: str):
    rising = rates(schedule)[:11]
    assert rising == pytest.approx([(step + 1) / 11 for step in range(11)])


def test_the_cosine_is_half_way_down_in_the_middle():
    falling = rates("cosine")[10:]
    assert falling[0] == pytest.approx(1.0)
    assert falling[50] == pytest.approx(0.55)
    assert falling[-1] == pytest.approx(0.1, abs=0.001)
    assert falling == sorted(falling, reverse=True)


def test_constant_stays():
    assert rates("constant")[10:] == [1.0] * 100


def test_stable_then_a_line_down():
    after = rates("wsd")[10:]
    assert after[:81] == pytest.approx([1.0] * 81)
    assert after[90] == pytest.approx(0.55)
    assert after[-1] == pytest.approx(0.1 + 0.9 / 20)
    assert rates("wsd", decay_share=0.0)[10:] == [1.0] * 100


def test_a_run_that_is_all_warm_up():
    assert learning_rate("cosine", 5, 6, 1.0, 0.1, 10, 0.2) == pytest.approx(6 / 11)
