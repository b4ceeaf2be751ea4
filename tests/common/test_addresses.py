"""Insecure connections stay on this machine."""

import pytest

from tightbeam.common.addresses import is_loopback
from tightbeam.common.errors import UsageError
from tightbeam.edge import connect


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:50051", "127.8.9.1:1", "[::1]:50051"])
def test_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "10.0.0.1:1", "example.org:443", "[::]:1", "localhost.evil:1"]
)
def test_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_an_edge_refuses_to_connect_insecurely_elsewhere() -> None:
    with pytest.raises(UsageError, match="not a loopback address"):
        connect("example.org:50051", insecure=True)
