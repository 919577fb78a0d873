"""Which URIs the endpoint reads: those below an allowed prefix, on hosts it may connect to."""

from __future__ import annotations

import ipaddress
import posixpath
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

from tsq_ray import storage
from tsq_ray.serving.requests.problems import RequestError

WEB = ("http://", "https://")
_LAST = ((12, 13, 14, 15),)
_IPV4_BYTES = {
    ipaddress.IPv6Network("::/96"): _LAST,  # IPv4-compatible
    ipaddress.IPv6Network("2002::/16"): ((2, 3, 4, 5),),  # 6to4
    ipaddress.IPv6Network("64:ff9b::/96"): _LAST,  # NAT64
    # NAT64 with a prefix of 48, 56, 64 or 96 bits (RFC 6052, section 2.2)
    ipaddress.IPv6Network("64:ff9b:1::/48"): (
        *((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12)),
        *_LAST,
    ),
}
"""The networks whose addresses embed an IPv4 address, and which bytes it may be in."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_uri(uri: str, prefixes: Iterable[str]) -> str:
    """Return `uri` normalised. Raises RequestError 403 if it is not below an allowed prefix."""
    place = _place(uri)
    if place is None or not any(_is_below(place, prefix) for prefix in prefixes):
        raise RequestError(
            403,
            f"uri {shown(uri)!r} is not below a prefix that this endpoint may read "
            "(serve.allowed_uri_prefixes), or is not absolute",
        )
    host = urlsplit(place).hostname if place.startswith(WEB) else None
    if host is not None and is_address(host) and not may_connect(host, host, named_hosts(prefixes)):
        raise RequestError(403, f"uri {shown(uri)!r}: its host's address is not public")
    return place


def shown(uri: str) -> str:
    """Return what an answer may show of a URI: no user or query, at most 200 characters."""
    scheme, separator, rest = uri.partition("://")
    if separator:
        authority, slash, path = rest.partition("/")
        uri = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}".partition("?")[0]
    return storage.redact(uri)[:200]


def named_hosts(prefixes: Iterable[str]) -> frozenset[str]:
    """Return the hosts that http(s) prefixes name."""
    found = (urlsplit(prefix).hostname for prefix in prefixes if prefix.lower().startswith(WEB))
    return frozenset(host for host in found if host)


def is_address(host: str) -> bool:
    """Return whether `host` is an IP address rather than a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def may_connect(host: str, address: str, hosts: Iterable[str]) -> bool:
    """Return whether the endpoint may connect to `address`, to which `host` resolves.

    `hosts`: those that the prefixes name. Allowed are public addresses, and any address of these
    hosts; a link-local one, where clouds hand out the machine's own keys, only if it is in `hosts`
    itself. The same goes for the IPv4 addresses that an IPv6 address embeds.
    """
    found = _reached(ipaddress.ip_address(address.partition("%")[0]))
    if any(one.is_link_local for one in found):
        return address in hosts
    return host in hosts or all(one.is_global and not one.is_multicast for one in found)


def _reached(address: _Address) -> list[_Address]:
    """Return an address and the IPv4 addresses that it embeds, to which a gateway may forward."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:  # the system itself connects to the IPv4 address
        return [address.ipv4_mapped]
    found: list[_Address] = [address, *(address.teredo or ())]
    for network, places in _IPV4_BYTES.items():
        if address in network:
            octets = (bytes(address.packed[place] for place in four) for four in places)
            found += map(ipaddress.IPv4Address, octets)
    return found


def _place(uri: str) -> str | None:
    """Return the normalised absolute URI or path; None for anything else."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        try:
            return storage.real_path(uri) if uri.startswith("/") else None
        except (OSError, ValueError):  # the name is too long or contains a NUL
            return None
    if scheme.lower() in ("file", "local"):
        return None
    authority, _, path = rest.partition("/")
    if "@" in authority or _is_unsafe_path(path):
        return None
    if f"{scheme.lower()}://" in WEB:
        place = f"{scheme.lower()}://{authority.lower()}/{path}"
        try:
            host = urlsplit(place).hostname
        except ValueError:  # an IPv6 address without its closing bracket
            return None
        return None if host is None or _is_obscured_ipv4(host) else place
    return storage.normalize(uri)


def _is_unsafe_path(path: str) -> bool:
    """Return whether a path has `..` or control characters, even if encoded repeatedly."""
    while (plain := unquote(path)) != path:
        path = plain
    segments = (segment.partition(";")[0] for segment in path.replace("\\", "/").split("/"))
    return ".." in segments or not path.isprintable()


def _is_obscured_ipv4(host: str) -> bool:
    """Return whether a host is an IPv4 address in an obscure spelling, such as hexadecimal."""
    last = host.rstrip(".").rpartition(".")[2]
    return not is_address(host) and (last.isdecimal() or last.startswith("0x"))


def _is_below(place: str, prefix: str) -> bool:
    if prefix.lower().startswith(("file://", "local://")):
        prefix = storage.normalize(prefix)
    if storage.is_local(prefix) != storage.is_local(place):
        return False  # without a look at the prefix, whose mount may hang
    if storage.is_local(prefix):
        return place.startswith(storage.real_path(prefix).rstrip("/") + "/")
    scheme, _, rest = prefix.partition("://")
    authority, _, path = rest.partition("/")
    scheme = "s3" if scheme.lower() == "s3a" else scheme.lower()
    if f"{scheme}://" in WEB:
        authority = authority.lower()
    folder = posixpath.join(authority, path).strip("/")
    return place.startswith(f"{scheme}://{folder}/" if folder else f"{scheme}://")
