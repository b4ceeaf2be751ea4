"""`tightbeam data check`: what the model would learn from a file, before any training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightbeam.cli.options import IdentityFolder, Insecure
from tightbeam.common.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tightbeam.edge.data import Limits

__all__ = ["app", "check"]

app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL or CSV.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder with the tokenizer.")] = None,
    cloud: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Or: the cloud to ask for it.")
    ] = None,
    identity: IdentityFolder = None,
    insecure: Insecure = False,
    max_length: Annotated[int, typer.Option(min=2, help="Longest example, tokens.")] = 1024,
    samples: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 2,
) -> None:
    """Count a file's examples and tokens, and show what is learned of the first ones in [[ ]]."""
    if (model is None) == (cloud is None):
        raise UsageError("The tokenizer is missing.", cure="Give --model or --cloud, one of them.")
    from tightbeam.edge.data import check_file
    from tightbeam.edge.data.reading import read_records

    read_records(file)  # before the tokenizer is fetched: a bad line is told at once
    if model is not None:
        tokenizer, limits = _local(model), _limits(model)
    else:
        tokenizer, limits = _remote(str(cloud), identity, insecure)
    typer.echo(check_file(file, tokenizer, samples, max_length=max_length, limits=limits).render())


def _local(model: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    from tightbeam.common.backbone import model_source, no_such_model

    source, offline = model_source(model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, local_files_only=offline, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if offline and not Path(source).is_dir():
            raise no_such_model(model, offline, error) from error
        raise UnsupportedModelError(
            f"{model} has no tokenizer that can be read ({str(error).splitlines()[0]}).",
            cure="Give a folder with a tokenizer, or a hub id.",
        ) from error
    return tokenizer


def _limits(model: str) -> "Limits":
    """What the model takes; a folder may hold a tokenizer alone."""
    from transformers import AutoConfig

    from tightbeam.edge.data import Limits

    try:
        return Limits.of_model(AutoConfig.from_pretrained(model, trust_remote_code=False))
    except (OSError, ValueError):
        return Limits()


def _remote(address: str, identity: Path | None, insecure: bool) -> "tuple[PreTrainedTokenizerBase, Limits]":
    from tightbeam.edge import connect
    from tightbeam.edge.data import Limits

    with connect(address, identity=identity, insecure=insecure) as cloud:
        return cloud.load_tokenizer(), Limits.of(cloud.card)
