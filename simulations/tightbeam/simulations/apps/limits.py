"""What a client can bear: its device's memory, and its budget with the codec that still fits it."""

from flwr.app import RecordDict

from tightbeam.common.config import Codecs
from tightbeam.edge.connection import Cloud
from tightbeam.edge.data import Example
from tightbeam.edge.federation import Lender, LocalTask, SplitAdapter
from tightbeam.edge.side import side_of
from tightbeam.simulations.apps.figures import cloud_flops
from tightbeam.simulations.apps.participant import Client, Leaving
from tightbeam.simulations.budgets import Plan, Spent, choose_codec

__all__ = ["affordable_codec", "require_memory"]


def require_memory(client: Client, lent: SplitAdapter) -> None:
    """Raise `Leaving` when weights and optimizer do not fit its device."""
    needed_mb = lent.training_bytes(client.scenario.train.optimizer) / 1e6
    limit_mb = client.profile.options.device.memory_mb
    if needed_mb > limit_mb:
        raise Leaving(
            "left", f"Weights and optimizer need {needed_mb:.0f} MB; its device has {limit_mb:.0f} MB."
        )


def affordable_codec(
    client: Client,
    cloud: Cloud,
    lender: Lender,
    examples: list[Example],
    task: LocalTask,
    content: RecordDict,
) -> Codecs:
    """The codec of this round: the client's own, or a smaller one that its budget still allows.

    Its adapter must be worn. Raises `Leaving` when none fits.
    """
    config, options = content.config_records["config"], client.profile.options
    if not options.budget.limited:
        return options.codec
    frozen = client.frozen_after(int(str(config["server-round"])) - 1)
    gradients = options.mode == "ushape" and not frozen

    def plan_for(codecs: Codecs) -> Plan:
        place = client.workplace(cloud, lender, codecs, frozen=frozen)
        flops, tokens = place.planned_flops(examples, task), place.plan_tokens(examples, task)
        side = side_of(place.lent.model)
        return Plan(
            tokens=tokens,
            hidden_size=cloud.card.hidden_size,
            dtype=cloud.card.dtype,
            gradients=gradients,
            # down, up, and down again: to be asked once more costs even those who then leave
            adapter_bytes=3 * content.array_records["arrays"].count_bytes(),
            joules=options.device.seconds(flops) * options.device.watts,
            cloud_flops=cloud_flops(cloud, options.cut, tokens, gradients=gradients),
            taps=len(side.plan.taps) if side else 0,
            tap_size=side.plan.tap_size if side else 0,
        )

    spent = Spent(*(float(str(config[f"spent-{unit}"])) for unit in ("mb", "joules", "money")))
    codec, refusal = choose_codec(options, plan_for, spent)
    if codec is None:
        raise Leaving("left", f"Its budget would be exceeded: {refusal}.")
    return codec
