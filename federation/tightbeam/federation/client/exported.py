"""Evaluation of the adapter that an experiment leaves, by a client, at a cut that holds all its layers."""

from flwr.app import MetricRecord, RecordDict

from tightbeam.federation.client import AdapterShape, Lender
from tightbeam.federation.client.figures import figures_of, weight_bytes_of
from tightbeam.federation.client.participant import Client, Leaving
from tightbeam.federation.contract.records import from_record

__all__ = ["exported_loss"]


def exported_loss(client: Client, lender: Lender, run: str, content: RecordDict) -> MetricRecord:
    """Loss of the whole adapter on what it held out, with what that took.

    Raises `Leaving` where its device or its budget is too small for it.
    """
    config, options = content.config_records["config"], client.profile.options
    if options.budget.limited:
        raise Leaving("skipped", "It has a budget, and this is beside the experiment.")
    adapter, cut = client.adapter_shape(), str(config["cut"])
    shape = AdapterShape(
        cut, "ushape", int(str(config["r"])), adapter.scale, target_modules=adapter.target_modules
    )
    with client.cloud(run) as cloud:
        _, held_out = client.examples(cloud, lender)
        place = client.workplace(cloud, lender, options.codec, frozen=False, shape=shape)
        if place.lent.weight_bytes > options.device.memory_mb * 1e6:
            raise Leaving("skipped", f"Its device does not hold the blocks of cut {cut}.")
        place.lent.wear(place.lent.padded(from_record(content.array_records["arrays"])))
        try:
            work = place.evaluate(held_out, client.scenario.train.batch_size, client.rows)
        finally:
            place.lent.undress()
        more = weight_bytes_of(cloud, cut) - weight_bytes_of(cloud, options.cut)
    figures = figures_of(client, content, work, 0, more, 1.0)
    return MetricRecord({"weight": work.learned_tokens, "examples": len(held_out), **figures})
