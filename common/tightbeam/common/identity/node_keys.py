"""What a federation on Flower needs besides certificates: the keys by which a SuperLink knows its nodes.

    edges/             authority, cloud and client folders of `tightbeam certs init`: who may send activations
    fleet/             another authority; fleet/cloud has the TLS of the SuperLink and of the proxy before it
    nodes/<client>/    node.key, ca.crt: with edges/<client>, all that the client's machine needs
    roster/            <client>.pub, ca.crt: whom the operator admits, and how to recognise the SuperLink

The fleet has an authority of its own, so that whoever takes over the SuperLink cannot pose as the cloud,
which sees activations. Keys are EC P-384 in OpenSSH's format, as Flower asks. What is there is kept.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from tightbeam.common.errors import IdentityError
from tightbeam.common.files import atomic_write
from tightbeam.common.identity.authority import CLOUD_NAMES, InitReport, init_certificates
from tightbeam.common.identity.certificates import require_tenant_name

__all__ = ["init_federation", "init_node_keys"]


def init_federation(
    folder: Path,
    *,
    clients: Sequence[str],
    cloud_hosts: Sequence[str] = (),
    fleet_hosts: Sequence[str] = (),
    days: int = 365,
) -> InitReport:
    """Make what is missing of all four folders; hosts are names or addresses besides localhost.

    Raises:
        IdentityError: a name that cannot be a client's, or an authority that is incomplete or expired.

    """
    clouds, fleets = (*CLOUD_NAMES, *cloud_hosts), (*CLOUD_NAMES, *fleet_hosts)
    edges = init_certificates(folder / "edges", clients=clients, cloud_names=clouds, days=days)
    fleet = init_certificates(folder / "fleet", clients=(), cloud_names=fleets, days=days)
    keys = init_node_keys(folder, clients)
    authority = (folder / "fleet" / "ca" / "ca.crt").read_text(encoding="ascii")
    for place in (folder / "roster", *(folder / "nodes" / name for name in clients)):
        atomic_write(place / "ca.crt", authority)
    parts = (edges, fleet, keys)
    return InitReport(
        tuple(path for part in parts for path in part.created),
        tuple(path for part in parts for path in part.kept),
    )


def init_node_keys(folder: Path, clients: Sequence[str]) -> InitReport:
    """Make what is missing of `nodes/<client>/node.key` and `roster/<client>.pub`.

    Raises:
        IdentityError: a name that cannot be a client's, or a key that cannot be read.

    """
    created, kept = list[Path](), list[Path]()
    for name in [require_tenant_name(name) for name in dict.fromkeys(clients)]:
        path = folder / "nodes" / name / "node.key"
        (kept if path.exists() else created).append(path.parent)
        key = _read_key(path) if path.exists() else _new_key(path)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        atomic_write(folder / "roster" / f"{name}.pub", public)
    return InitReport(tuple(created), tuple(kept))


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = path.with_name(".node.key")
    with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    staged.replace(path)
    return key


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"The node key {path} cannot be read: {error}.",
            cure="Remove it to make another; its node is then registered anew.",
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"The node key {path} is of another kind.", cure="Remove it to make another.")
    return key
