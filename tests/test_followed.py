"""What is known of one tracked operator: its value, how fast it moves, and how far it can be trusted."""

from __future__ import annotations

import pytest

from sharpkern.eigen import WarmLanczos
from sharpkern.tracking.followed import Followed


def test_doubt_adds_up_what_is_known_of_the_value() -> None:
    """Error bound of the solve, rounding, what forms have moved since it, and the drift since the value was seen."""
    followed = Followed(WarmLanczos(), value=2.0, seen=3, speed=0.2, error_bound=0.1, rounding=0.01, eigenvalues=(1.5,))
    assert followed.turned == pytest.approx(2.0 / 1.5 - 1)
    assert followed.drift(5) == pytest.approx(0.4)
    assert followed.doubt(5) == pytest.approx(0.1 + 0.02 + 0.5 + 0.8)


@pytest.mark.parametrize("change", [-0.3, 0.3])
def test_speed_is_the_size_of_the_change_whatever_its_sign(change: float) -> None:
    followed = Followed(WarmLanczos(), value=2.0, seen=1, speed=0.0)
    followed._see(2.0 * (1 + change), 4)  # three steps later
    assert followed.speed == pytest.approx(0.3 * 0.3 / 3)
