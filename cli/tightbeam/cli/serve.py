"""`tightbeam serve`: the cloud's side, until SIGTERM or Ctrl-C."""

from pathlib import Path
from typing import Annotated

import typer

from tightbeam.cli.options import IdentityFolder, Insecure, require_loopback, say
from tightbeam.common.errors import UsageError

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Option(help="Hub id or folder of a transformers causal LM.")],
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.")
    ] = "127.0.0.1:50051",
    identity: IdentityFolder = None,
    insecure: Insecure = False,
    cut_policy: Annotated[
        str, typer.Option(help="Which cuts are allowed, as in min_bottom=1,min_top=1.")
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    retention_bytes: Annotated[
        int | None,
        typer.Option(help="Held graphs, bytes; above it steps recompute. A quarter of free memory."),
    ] = None,
    max_tokens_per_step: Annotated[int, typer.Option(help="Larger steps are refused.")] = 65536,
    in_flight_bytes: Annotated[
        int | None,
        typer.Option(help="Steps on their way, bytes; above it edges wait. A quarter of free memory."),
    ] = None,
    projection: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fitted projection of the taps, for mode side."),
    ] = None,
    projection_text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public text to fit it on, once; --projection says where it goes."),
    ] = None,
    tap_size: Annotated[
        int | None, typer.Option(help="Elements per tap and token; a sixteenth of the hidden size.")
    ] = None,
    taps: Annotated[int, typer.Option(help="Most taps in one step; 0 hands out none.")] = 16,
    ledger: Annotated[
        str, typer.Option(metavar="FILE", help="Who used what: a SQLite file, or postgresql://...")
    ] = "ledger.db",
    prices: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with what the cloud asks; else it names no prices."),
    ] = None,
) -> None:
    """Serve the frozen blocks of a model to edges."""
    if insecure:
        require_loopback(listen, identity)
    elif identity is None:
        raise UsageError(
            "serve needs an identity.", cure="Give --identity DIR (`tightbeam certs init` makes one)."
        )
    if projection is None and (projection_text is not None or tap_size is not None):
        projection = Path("projection.safetensors")
    import asyncio
    import logging

    from tightbeam.cloud.projections import ProjectionOptions
    from tightbeam.cloud.server import ServeOptions
    from tightbeam.cloud.server import serve as serve_forever
    from tightbeam.common.accounts.prices import Prices

    options = ServeOptions(
        model=model,
        listen=listen,
        identity=identity,
        insecure=insecure,
        cut_policy=cut_policy,
        device=device,
        dtype=dtype,
        retention_bytes=retention_bytes,
        ledger=ledger,
        max_tokens_per_step=max_tokens_per_step,
        in_flight_bytes=in_flight_bytes,
        prices=Prices.load(prices) if prices else None,
        projection=None
        if projection is None
        else ProjectionOptions(file=projection, text=projection_text, size=tap_size),
        max_taps=taps,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    host = listen.rpartition(":")[0]
    say(f"loading {model} ...")
    asyncio.run(serve_forever(options, on_ready=lambda port: typer.echo(f"{host}:{port}")))
