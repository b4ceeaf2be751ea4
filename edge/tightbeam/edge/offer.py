"""What the cloud asks for its work: the prices in its card, judged before they are used."""

from pydantic import ValidationError

from tightbeam.common.costs.prices import PriceList
from tightbeam.common.errors import IdentityError, ProtocolError, UsageError
from tightbeam.proto.backbone_pb2 import Card

__all__ = ["asked_by", "require_same"]


def asked_by(card: Card) -> PriceList | None:
    """The price list of a card whose key bundle has been verified; None where the cloud names no prices.

    Raises:
        IdentityError: the cloud's identity has signed others.
        ProtocolError: no usable list.

    """
    if card.prices != card.key_bundle.prices or card.HasField("prices") != card.key_bundle.HasField("prices"):
        raise IdentityError(
            "The card's prices are not those that the cloud's identity vouches for.",
            cure="Do not connect: something between edge and cloud alters the traffic. Ask the operator.",
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


def require_same(before: Card, now: Card) -> None:
    """Raise `UsageError` where the cloud asks for something else now: a run goes on by the prices it began with."""
    if before.key_bundle.prices != now.key_bundle.prices:
        raise UsageError(
            "The cloud has changed its prices since this run connected to it.",
            cure="Look at them with `tightbeam doctor`; if you agree, connect again (train: with --resume).",
        )
