"""An engine in its own thread: requests and commands from any thread, deltas by callback."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ..errors import EngineError, RequestError
from ..protocol import FinishReason, ReplicaLoad, Request, TokenDelta
from .engine import Engine
from .step_times import StepTimesCounter

T = TypeVar("T")

# So that running streams do not stall, and the device soon runs the first of a thousand requests.
# Accepting a prompt of 512 tokens takes 10 us.
_COMMANDS_PER_STEP = 128


class EngineThread:
    """Runs the engine while there is work; commands run between two steps, in order.

    A step's deltas are delivered after the next launch, so neither their handling nor the GIL
    delays it. `on_deltas` runs in the engine's thread, once a step. Every sequence accepted by
    `submit` gets exactly one terminal delta, also after a refusal, a failure or `stop`.
    `on_failure` is called once, after the last deltas, when the engine or a callback raised.
    """

    def __init__(
        self,
        engine: Engine,
        on_deltas: Callable[[list[TokenDelta]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._on_deltas = on_deltas
        self._on_failure = on_failure
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._open: dict[str, set[int]] = {}  # samples without a terminal delta, by request id
        self._due: list[TokenDelta] = []  # the engine's thread's own
        self._accepting = True
        self._stopping = False
        self._idle = True
        self._progress = time.monotonic()
        self.step_seconds = 0.0  # of the last step; see StepTimes
        self._step_times = StepTimesCounter()
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)

    @property
    def last_progress(self) -> float:
        """time.monotonic() when the last step ended; now, while idle."""
        return time.monotonic() if self._idle else self._progress

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Check the request in the caller's thread and queue it. Raises RequestError or EngineError."""
        self._engine.limits.check(request)
        with self._wake:
            if request.request_id in self._open:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            self._post(lambda: self._add(request))
            self._open[request.request_id] = set(_samples(request))

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """Abort a request, or one sample, before the next step. Idempotent, also after a stop."""
        with self._wake:
            if self._accepting:
                self._commands.append(lambda: self._engine.abort(request_id, sample))
                self._wake.notify()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run `function(engine)` between two steps. The future is cancelled if the thread stops first."""
        future: Future[T] = Future()

        def command() -> None:
            if self._stopping or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        self._post(command)
        return future

    def load(self) -> ReplicaLoad:
        """See Scheduler.load; any thread may call."""
        return replace(self._engine.load(), step_times=self._step_times.snapshot())

    def stop(self, timeout: float | None = None) -> None:
        """Abort everything, deliver the terminal deltas and end the thread, after `timeout` s at most. Idempotent."""
        with self._wake:
            self._accepting = False
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._accepting:
                raise EngineError("the engine has stopped and takes no requests")
            self._commands.append(command)
            self._wake.notify()

    def _add(self, request: Request) -> None:
        try:
            self._engine.add_checked(request)
        except Exception as error:  # the engine has failed, or its own caller uses the id
            self._due += _errors(request.request_id, _samples(request), str(error))

    def _run(self) -> None:
        failures: list[BaseException] = []
        for stage in (self._loop, self._close):
            try:
                stage()
            except Exception as error:  # from a callback; the engine records its own failures
                failures.append(error)
        if self._engine.failure is not None:
            failures.insert(0, self._engine.failure)
        self._idle = True
        if failures:
            self._on_failure(failures[0])

    def _close(self) -> None:
        with self._wake:
            self._accepting = False
            self._stopping = True
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        self._due += self._engine.end_all()
        self._deliver()
        # The engine has dropped the sequences that ended in the failed step.
        message = f"the engine failed: {self._engine.failure}"
        for request_id, samples in self._open.items():
            self._due += _errors(request_id, samples, message)
        self._deliver()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._stopping or self._due or self._engine.has_work):
                    self._idle = True
                    self._wake.wait()
                if self._stopping:
                    return
                if self._idle:
                    self._progress = time.monotonic()
                    self._idle = False  # in this order: a reader must not see the old time
                commands = [self._commands.popleft() for _ in range(min(len(self._commands), _COMMANDS_PER_STEP))]
            for command in commands:
                command()
            self._engine.submit()
            self._deliver()
            in_step = self._engine.in_step
            self._due += self._engine.collect()
            now = time.monotonic()
            self.step_seconds, self._progress = now - self._progress, now
            if in_step:
                self._step_times.add(self.step_seconds)
            if self._engine.failure is not None:
                return

    def _deliver(self) -> None:
        deltas, self._due = self._due, []
        if not deltas:
            return
        ended = [(delta.request_id, delta.sample) for delta in deltas if delta.finish_reason is not None]
        if ended:
            with self._wake:
                for request_id, sample in ended:
                    self._close_sample(request_id, sample)
        self._on_deltas(deltas)

    def _close_sample(self, request_id: str, sample: int) -> None:
        samples = self._open.get(request_id, set())
        samples.discard(sample)
        if not samples:
            self._open.pop(request_id, None)


def _samples(request: Request) -> range:
    return range(request.first_sample, request.first_sample + request.num_samples)


def _errors(request_id: str, samples: Iterable[int], message: str) -> list[TokenDelta]:
    return [TokenDelta(request_id, sample, finish_reason=FinishReason.ERROR, error=message) for sample in samples]
