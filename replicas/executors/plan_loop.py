"""A rank's loop: plans in, results out.

A plan is launched as soon as it has come, while the results of those before it are still to be waited for: another
thread does that, where there are any to send.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from ..channel.step_channel import ChannelClosed, PeerLost, StepChannelClient
from ..worker.pending_step import PendingStep
from ..worker.shard import Shard


def run_plans(client: StepChannelClient, shard: Shard, check: Callable[[], None], *, answers: bool) -> None:
    """Runs plans until the engine has no more. answers: this rank sends the results; the others send failures alone.
    check: raises where the results so far are not to be believed.

    Raises PeerLost when the engine is gone, and whatever makes a step fail, after it has told the engine.
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
            with contextlib.suppress(PeerLost, ChannelClosed):  # why it failed is to be known all the same
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
    """Ends with the last result, or with the first that cannot be had: the engine then ends the work of all ranks."""
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
    except (PeerLost, ChannelClosed):  # the loop notices it too, and says so
        return
