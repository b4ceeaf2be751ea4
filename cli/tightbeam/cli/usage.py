"""`tightbeam usage`: what the cloud's ledger says this tenant has used."""

import typer

from tightbeam.cli.options import Address, IdentityFolder, Insecure

__all__ = ["usage"]


def usage(address: Address, identity: IdentityFolder = None, insecure: Insecure = False) -> None:
    """Print one line of JSON per run of this tenant: its steps as the cloud bills them, by today's prices."""
    import json

    from google.protobuf.json_format import MessageToDict

    from tightbeam.common.accounts.prices import Tariff
    from tightbeam.edge import connect

    with connect(address, identity=identity, insecure=insecure) as cloud:
        tariff = Tariff.of(cloud.prices)
        prices, source = tariff.prices, tariff.sources["per_gigabyte"]
        for run in cloud.usage():
            moved = run.bytes.wire_up_bytes + run.bytes.wire_down_bytes
            bill = {
                "currency": prices.currency,
                "traffic": prices.money(wire_bytes=moved),
                "cloud_compute": prices.money(cloud_flops=run.flops),
                "total": prices.money(wire_bytes=moved, cloud_flops=run.flops),
                "per_gigabyte": prices.per_gigabyte,
                "per_petaflop": prices.per_petaflop,
                "source": source,
            }
            told = MessageToDict(run, preserving_proto_field_name=True)
            typer.echo(json.dumps(told | {"bill": bill}))
