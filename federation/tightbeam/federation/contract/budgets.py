"""Whether a client can still afford a round, and with which codec."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tightbeam.common.accounts.prices import ASSUMED, Prices, Tariff
from tightbeam.common.wire.codecs import codec, lossless
from tightbeam.edge.recipe import Codecs
from tightbeam.edge.report.modes import TokenBytes
from tightbeam.federation.scenario import ClientSection

__all__ = ["PlannedWork", "Spent", "choose_codec", "codec_text"]

_FRAMING = 1.02  # wire over payload bytes: an estimate from above, for messages of usual size


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWork:
    """What a round or an evaluation will take with one codec, known before it begins."""

    tokens: int  # that cross: a cache keeps some of them here
    hidden_size: int
    dtype: str  # of the cloud's blocks
    gradients: bool  # whether gradients cross
    adapter_bytes: int  # both directions
    joules: float  # at the edge
    cloud_flops: int
    taps: int = 0  # inner hidden states that come down beside the answer, each `tap_size` wide
    tap_size: int = 0

    def wire_bytes(self, codecs: Codecs) -> float:
        """Bytes on all wires."""
        exact = lossless(getattr(torch, self.dtype))
        names = {t: exact if name == "auto" else name for t, name in codecs.model_dump().items()}
        row = TokenBytes.of(self.hidden_size, names)
        per_token: float = row.training if self.gradients else row.forward
        if self.taps:
            per_token += self.taps * codec(names["activations_down"]).num_bytes((1, self.tap_size))
        return self.tokens * per_token * _FRAMING + self.adapter_bytes


@dataclass(frozen=True, slots=True)
class Spent:
    """What a client has spent in earlier rounds."""

    mb: float
    joules: float
    money: float

    def after(self, plan: PlannedWork, codecs: Codecs, prices: Prices) -> "Spent":
        """What it will have spent when the plan is done, too, by the prices of its cloud."""
        moved = plan.wire_bytes(codecs)
        bill = prices.bill(wire_bytes=round(moved), cloud_flops=plan.cloud_flops, edge_joules=plan.joules)
        return Spent(self.mb + moved / 1e6, self.joules + plan.joules, self.money + bill.total)

    def and_steps(self, wire_bytes: int, cloud_flops: int) -> "Spent":
        """What it has spent with steps that the server has not heard of; their energy nobody knows."""
        bill = Prices().bill(wire_bytes=wire_bytes, cloud_flops=cloud_flops, edge_joules=0.0)
        return Spent(self.mb + wire_bytes / 1e6, self.joules, self.money + bill.total)


def choose_codec(
    options: ClientSection,
    plan_for: Callable[[Codecs], PlannedWork],
    spent: Spent,
    tariff: Tariff | None = None,
) -> tuple[Codecs | None, str]:
    """The first codec that the budget allows, and why the one before it was refused; none if none does.

    What a cache holds, it holds in one codec: with another everything crosses again. So each has its plan.
    """
    tariff, refusal = tariff or Tariff.of(), ""
    for codecs in (options.codec, *(Codecs.model_validate(name) for name in options.budget.degrade)):
        then = spent.after(plan_for(codecs), codecs, tariff.prices)
        over = options.budget.exceeded_by(then.mb, then.joules, then.money)
        if not over:
            return codecs, refusal
        assumed = "of money" in over and tariff.sources["per_gigabyte"] == ASSUMED
        refusal = over + " (its cloud names no prices, so some are assumed)" * assumed
    return None, refusal


def codec_text(codecs: Codecs) -> str:
    """One name when all four tensors have the same."""
    names = list(codecs.model_dump().values())
    return str(names[0]) if len(set(names)) == 1 else "/".join(names)
