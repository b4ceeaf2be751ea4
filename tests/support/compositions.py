"""docker-compose.federation.yml in a folder of its own, ready to be run as plain processes."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from support.clouds import own_share
from tightbeam.simulations.compose import Composition, read_services

__all__ = ["EDGES", "HAPROXY", "federation"]

ROOT = Path(__file__).parents[2]
EDGES = ("client-00", "client-01", "client-02")
HAPROXY = shutil.which("haproxy")
_NETWORKS = own_share(range(2, 255))


def federation(folder: Path, variables: Mapping[str, str]) -> Composition:
    """The services with empty folders, as the head of the file asks; addresses are this test's own."""
    project = folder / "project"
    shutil.copytree(ROOT / "deploy", project / "deploy")
    (project / "data" / "federation" / "certs").mkdir(parents=True)
    for name in ("cloud", "server", *EDGES):
        (project / "data" / "federation" / "runs" / name).mkdir(parents=True)
    for name in EDGES:
        (project / "data" / "federation" / "data" / name).mkdir(parents=True)
    services = read_services(ROOT / "docker-compose.federation.yml", variables)
    return Composition(services, project, folder / "containers", network=next(_NETWORKS))
