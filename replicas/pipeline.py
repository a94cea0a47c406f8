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
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class _Link(NamedTuple):
    """A pair of ranks, as one of them sees it. A group of its own keeps transfers from queueing behind others."""

    group: dist.ProcessGroup
    peer: int  # the other one's world rank


class PipelineLinks:
    """A rank's links to the neighbouring stages, and between the last stage and the first; all of one tp_rank.

    Tensors are those of the rank's device: on a CPU transfers go by gloo, on a GPU by NCCL on the current stream.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        previous: _Link | None,
        following: _Link | None,
        first: _Link | None,
        last: _Link | None,
        max_in_flight: int,
    ) -> None:
        self._previous, self._following, self._first, self._last = previous, following, first, last
        self._on_cpu = device.type == "cpu"
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # on a CPU: transfers that may not be over
        self._side = None if self._on_cpu or first is None else torch.cuda.Stream(device)

    @classmethod
    def connect(
        cls, device: torch.device, *, tp_rank: int, tp_size: int, pp_rank: int, pp_size: int, max_in_flight: int
    ) -> PipelineLinks:
        """Make the links; every rank of the model copy calls this once, after `dist.init_process_group`.

        Each link is used once, first stage first: NCCL connects two ranks at their first transfer, both waiting on
        the host, which later might be in the middle of something else. max_in_flight: plans that may be under way.
        """

        def link(tp: int, one: int, other: int) -> _Link | None:
            ranks = [one * tp_size + tp, other * tp_size + tp]
            group = dist.new_group(ranks)  # by every rank, in the same order
            if tp != tp_rank or pp_rank not in (one, other):
                return None
            assert isinstance(group, dist.ProcessGroup)
            return _Link(group, ranks[0] if pp_rank == other else ranks[1])

        pairs = [(stage, stage + 1) for stage in range(pp_size - 1)] + [(pp_size - 1, 0)]
        every = [[link(tp, *pair) for pair in pairs] for tp in range(tp_size)]
        own = every[tp_rank]
        is_first, is_last = pp_rank == 0, pp_rank == pp_size - 1
        links = cls(
            device,
            previous=None if is_first else own[pp_rank - 1],
            following=None if is_last else own[pp_rank],
            first=own[-1] if is_last else None,
            last=own[-1] if is_first else None,
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
        if not links._on_cpu:
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

    def _send(self, x: Tensor, link: _Link) -> None:
        if not self._on_cpu:
            _wait(dist.isend(x, link.peer, link.group))  # the stream waits
            return
        copy = x.clone()
        work = dist.isend(copy, link.peer, link.group)
        assert work is not None, "this rank belongs to the link"
        self._sent.append((work, copy))
        # A stage sends one thing a plan (the first, of two stages, hidden states; the last, tokens). More than there
        # are plans in flight cannot be waiting to be taken.
        while len(self._sent) > self._max_in_flight:
            self._sent.popleft()[0].wait()


def _receive(out: Tensor, link: _Link) -> None:
    _wait(dist.irecv(out, link.peer, link.group))


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "this rank belongs to the link"
    work.wait()
