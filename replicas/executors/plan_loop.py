"""A rank's loop. Plans are launched on receipt; another thread waits for results and sends them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from ..channel.step_channel import ChannelClosed, PeerLost, StepChannelClient
from ..worker.pending_step import PendingStep
from ..worker.shard import Shard


def run_plans(client: StepChannelClient, shard: Shard, check: Callable[[], None], *, answers: bool) -> None:
    """Run plans until the engine closes the channel.

    answers: whether this rank sends results, not only failures. check: raises if results may be
    invalid. Raises PeerLost if the engine is gone, and a step's error after sending it.
    """
    launched: SimpleQueue[PendingStep | None] = SimpleQueue()
    sender = threading.Thread(target=_send_results, args=(client, launched, check), name="shoal-results", daemon=True)
    if answers:
        sender.start()
    while (plan := client.receive()) is not None:
        try:
            check()
            step = shard.launch(plan)
        except Exception as error:
            with contextlib.suppress(PeerLost, ChannelClosed):  # raised in any case
                client.send_failure(plan.step, f"{type(error).__name__}: {error}")
            raise
        if answers:
            launched.put(step)
    if answers:
        launched.put(None)
        sender.join()


def _send_results(
    client: StepChannelClient, launched: SimpleQueue[PendingStep | None], check: Callable[[], None]
) -> None:
    try:
        while (step := launched.get()) is not None:
            try:
                result = step.result()
                check()
                client.send_result(result)
            except (PeerLost, ChannelClosed):
                raise
            except Exception as error:
                client.send_failure(step.plan.step, f"{type(error).__name__}: {error}")
                return
    except (PeerLost, ChannelClosed):  # the loop raises it too
        return
