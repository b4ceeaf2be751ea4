"""`tightbeam simulate`: a scenario from its file to its report, in this process and one cloud beside it.

<output.dir>/<output.name>/
scenario.yaml    as it was run           clients/    each client's examples and its edge's ledger
ledger.jsonl     the server's accounts   state/      what --resume goes on from
adapter/         the result, for PEFT    certs/      identities of the cloud that was started here
report.html, federation.json, federation.csv         the report
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from rich.console import Console

from tightbeam.common.errors import UsageError
from tightbeam.common.files import atomic_write, cache_folder
from tightbeam.common.identity.authority import init_certificates
from tightbeam.common.locks import FolderLock
from tightbeam.federation.accounts.progress import FederationProgress
from tightbeam.federation.requirements import require_accountant, require_flower, require_ray
from tightbeam.federation.runtimes.processes import Children, signals_as_exit
from tightbeam.federation.scenario import Scenario
from tightbeam.federation.server.journal import require_unused
from tightbeam.simulations.demo_inputs import prepare_model
from tightbeam.simulations.shaping import require_local
from tightbeam.simulations.shards import client_files

__all__ = ["Runtime", "require_flower", "run_apps", "run_scenario"]

if TYPE_CHECKING:
    from tightbeam.federation.contract.run_config import RunConfig
    from tightbeam.federation.runtimes.grid import ClientCall

Runtime = Literal["in-process", "ray", "deployed"]
_READY_S = 600.0  # a busy machine loads a model and fits its taps slowly
_MANUAL_CHARS = 20_000  # some 5,000 tokens: plenty for a few dozen directions


def run_scenario(
    scenario: Scenario,
    *,
    resume: bool = False,
    runtime: Runtime = "in-process",
    shape: bool = False,
    console: Console | None = None,
) -> Path:
    """Run an experiment and return the path of its report.

    `runtime` says what carries messages between server and clients: the grid in this process, Flower's
    simulation engine on Ray, or a SuperLink and SuperNodes over TLS. With `shape` the clients' steps really
    take the time that their networks' profiles say, so that both can be compared.

    Raises:
        TightbeamError: what the scenario, its data, the cloud or the clients cause; see each class.

    """
    require_flower()
    if runtime == "ray":
        require_ray()
    if scenario.strategy.privacy is not None:
        require_accountant()
    console = console or Console(stderr=True)
    cure = "Wait until it ends or stop it, or give this one another output.name."
    with FolderLock(scenario.folder, what=f"The experiment {scenario.folder}", cure=cure, warn=console.print):
        return _run(scenario, resume, runtime, shape, console)


def _run(scenario: Scenario, resume: bool, runtime: Runtime, shape: bool, console: Console) -> Path:
    folder = scenario.folder
    if not resume:
        require_unused(folder)
    client_files(scenario, folder, scenario.profiles()[0].name)  # an impossible partition is told first
    with signals_as_exit(), _cloud(scenario, folder, console) as (address, identities):
        if shape:
            require_local(address)
        text = yaml.safe_dump(scenario.model_dump(mode="json"), sort_keys=False)  # groups have an order
        atomic_write(folder / "scenario.yaml", text)
        if runtime == "in-process":
            run_apps(scenario, address, identities, console=console, resume=resume, shape=shape)
        else:
            from tightbeam.federation.contract.run_config import RunConfig

            _run_flower(runtime, RunConfig(scenario, address, identities, folder, resume, shape))
    from tightbeam.federation.accounts.report import write_report

    return write_report(folder, scenario)


def run_apps(
    scenario: Scenario,
    address: str,
    identities: Path | None,
    *,
    console: Console,
    resume: bool = False,
    shape: bool = False,
    client_app: "ClientCall | None" = None,
) -> None:
    """Run both apps on the in-process grid against the cloud at `address`; insecure without identities.

    Raises as `run_scenario`.
    """
    import logging

    # Slow to import: a cloud that was just started is loading its model meanwhile.
    from tightbeam.federation.contract.run_config import RunConfig
    from tightbeam.federation.runtimes.grid import Exchange, InProcessGrid, run_in_process
    from tightbeam.federation.server.server_app import app as server_app
    from tightbeam.simulations.client_app import app

    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = RunConfig(scenario, address, identities, scenario.folder, resume, shape).run_config()
    with FederationProgress(scenario, console) as progress:

        def on_exchange(exchange: Exchange, reply: Any) -> None:
            records = reply.content.metric_records if reply.has_content() else {}
            progress.on_reply(exchange.partition, records.get("metrics", {}))

        grid = InProcessGrid(client_app or app, scenario.clients, config, progress.on_start, on_exchange)
        grid.listener = progress.on_row
        run_in_process(grid, server_app, config)


def _run_flower(runtime: Runtime, run: "RunConfig") -> None:
    from tightbeam.simulations.engines import run_deployed, run_on_ray

    (run_on_ray if runtime == "ray" else run_deployed)(run)


@contextlib.contextmanager
def _cloud(scenario: Scenario, folder: Path, console: Console) -> Iterator[tuple[str, Path | None]]:
    """Address of the cloud and identities of the clients; a cloud is started unless there is one."""
    section = scenario.cloud
    if section.address is not None:
        if section.identities is None and not section.insecure:
            raise UsageError(
                "The scenario names a cloud, but no identities.",
                cure="Set cloud.identities to the folder of `tightbeam certs init`, or cloud.insecure.",
            )
        yield section.address, section.identities
        return
    model = str(prepare_model(cache_folder())) if scenario.backbone == "demo" else scenario.backbone
    names = [profile.name for profile in scenario.profiles()]
    init_certificates(folder / "certs", clients=names)
    with Children(folder / "logs") as children:
        command = [
            sys.executable,
            "-m",
            "tightbeam.cli",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--model",
            model,
        ]
        command += ["--identity", str(folder / "certs" / "cloud"), "--ledger", str(folder / "cloud.db")]
        command += _projection(scenario, folder)
        threads = str(scenario.threads or os.cpu_count() or 1)
        child = children.start("cloud", command, {"OMP_NUM_THREADS": threads})
        console.print(f"starting a cloud for {model} ...", markup=False, highlight=False, soft_wrap=True)
        yield child.first_answer(_READY_S), folder / "certs"


def _projection(scenario: Scenario, folder: Path) -> list[str]:
    """Options of a cloud whose taps someone asks for."""
    sides = [profile.options.own_side for profile in scenario.profiles()]
    if not any(side.taps for side in sides if side):
        return []
    text = scenario.cloud.projection_text
    if text is None:
        from pydoc_data.topics import topics  # Python's own manual, which comes with it

        text = folder / "projection.txt"
        atomic_write(text, "\n\n".join(topics[name] for name in sorted(topics))[:_MANUAL_CHARS])
    return ["--projection", str(folder / "projection.safetensors"), "--projection-text", str(text)]
