"""What a card offers, held against what the cloud's identity has signed: files, number format, costs."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tightbeam.common.accounts.prices import PriceList
from tightbeam.common.errors import FingerprintError, IdentityError, ProtocolError, UsageError
from tightbeam.common.wire.key_schedule import card_digest
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["asked_by", "cost_facts", "held_bytes", "require_same", "require_signed"]

_ALTERED = "Do not connect: something between edge and cloud alters the traffic. Ask the operator."


def require_signed(card: Card) -> None:
    """A card must be what its key bundle, which has been verified, vouches for.

    Raises:
        FingerprintError: it names another backbone.
        IdentityError: it names another number format, or other tokenizer and config files.

    """
    if card.fingerprint != card.key_bundle.fingerprint:
        raise FingerprintError(
            "The card's fingerprint is not the one that the cloud's identity vouches for.", cure=_ALTERED
        )
    if card.key_bundle.card_digest != card_digest(card):
        raise IdentityError(
            "The card's number format or files are not those that the cloud's identity vouches for.",
            cure=_ALTERED,
        )


def asked_by(card: Card) -> PriceList | None:
    """The price list of a card whose key bundle has been verified; None where the cloud names no prices.

    Raises:
        IdentityError: the cloud's identity has signed others.
        ProtocolError: no usable list.

    """
    if card.prices != card.key_bundle.prices or card.HasField("prices") != card.key_bundle.HasField("prices"):
        raise IdentityError(
            "The card's prices are not those that the cloud's identity vouches for.",
            cure=_ALTERED,
        )
    if not card.HasField("prices"):
        return None
    asked = {name: getattr(card.prices, name) for name in PriceList.model_fields}
    try:
        return PriceList.model_validate(asked)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise ProtocolError(
            f"The cloud's price list is wrong: {wrong} is {asked[wrong]!r:.60}.",
            cure="Ask the operator for a list with a short currency and prices from 0 up.",
        ) from error


def cost_facts(card: Card, cut: str) -> dict[str, Any]:
    """What a ledger must know of the cloud to say what a run at this cut costs."""
    prices, blobs = asked_by(card), {blob.name: blob.num_bytes for blob in card.blobs}
    return {
        "prices": None if prices is None else prices.model_dump(),
        "cloud_device": card.device,
        "weight_bytes": held_bytes(blobs, cut, card.num_blocks),
        "model_bytes": held_bytes(blobs, f"{card.num_blocks}:0", card.num_blocks),
    }


def held_bytes(blobs: Mapping[str, int], cut: str, num_blocks: int) -> int:
    """Bytes of the weights that an edge of this cut fetches once; `blobs` are the card's, by name."""
    bottom, top = map(int, cut.split(":"))
    trunk = {f"block.{index}" for index in range(bottom, num_blocks - top)}
    return sum(size for name, size in blobs.items() if not name.startswith("file/") and name not in trunk)


def require_same(before: Card, now: Card) -> None:
    """A run goes on by the numbers and prices it began with.

    Raises:
        FingerprintError: the cloud now computes in another number format.
        UsageError: it now asks for other prices.

    """
    if before.dtype != now.dtype:
        raise FingerprintError(
            f"The cloud computes in {now.dtype} now; this model was loaded for {before.dtype}.",
            cure=f"Have it served with --dtype {before.dtype}, or start a new run.",
        )
    if before.key_bundle.prices != now.key_bundle.prices:
        raise UsageError(
            "The cloud has changed its prices since this run connected to it.",
            cure="Look at them with `tightbeam doctor`; if you agree, connect again (train: with --resume).",
        )
