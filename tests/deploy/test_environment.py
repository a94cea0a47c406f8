"""What Ray finds in the environment, for a Ray of our own and for one that runs already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.deploy.environment import keep_auth_token_private, prepare_environment


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_ray_of_our_own_has_a_secret_and_stays_on_loopback(environment: dict[str, str], host: str) -> None:
    prepare_environment(host)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(first := environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    environment.clear()
    prepare_environment(host)
    assert environment["RAY_AUTH_TOKEN"] != first


def test_what_its_user_set_stands(environment: dict[str, str]) -> None:
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "5"}
    prepare_environment("127.0.0.1")
    assert "RAY_AUTH_TOKEN" not in environment
    assert (environment["RAY_AUTH_MODE"], environment["RAY_worker_niceness"]) == ("disabled", "5")


def test_a_ray_that_is_joined_keeps_its_own_address_and_token(environment: dict[str, str]) -> None:
    prepare_environment("127.0.0.1", own_ray=False)
    assert not environment.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"}


def test_haproxy_is_for_hosts_that_others_reach(environment: dict[str, str]) -> None:
    prepare_environment("127.0.0.1")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    prepare_environment("0.0.0.0")
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_the_token_that_ray_wrote_is_kept_from_others(tmp_path: Path) -> None:
    keep_auth_token_private(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is made where Ray wrote nothing"
    token = tmp_path / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    keep_auth_token_private(tmp_path)
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == "secret"
