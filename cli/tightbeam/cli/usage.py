"""`tightbeam usage`: what the cloud's ledger says this tenant has used."""

import typer

from tightbeam.cli.options import Address, IdentityFolder, Insecure

__all__ = ["usage"]


def usage(address: Address, identity: IdentityFolder = None, insecure: Insecure = False) -> None:
    """Print one line of JSON per run of this tenant, as the cloud bills it."""
    from google.protobuf.json_format import MessageToJson

    from tightbeam.edge import connect

    with connect(address, identity=identity, insecure=insecure) as cloud:
        for run in cloud.usage():
            typer.echo(MessageToJson(run, indent=None, preserving_proto_field_name=True))
