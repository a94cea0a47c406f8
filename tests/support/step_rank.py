"""A process at one end of a step channel; the token comes by stdin, so that no list of processes shows it.

    python -m tests.support.step_rank rank ADDRESS RANK WORLD_SIZE     answers plans until there are no more
    python -m tests.support.step_rank engine [HOST WORLD_SIZE]         says its address, sends a plan, waits for its
                                                                       answer and a line by stdin, and so on

A rank answers with the milliseconds of CPU time that it has spent since its last answer, and says how it ended.
"""

from __future__ import annotations

import resource
import sys
from itertools import count

import numpy as np

from shoal.replicas.channel.step_channel import StepChannelClient, StepChannelServer
from shoal.replicas.errors import EngineError
from shoal.replicas.plan import StepResult
from tests.support.steps import decode_plan


def cpu_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def be_rank(address: str, rank: int, world_size: int, token: bytes) -> None:
    host, _, port = address.rpartition(":")
    client = StepChannelClient((host, int(port)) if host else address, rank, world_size, token)
    spent = cpu_ms()
    while (plan := client.receive()) is not None:
        before, spent = spent, cpu_ms()
        if rank == 0:
            client.send_result(StepResult(plan.step, np.array([spent - before], np.int32)))
    client.close()


def be_engine(token: bytes, host: str | None = None, world_size: int = 1) -> None:
    server = StepChannelServer(world_size, token, host=host)
    print(server.path if server.address is None else "{}:{}".format(*server.address), flush=True)
    server.accept(30)
    for step in count(41):
        server.submit(decode_plan(step))
        server.result()
        print(step, flush=True)
        sys.stdin.readline()


def main() -> None:
    token = bytes.fromhex(sys.stdin.readline())
    try:
        if sys.argv[1] == "engine":
            host, world_size = sys.argv[2:] or (None, 1)
            be_engine(token, host, int(world_size))
        else:
            be_rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), token)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    else:
        print("no more plans", flush=True)


if __name__ == "__main__":
    main()
