"""Which taps a forward may ask for; a request is refused by its header alone."""

from tightbeam.common.backbone import Taps
from tightbeam.common.errors import StepRefusedError
from tightbeam.proto import backbone_pb2 as pb

__all__ = ["TapRules"]


class TapRules:
    """The card's offer, enforced."""

    def __init__(self, offer: pb.TapOffer, hidden_size: int) -> None:
        self._blocks, self._max_taps = frozenset(offer.blocks), offer.max_taps
        self._sizes = {"": hidden_size} | {each.sha256: each.size for each in offer.projections}

    def check(self, header: pb.StepRequest, span: range) -> Taps | None:
        """The taps of a request over blocks `span`; None when it asks for none.

        Raises `StepRefusedError` for what is not on offer.
        """
        blocks = tuple(header.taps)
        if not blocks and not header.projection:
            return None
        if header.kind != pb.FORWARD or header.keep or not blocks:
            raise StepRefusedError(
                "Taps belong to a forward that no backward will follow.",
                cure="They serve mode side, which trains nothing through the trunk.",
            )
        if len(blocks) > self._max_taps:
            raise StepRefusedError(
                f"A step asks for {len(blocks)} taps, more than this cloud's {self._max_taps}.",
                cure="Ask for fewer (side.taps).",
            )
        if list(blocks) != sorted(set(blocks)):
            raise StepRefusedError("The taps of a step must be different blocks in ascending order.")
        if odd := [block for block in blocks if block not in span or block not in self._blocks]:
            raise StepRefusedError(
                f"Block {odd[0]} cannot be tapped: it is not in the trunk of this cut, blocks {span[0]} to "
                f"{span[-1]}.",
                cure="Choose taps within the trunk.",
            )
        if header.projection not in self._sizes:
            raise StepRefusedError(
                f"This cloud has no projection {header.projection[:12]!r}.",
                cure="Take one that its card lists: it may have fitted a new one since.",
            )
        return Taps(blocks, self._sizes[header.projection], header.projection)
