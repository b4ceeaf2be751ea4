"""What a client keeps to itself between rounds: the part of its adapter that is not federated.

    clients/<client>/personal/round-N.safetensors    after its local steps in round N

In the field's words partial sharing, or personalisation layers (FedPer, arXiv 1912.00818; FedRep,
2102.07078). Those keep the head local. With `share: top` it is the other way round, as in LG-FedAvg
(2001.01523): the bottom is local, the top is shared. A resumed experiment does the round again that was cut
off; so a round starts from what the client had before it, even if it had finished its own part of it.
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors.numpy import load_file, save

from tightbeam.common.files import atomic_write
from tightbeam.federation.math import Arrays

__all__ = ["PersonalPart"]

_KEEP = 2  # the last round may have to be done again


class PersonalPart:
    """One client's folder of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def before(self, number: int) -> Arrays | None:
        """What it had when round `number` began; None for a client that has not trained yet."""
        rounds = [one for one in self._rounds() if one < number]
        return load_file(self._path(max(rounds))) if rounds else None

    def save(self, number: int, arrays: Arrays) -> None:
        """Keep what it has after its steps in round `number`."""
        atomic_write(self._path(number), save(dict(arrays)))
        for old in sorted(self._rounds())[:-_KEEP]:
            self._path(old).unlink()

    def _rounds(self) -> Iterable[int]:
        return [int(path.stem.removeprefix("round-")) for path in self._folder.glob("round-*.safetensors")]

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number}.safetensors"
