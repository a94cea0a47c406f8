from __future__ import annotations

import time

from shoal.deploy.nearest import did_you_mean


def test_names_the_nearest() -> None:
    assert did_you_mean("temperatur", ["top_p", "temperature"]) == "; did you mean 'temperature'?"
    assert did_you_mean("colour", ["top_p", "temperature"]) == ""
    assert did_you_mean("x", ()) == ""


def test_long_names_cost_little() -> None:
    started = time.monotonic()
    assert did_you_mean("temperature" * 100_000, ["temperature" * 100]) == ""
    assert time.monotonic() - started < 1.0
