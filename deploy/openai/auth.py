"""API keys for every route except the probes; an admin key for the debug and admin routes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import HttpError

OPEN_ROUTES = frozenset({"/health", "/ready"})
ADMIN_PREFIXES = ("/admin/", "/debug/", "/cluster/")
_MAX_KEY_BYTES = 1024


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The digests of a server's keys. Without any key every route is open, the admin routes only if `local`.

    `local` says that the server listens on loopback only.
    """

    api_keys: tuple[bytes, ...] = ()
    admin_keys: tuple[bytes, ...] = ()
    local: bool = True

    @classmethod
    def of(cls, api_keys: Iterable[str] = (), admin_keys: Iterable[str] = (), *, local: bool = True) -> KeyRing:
        return cls(tuple(map(_digest, api_keys)), tuple(map(_digest, admin_keys)), local)

    def needs_key(self, path: str) -> bool:
        """Whether a request to `path` needs a key."""
        if path in OPEN_ROUTES:
            return False
        return bool(self.api_keys or (self.admin_keys and path.startswith(ADMIN_PREFIXES)))

    def check(self, path: str, authorization: str | None) -> None:
        """Raise HttpError 401 or 403 unless a request to `path` with this Authorization header may pass."""
        admin_route = path.startswith(ADMIN_PREFIXES)
        if not self.needs_key(path):
            if admin_route and not self.local and not self.admin_keys:
                raise HttpError(403, f"{path} needs an admin key, and this server has none configured")
            return
        known, admin = self._recognise(authorization)
        if not known:
            raise HttpError(
                401,
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if admin_route and not admin:
            raise HttpError(403, f"{path} needs the admin key", code="admin_key_required")

    def _recognise(self, authorization: str | None) -> tuple[bool, bool]:
        """Whether the key is known, and whether it is an admin key. Every key is compared, each in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or len(key) > _MAX_KEY_BYTES:
            return False, False
        given = _digest(key.strip())
        is_user = sum([hmac.compare_digest(given, known) for known in self.api_keys]) > 0
        is_admin = sum([hmac.compare_digest(given, known) for known in self.admin_keys]) > 0
        return is_user or is_admin, is_admin
