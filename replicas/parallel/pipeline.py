"""What the stages of a pipeline hand to each other: hidden states forward, sampled tokens back to the first stage.

Nothing here stops the host of a GPU: transfers are queued, and streams wait for them. Three rules keep stages from
waiting for each other in a circle, with any number of stages and of plans in flight:

- Every stage runs all plans in the order of their steps. Stage s of step n waits for stage s - 1 of step n, for its own
  step n - 1 and, the next stage being slow to take what it is sent, for stage s + 1 of step n - 1. All of them come
  before (n, s) in the order of steps, then stages.
- The first stage waits for tokens only right before the step that reads them, a step after the one that sampled them.
- The last stage never waits for its tokens to be taken: they leave on a stream and a communicator of their own, from a
  copy. So it can take the next hidden states, which the first stage sends before it asks for tokens.

Thus whatever is waited for comes earlier in that order, and the earliest unfinished (step, stage) can always go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 0


class PipelineLink(NamedTuple):
    """A pair of ranks, as one of them sees it. A group of its own keeps its transfers from queueing behind others."""

    group: dist.ProcessGroup
    peer: int  # the other one's rank in the group


class PipelineLinks:
    """A rank's links to the neighbouring stages, and between the last stage and the first; all of one tp_rank.

    Tensors are those of the rank's device: on a CPU transfers go by gloo, on a GPU by NCCL on the current stream.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        previous: PipelineLink | None,
        following: PipelineLink | None,
        first: PipelineLink | None,
        last: PipelineLink | None,
        max_in_flight: int,
    ) -> None:
        self._previous, self._following, self._first, self._last = previous, following, first, last
        self._on_cpu = device.type == "cpu"
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # on a CPU: transfers that may not be over
        self._side = None if self._on_cpu or first is None else torch.cuda.Stream(device)

    @classmethod
    def connect(
        cls,
        open_group: Callable[[str, Sequence[int]], dist.ProcessGroup],
        device: torch.device,
        *,
        rank: int,
        tp_size: int,
        pp_size: int,
        max_in_flight: int,
    ) -> PipelineLinks:
        """Make the links of world rank `rank`, as all ranks do at the same time.

        open_group(name, ranks): waits for those ranks and gives their group. max_in_flight: plans that may be under
        way at once. Each link is used once, the first stage's first: NCCL connects two ranks at their first transfer,
        and both wait for that on the host, which later might be in the middle of something else.
        """
        stage, tp_rank = divmod(rank, tp_size)
        is_first, is_last = stage == 0, stage == pp_size - 1

        def link(source: int, target: int) -> PipelineLink:
            ranks = [source * tp_size + tp_rank, target * tp_size + tp_rank]
            return PipelineLink(open_group(f"pipeline {ranks[0]} to {ranks[1]}", ranks), 1 - ranks.index(rank))

        previous = None if is_first else link(stage - 1, stage)
        following = None if is_last else link(stage, stage + 1)
        tokens = link(pp_size - 1, 0) if is_first or is_last else None
        links = cls(
            device,
            previous=previous,
            following=following,
            first=tokens if is_last else None,
            last=tokens if is_first else None,
            max_in_flight=max_in_flight,
        )
        probe = torch.zeros(1, dtype=torch.int64, device=device)
        if not is_first:
            links.receive_hidden(probe)
        if not is_last:
            links.send_hidden(probe)
        if is_last:
            links.return_tokens(probe)
        if is_first:
            links.receive_tokens(probe)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return links

    def send_hidden(self, x: Tensor) -> None:
        """Send contiguous x to the next stage; later work may overwrite it."""
        assert self._following is not None, "the last stage has none after it"
        self._send(x, self._following)

    def receive_hidden(self, out: Tensor) -> None:
        """Receive into contiguous `out` what the stage before sent next, which has its size."""
        assert self._previous is not None, "the first stage has none before it"
        _receive(out, self._previous)

    def return_tokens(self, tokens: Tensor) -> None:
        """Send tokens from the last stage to the first, beside the work that follows; that may overwrite them."""
        assert self._first is not None, "tokens come from the last stage"
        if self._side is None:
            self._send(tokens, self._first)
            return
        copy = tokens.clone()
        self._side.wait_stream(torch.cuda.current_stream(copy.device))
        with torch.cuda.stream(self._side):
            copy.record_stream(self._side)
            self._send(copy, self._first)

    def receive_tokens(self, out: Tensor) -> None:
        """Receive, on the first stage, what the last one returned next."""
        assert self._last is not None, "tokens go to the first stage"
        _receive(out, self._last)

    def finish(self) -> None:
        """Wait, on a CPU, until all that was sent has been taken."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def _send(self, x: Tensor, link: PipelineLink) -> None:
        if not self._on_cpu:
            link.group.send([x], link.peer, _TAG).wait()  # the stream waits, not the host
            return
        copy = x.clone()
        self._sent.append((link.group.send([copy], link.peer, _TAG), copy))
        # A stage sends one thing a plan: hidden states or, the last one, tokens. No more can be waiting to be taken
        # than there are plans in flight.
        while len(self._sent) > self._max_in_flight:
            self._sent.popleft()[0].wait()


def _receive(out: Tensor, link: PipelineLink) -> None:
    link.group.recv([out], link.peer, _TAG).wait()
