"""What clients are billed: each by the list that its own cloud has signed, handed in with its work."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tightbeam.common.accounts.prices import PriceList, Prices, Tariff
from tightbeam.common.errors import DataError, UpdateRefusedError

__all__ = ["money_of", "moved_bytes", "offer_of", "read_offer", "tariff_of", "with_offers"]

_MOVED = ("wire_up_bytes", "wire_down_bytes", "weight_bytes", "adapter_up_bytes", "adapter_down_bytes")


def moved_bytes(row: Mapping[str, Any]) -> int:
    """Bytes on all wires of one client's row: steps, adapters, weights."""
    return sum(int(row.get(name, 0)) for name in _MOVED)


def read_offer(text: str) -> dict[str, Any]:
    """A list as a client hands it in; `UpdateRefusedError` for one that makes no sense."""
    try:
        return PriceList.model_validate_json(text).model_dump()
    except ValidationError as error:
        raise UpdateRefusedError("It hands in a price list that makes no sense.") from error


def offer_of(row: Mapping[str, Any]) -> PriceList | None:
    """What the client's cloud asked for in a row of the ledger; None where it named no prices."""
    return PriceList.model_validate(row["prices"]) if row.get("prices") else None


def with_offers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows of clients that did not get as far as their cloud a list too: their own, or the only one."""
    by_client = {row["client"]: row["prices"] for row in rows if row.get("prices")}
    lists = list(by_client.values())
    only = lists[0] if lists and all(one == lists[0] for one in lists) else None
    return [row | {"prices": row.get("prices") or by_client.get(row["client"], only)} for row in rows]


def money_of(rows: Iterable[Mapping[str, Any]], table: Prices | None = None) -> float:
    """Sum of their bills: all bytes and the cloud's operations by the client's list, and its electricity."""
    total = 0.0
    for row in rows:
        bill = Tariff.of(offer_of(row), table).prices.bill(
            wire_bytes=moved_bytes(row),
            cloud_flops=row.get("cloud_flops", 0),
            edge_joules=row.get("joules", 0.0),
        )
        total += bill.total
    return total


def tariff_of(rows: Sequence[Mapping[str, Any]], table: Prices | None = None) -> Tariff:
    """The newest prices of an experiment.

    Raises:
        DataError: its clouds asked in several currencies.

    """
    found = [Tariff.of(offer_of(row), table) for row in rows] or [Tariff.of(None, table)]
    if len(currencies := sorted({one.prices.currency for one in found})) > 1:
        raise DataError(
            f"The clouds of this federation ask in {' and '.join(currencies)}, which cannot be added up.",
            cure="Connect all clients to clouds that ask in one currency.",
        )
    return found[-1]
