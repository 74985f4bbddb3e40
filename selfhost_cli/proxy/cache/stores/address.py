"""Where a Redis is, and how it is spoken to: read from a URL or from the variables of old, and checked."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, unquote, urlsplit

PORT = 6379
SCHEMES = ("redis", "rediss", "unix")
NO, YES = ("0", "no", "false", "off", "none"), ("1", "yes", "true", "on", "required")


@dataclass(frozen=True)
class Address:
    """`socket`, a path, is in the place of host and port. `ca`: a file of certificates in the place of the system's."""

    host: str = "127.0.0.1"
    port: int = PORT
    socket: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    db: int = 0
    tls: bool = False
    verify: bool = True
    ca: str = ""
    cluster: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.socket or f"{host}:{self.port}"


def parse(url: str, *, tls: bool | None = None, ca: str = "", cluster: bool = False) -> Address:
    """`redis[s]://[user][:password]@host[:port][/db]` or `unix://[user][:password]@/path[?db=0]`.

    Without `tls`, whatever leaves this machine is encrypted, and the other side's certificate and name are checked.
    As redis-py has it, `?ssl_cert_reqs=none` leaves that check out and `?ssl_ca_certs=FILE` is `ca`.
    Raises ValueError; its text never holds a password.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # from None: its text may hold what stands behind an @ or / that a password contains
        raise _wrong("it cannot be read (in a password, @ : / ? # and % are written %40 %3A %2F %3F %23 %25)") from None
    if parts.scheme not in SCHEMES:
        raise _wrong(f"it begins with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    if parts.fragment:
        raise _wrong("there is a # in it (in a password that is %23)")
    address = Address(
        user=unquote(parts.username or ""), password=unquote(parts.password or ""), ca=ca, cluster=cluster
    )
    db = ""
    if parts.scheme == "unix":
        address = replace(address, socket=unquote(parts.path))
        if host or not address.socket:
            raise _wrong("a Unix socket's path begins with a slash: unix:///path")
    else:
        address = replace(address, host=host or address.host, port=port or PORT)
        db = parts.path.strip("/")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        match name:
            case "db":
                db = value
            case "ssl_ca_certs":
                address = replace(address, ca=value)
            case "ssl_cert_reqs" if value.lower() in NO + YES:
                address = replace(address, verify=value.lower() in YES)
            case "ssl_check_hostname" if value.lower() in YES:
                pass  # it always is
            case _:
                raise _wrong("behind the ? only db=NUMBER, ssl_ca_certs=FILE and ssl_cert_reqs=none|required are known")
    if db and not (db.isascii() and db.isdigit()):
        raise _wrong("behind the slash is the number of a database")
    return _decided(replace(address, db=int(db or 0)), parts.scheme == "rediss", tls)


def from_variables(
    environ: Mapping[str, str], *, tls: bool | None = None, ca: str = "", cluster: bool = False
) -> Address | None:
    """REDIS_URL, else REDIS_HOST with REDIS_PORT, REDIS_USERNAME and REDIS_PASSWORD; None when neither is set.

    Raises ValueError; its text never holds a password.
    """
    if url := environ.get("REDIS_URL", "").strip():
        return parse(url, tls=tls, ca=ca, cluster=cluster)
    if not (host := environ.get("REDIS_HOST", "").strip()):
        return None
    port = environ.get("REDIS_PORT", "").strip() or str(PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError("REDIS_PORT is not a port")
    if "/" in host or "@" in host:
        raise ValueError("REDIS_HOST is a name or a number, without scheme, user and path; REDIS_URL takes those")
    user, password = environ.get("REDIS_USERNAME", ""), environ.get("REDIS_PASSWORD", "")
    address = Address(host.strip("[]"), int(port), user=user, password=password, ca=ca, cluster=cluster)
    return _decided(address, False, tls)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _decided(address: Address, asked: bool, tls: bool | None) -> Address:
    """With the rule of TLS applied: asked for by the URL, by the setting, or by leaving this machine."""
    if asked and tls is False:
        raise ValueError("rediss:// asks for TLS and redis_tls = off forbids it: change one of them")
    if address.socket and tls:
        raise ValueError("there is no TLS on a Unix socket: leave redis_tls out")
    if address.cluster and (address.socket or address.db):
        raise ValueError("a cluster of Redis has a host and a port, and no database but 0")
    if address.password == "" and address.user:
        raise ValueError("there is a user for Redis, but no password")
    wanted = asked or (not address.socket and not is_loopback(address.host)) if tls is None else tls
    if address.ca and not wanted:
        raise ValueError("there is a certificate authority for Redis, but no TLS: set redis_tls to on")
    return replace(address, tls=wanted)


def _wrong(what: str) -> ValueError:
    return ValueError(f"the URL of Redis is wrong: {what}")
