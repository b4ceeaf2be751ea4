"""What a client can bear: its device's memory, and its budget with the codec that still fits it."""

from flwr.app import RecordDict

from tightbeam.common.accounts.prices import Tariff
from tightbeam.edge.data import Example
from tightbeam.edge.link.connection import Cloud
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.recipe import Codecs
from tightbeam.edge.side import side_of
from tightbeam.federation.client import Lender, LocalTask, SplitAdapter, Workplace
from tightbeam.federation.client.figures import cloud_flops, counted
from tightbeam.federation.client.participant import Client, Leaving
from tightbeam.federation.contract.budgets import PlannedWork, Spent, choose_codec

__all__ = ["affordable_codec", "require_memory"]


def require_memory(client: Client, lent: SplitAdapter) -> None:
    """Raise `Leaving` when weights and optimizer do not fit its device."""
    needed_mb = lent.training_bytes(client.scenario.train.optimizer) / 1e6
    limit_mb = client.profile.options.device.memory_mb
    if needed_mb > limit_mb:
        raise Leaving(
            "left", f"Weights and optimizer need {needed_mb:.3g} MB; its device has {limit_mb:.3g} MB."
        )


def affordable_codec(
    client: Client,
    cloud: Cloud,
    lender: Lender,
    examples: tuple[list[Example], list[Example]],
    task: LocalTask,
    content: RecordDict,
) -> Codecs:
    """The codec of this round: the client's own, or a smaller one that its budget still allows.

    What the evaluation after the round will take, if there is one, is set aside. `examples` are those that it
    learns from and those held out; its adapter must be worn. Raises `Leaving` when no codec fits.
    """
    config, options = content.config_records["config"], client.profile.options
    if not options.budget.limited:
        return options.codec
    learn, held_out = examples
    number = int(str(config["server-round"]))
    adapter_bytes = content.array_records["arrays"].count_bytes()

    def plan(
        place: Workplace, tokens: int, flops: int, adapter_bytes: int, *, gradients: bool
    ) -> PlannedWork:
        side = side_of(place.lent.model)
        return PlannedWork(
            tokens=tokens,
            hidden_size=cloud.card.hidden_size,
            dtype=cloud.card.dtype,
            gradients=gradients,
            adapter_bytes=adapter_bytes,
            joules=options.device.seconds(flops) * options.device.watts,
            cloud_flops=cloud_flops(cloud, options.cut, tokens, gradients=gradients),
            taps=len(side.plan.taps) if side else 0,
            tap_size=side.plan.tap_size if side else 0,
        )

    def round_with(codecs: Codecs) -> PlannedWork:
        frozen = client.frozen_after(number - 1)
        place = client.workplace(cloud, lender, codecs, frozen=frozen)
        flops, tokens = place.planned_flops(learn, task), place.plan_tokens(learn, task)
        gradients = MODES[options.mode].gradients_cross and not frozen
        # down, up, and down again: to be asked once more costs even those who then leave
        return plan(place, tokens, flops, 3 * adapter_bytes, gradients=gradients)

    tariff = Tariff.of(cloud.prices)
    spent = Spent(*(float(str(config[f"spent-{unit}"])) for unit in ("mb", "joules", "money")))
    missed = counted(client.missed)
    spent = spent.and_steps(
        int(missed["wire-up-bytes"] + missed["wire-down-bytes"]), int(missed["cloud-flops"])
    )
    if client.scenario.evaluated_after(number):
        place = client.workplace(cloud, lender, options.codec, frozen=client.frozen_after(number))
        evaluation = place.planned_evaluation(held_out, client.scenario.train.batch_size)
        planned = plan(place, *evaluation, adapter_bytes, gradients=False)
        spent = spent.after(planned, options.codec, tariff.prices)
    codec, refusal = choose_codec(options, round_with, spent, tariff)
    if codec is None:
        raise Leaving("left", f"Its budget would be exceeded: {refusal}.")
    return codec
