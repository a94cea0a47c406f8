"""When a step counts as stuck, and what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from shoal.replicas.channel import step_channel
from shoal.replicas.config import EngineConfig, ModelConfig
from shoal.replicas.errors import ConfigError, EngineError
from shoal.replicas.executors.group_executor import GroupExecutor
from shoal.replicas.executors.group_start import Loaded
from shoal.replicas.executors.step_watchdog import StepWatchdog, is_stopped
from tests.support.engines import facts
from tests.support.step_group import Group, answer
from tests.support.steps import decode_plan, same


def warm(watchdog: StepWatchdog, seconds: float = 0.01) -> StepWatchdog:
    for _ in range(200):
        watchdog.step_ended(seconds)
    return watchdog


def no_names() -> list[str]:
    return []


def test_a_step_is_stuck_above_the_floor_and_twenty_times_the_slow_ones() -> None:
    watchdog = StepWatchdog(floor=5.0)
    assert watchdog.limit == 120.0
    assert warm(watchdog).limit == 5.0
    watchdog.check(5.0, no_names)
    with pytest.raises(EngineError, match=r"a step has taken 5.1 s, above the limit of 5.0 s \(step_limit_s\)"):
        watchdog.check(5.1, no_names)
    assert warm(watchdog, 0.5).limit == 10.0


def test_a_step_that_waits_for_a_stopped_rank_is_stuck_sooner() -> None:
    watchdog = warm(StepWatchdog(floor=60.0))
    watchdog.check(4.9, lambda: ["rank 1"])
    watchdog.check(5.1, no_names)
    with pytest.raises(EngineError, match=r"5.1 s and waits for stopped processes: rank 1"):
        watchdog.check(5.1, lambda: ["rank 1"])


def test_the_floor_is_the_devices_or_the_configurations() -> None:
    config = EngineConfig(ModelConfig("folder"))
    for device, floor in (("cpu", 60.0), ("cuda", 5.0)):
        assert warm(StepWatchdog.of(config.resolve(facts(), device))).limit == floor
    assert warm(StepWatchdog.of(replace(config, step_limit_s=7.0).resolve(facts(), "cpu"))).limit == 7.0
    with pytest.raises(ConfigError, match=r"step_limit_s is 0\.0; it must be above 0"):
        replace(config, step_limit_s=0.0).resolve(facts(), "cpu")


def test_a_process_that_is_stopped_is_seen_to_be() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        process.kill()
    assert not is_stopped(process.pid)


def test_a_wait_for_ranks_that_say_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_channel, "_SILENCE_MS", 1)
    group = Group(world_size=2)
    executor = GroupExecutor(Loaded(8, {}), group.server, (), (), warm(StepWatchdog(floor=0.01), 0.0))
    try:
        executor.submit(decode_plan(0))
        group.clients[0].send_result(answer(decode_plan(0)))
        assert same(executor.result(), answer(decode_plan(0)))
        executor.submit(decode_plan(1))
        with pytest.raises(EngineError, match=r"above the limit of 0\.0 s"):
            executor.result()
        assert executor.failed
    finally:
        executor.shutdown()
        group.close()
