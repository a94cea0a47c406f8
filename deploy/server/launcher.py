"""Starts the application, waits until it answers, and stops all that was started."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import AuthenticationError

from ...cluster.ray_private import serve_http_address
from ...cluster.wire.directory import DirectoryClient, announce_stop, remove_directory
from ...cluster.wire.membership import ReplicaInfo
from ...replicas.errors import ConfigError, EngineError, ModelError, ServingError
from ..app import assemble
from ..config import ModelPlan, ServeConfig
from .start_logs import explain

APP_NAME = "shoal"
# Reading many gigabytes of weights takes minutes.
START_TIMEOUT_S = 1800.0
_POLL_S = 0.1
_RAISED_BY_MODELS: dict[str, type[ServingError]] = {"ConfigError": ConfigError, "ModelError": ModelError}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server listens, and its key."""

    host: str
    port: int
    api_key: str | None = None

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"


@contextlib.contextmanager
def ray_cluster(address: str | None, folder: Path) -> Iterator[None]:
    """Start a private Ray in `folder`, or join the one at `address`; stops at the end what it started.

    A failed start on a private Ray notes its logs in the error, except in ConfigError and ModelError.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address is not None:
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    try:
        try:
            options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.WARNING}
            ray.init(**options, _temp_dir=str(folder))
            yield
        finally:
            ray.shutdown()
    except (ConfigError, ModelError):
        raise
    except Exception as error:
        explain(error, folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, AuthenticationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot join a Ray at {address}: {reason}; is it up? If it asks for a token, set RAY_AUTH_MODE=token"
        ) from error


@contextlib.contextmanager
def application(
    config: ServeConfig, plans: list[ModelPlan], endpoint: Endpoint, *, joined: bool = False
) -> Iterator[None]:
    """The application on the running Ray. Raises ServingError with the reason if it does not start.

    On a `joined` Ray, a Serve started here is stopped unless others use it.
    """
    running = _serve_that_runs(endpoint) if joined else False
    serve.start(http_options={"host": endpoint.host, "port": endpoint.port})
    try:
        _run(config, plans)
        for plan in plans:
            wait_for_completion(endpoint, plan.name)
        yield
    finally:
        announce_stop(frozenset(plan.name for plan in plans))
        serve.delete(APP_NAME)
        if joined and not running and not serve.status().applications:
            serve.shutdown()
            remove_directory()


def _serve_that_runs(endpoint: Endpoint) -> bool:
    """Raises ConfigError if the joined Serve has our name or listens elsewhere."""
    address = serve_http_address()
    if address is None:
        return False
    if APP_NAME in serve.status().applications:
        raise ConfigError(f"an application {APP_NAME!r} runs on that Ray; end it first")
    if address != (endpoint.host, endpoint.port):
        raise ConfigError(
            f"Serve runs on that Ray and listens on {address.host}:{address.port}; "
            f"give --host {address.host} --port {address.port}"
        )
    return True


def _run(config: ServeConfig, plans: list[ModelPlan]) -> None:
    try:
        serve.run(assemble(config, plans), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        messages = [status.message for status in serve.status().applications[APP_NAME].deployments.values()]
        reasons = [reason for message in messages if (reason := reason_of(message)) is not None]
        ends = [end for message in messages if (end := end_of(message)) is not None]
        raise reasons[0] if reasons else EngineError(" ".join([str(error), *ends[:1]])) from error


def reason_of(traceback: str) -> ServingError | None:
    """The last error of Shoal in Serve's traceback; None without."""
    found = re.findall(r"^shoal\.[\w.]*?(\w+): (.*)$", traceback, re.MULTILINE)
    for name, message in reversed(found):
        return _RAISED_BY_MODELS.get(name, EngineError)(message)
    return None


def end_of(traceback: str) -> str | None:
    """Serve's traceback in one line: why a process exited, or its last line."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    if not lines:
        return None
    why = [line for line in lines if "because its worker process has died" in line]
    if why:
        return why[-1].partition(" Some common causes")[0]  # Ray lists causes after it
    return lines[-1].replace("ActorDiedError()", "The process of a replica has ended.")


def wait_for_completion(endpoint: Endpoint, model: str) -> None:
    """Wait for a one-token completion. Raises ServingError for a final error."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        status, answer = _complete(endpoint, model)
        if status == 200:
            return
        if status not in (0, 404, 429, 503):  # 0: no listener yet; 404: no route yet
            raise ServingError(f"the server answers {status}: {answer}")
        if time.monotonic() > deadline:
            raise ServingError(f"no answer within {START_TIMEOUT_S:.0f} s; the last was {status}: {answer}")
        time.sleep(_POLL_S)


def _complete(endpoint: Endpoint, model: str) -> tuple[int, str]:
    """Status and text; 0 without a connection."""
    host = endpoint.url.removeprefix("http://").rpartition(":")[0]
    connection = http.client.HTTPConnection(host, endpoint.port, timeout=60)
    headers = {"content-type": "application/json"}
    if endpoint.api_key is not None:
        headers["authorization"] = f"Bearer {endpoint.api_key}"
    body = json.dumps({"model": model, "prompt": [0], "max_tokens": 1})
    try:
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    except OSError as error:
        return 0, str(error)
    finally:
        connection.close()


def replicas_of(plans: list[ModelPlan]) -> list[list[ReplicaInfo]]:
    """The registered replicas of each model."""
    members = asyncio.run(DirectoryClient().watch(None)).replicas
    return [[info for info in members if info.model_id == plan.name] for plan in plans]
