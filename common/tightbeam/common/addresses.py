"""Addresses as people write them, HOST:PORT, and which of them never leave this machine."""

import ipaddress
import re

from tightbeam.common.errors import UsageError

__all__ = ["check_address", "is_loopback", "split_address"]


def split_address(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port; raises `UsageError` for what is not HOST:PORT."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    why = ""
    if "//" in address:
        why = "it is the address of a page"
    elif not colon or not re.fullmatch(r"[0-9]+", port):
        why = "it ends without a port"
    elif int(port) > 65535:
        why = "ports go to 65535"
    elif not bare:
        why = "it has no host"
    elif bare == host and ":" in host:
        why = "IPv6 goes in brackets, [::1]:50051"
    elif re.search(r"[\s/@\[\]]", bare):
        why = "its host is no name"
    if why:
        raise UsageError(f"{address!r} is not host:port: {why}.", cure="Write it as in cloud.example:50051.")
    return bare, int(port)


def check_address(address: str) -> str:
    """The address; `ValueError`, as checks of a recipe raise it, for what is not HOST:PORT."""
    try:
        split_address(address)
    except UsageError as error:
        raise ValueError(error.message.rstrip(".")) from error
    return address


def is_loopback(address: str) -> bool:
    """Whether `address` ("host:port") is localhost or a literal loopback address; other names are not."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
