"""A simulation on Flower's own engines on this machine: Ray, or a SuperLink with a SuperNode per client.

Both are driven through the `flwr` command, as users drive them. The SuperLink speaks TLS and admits only
nodes whose keys were registered, as in a deployment.
"""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tightbeam.common.errors import FederationError
from tightbeam.common.identity.authority import init_certificates
from tightbeam.common.identity.node_keys import init_node_keys
from tightbeam.federation.contract.run_config import RunConfig
from tightbeam.federation.requirements import require_ray
from tightbeam.federation.runtimes.flower import Flower, flower_environment, flower_home, tool
from tightbeam.federation.runtimes.processes import Children

__all__ = ["run_deployed", "run_on_ray"]

_CLIENT_APP = "tightbeam.simulations.client_app"

_SUPERLINK_S = 120.0
_RAY_PORT = "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"


def run_on_ray(run: RunConfig, *, num_cpus: int = 1) -> None:
    """Run on Flower's simulation engine; each client gets `num_cpus` CPUs.

    Raises:
        UsageError: Ray is not installed.
        TightbeamError: see `Flower.run`.

    """
    require_ray()
    flower = Flower.prepare(flower_home(run.folder), "local", ":local:", client_app=_CLIENT_APP)
    options = f"num-supernodes={run.scenario.clients} client-resources-num-cpus={num_cpus}"
    port, before = str(_free_port()), os.environ.get(_RAY_PORT)
    os.environ[_RAY_PORT] = port
    try:
        flower.run(_absolute(run), "--federation-config", options)
    finally:
        _stop_local_superlink(port)
        if before is None:
            del os.environ[_RAY_PORT]
        else:
            os.environ[_RAY_PORT] = before


def run_deployed(run: RunConfig) -> None:
    """Run on a SuperLink and one SuperNode per client, all started here, over TLS and with node keys.

    Raises:
        TightbeamError: one of these processes ended, or see `Flower.run`.

    """
    home, address = flower_home(run.folder).absolute(), f"127.0.0.1:{_free_port()}"
    init_certificates(home / "certs", clients=())
    server = home / "certs" / "cloud"
    flower = Flower.prepare(home, "superlink", address, server / "ca.crt", client_app=_CLIENT_APP)
    names = [profile.name for profile in run.scenario.profiles()]
    with Children(run.folder / "logs") as children, _keys(home / "keys", names) as keys:
        _start_superlink(children, home, server, address)
        flower.register(keys / "roster")
        for number, name in enumerate(names):
            key = keys / "nodes" / name / "node.key"
            config = f"partition-id={number} num-partitions={len(names)}"
            command = [tool("flower-supernode"), "--superlink", address, "--node-config", config]
            command += ["--root-certificates", str(server / "ca.crt")]
            command += ["--auth-supernode-private-key", str(key)]
            command += ["--host", "127.0.0.1", "--port", str(_free_port())]
            children.start(f"supernode-{number}", command, flower_environment(home))
        flower.run(_absolute(run), watch=children.require_alive)


def _absolute(run: RunConfig) -> RunConfig:
    identities = None if run.identities is None else run.identities.absolute()
    return replace(run, identities=identities, folder=run.folder.absolute())


@contextlib.contextmanager
def _keys(folder: Path, names: list[str]) -> Iterator[Path]:
    """One key per node, taken away at the end: they are for this run only."""
    try:
        init_node_keys(folder, names)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_superlink(children: Children, home: Path, identity: Path, address: str) -> None:
    host, _, port = address.rpartition(":")
    command = [tool("flower-superlink"), "--host", host, "--port", port]
    command += ["--ssl-ca-certfile", str(identity / "ca.crt"), "--ssl-certfile", str(identity / "tls.crt")]
    command += ["--ssl-keyfile", str(identity / "tls.key"), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation"]
    child = children.start("superlink", command, flower_environment(home))
    deadline_s = time.monotonic() + _SUPERLINK_S
    while not _listens(host, int(port)):
        children.require_alive()
        if time.monotonic() > deadline_s:
            raise FederationError("The SuperLink did not come up.", cure=f"See {child.log}.")
        time.sleep(0.2)


def _stop_local_superlink(port: str) -> None:
    """`flwr run` leaves its SuperLink running for ever; it is known by its port."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "flower-superlink" in line and port in line:
            for child in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
