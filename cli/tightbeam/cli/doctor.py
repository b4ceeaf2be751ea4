"""`tightbeam doctor`: whether this machine is ready and the way to the cloud works."""

import typer

from tightbeam.cli.options import Address, IdentityFolder, Insecure

__all__ = ["doctor"]


def doctor(
    address: Address,
    identity: IdentityFolder = None,
    insecure: Insecure = False,
) -> None:
    """Check this machine and the way to a cloud, step by step; each failure says its cure."""
    from tightbeam.edge.doctor import examine

    findings = examine(address, identity=identity, insecure=insecure)
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
        if not finding.ok:
            typer.echo(f"      cure: {finding.cure}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
