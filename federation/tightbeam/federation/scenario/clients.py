"""What each client of a scenario has: its mode, cut, codec, rank, network, device and budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tightbeam.common.settings.sections import Section
from tightbeam.edge.modes.registry import MODES
from tightbeam.edge.recipe import Codecs, CutText, ModeName, SideSection
from tightbeam.federation.profiles import DEVICES, NETWORKS, Budget, DeviceProfile, NetworkProfile

__all__ = ["ClientProfile", "ClientSection", "GroupSection"]


def _named(table: Mapping[str, Section], what: str) -> BeforeValidator:
    """Let a profile be given by its name."""

    def look_up(value: object) -> object:
        if not isinstance(value, str):
            return value
        if value not in table:
            raise ValueError(f"no {what} is called {value!r}; known are {', '.join(table)}")
        return table[value].model_dump()

    return BeforeValidator(look_up)


Network = Annotated[NetworkProfile, _named(NETWORKS, "network")]
Device = Annotated[DeviceProfile, _named(DEVICES, "device")]
Share = Literal["all", "top", "none"]


class ClientSection(Section):
    """What every client has."""

    mode: ModeName = Field(default="ushape", description="How training uses the trunk: see docs/modes.md.")
    side: SideSection = Field(default_factory=SideSection, description="The side network of mode side.")
    share: Share = Field(
        default="all", description="What is federated; the rest is the client's own (personal mode)."
    )
    cache_gb: float = Field(
        default=5.0, ge=0, description="Most of what crosses once to keep, 10^9 bytes; 0 keeps nothing."
    )
    cut: CutText = Field(default="4:4", description="k:m, blocks at the edge.")
    codec: Codecs = Field(default_factory=Codecs, description="How tensors become bytes.")
    r: int = Field(default=8, ge=1, description="Rank of the adapter.")
    network: Network = Field(default=NETWORKS["home"], description="Name or numbers.")
    device: Device = Field(default=DEVICES["laptop"], description="Name or numbers.")
    budget: Budget = Field(default_factory=Budget, description="Most to spend; no limit if left out.")

    @property
    def place(self) -> tuple[object, ...]:
        """What decides which parameters it shares, and their shapes up to the rank."""
        side = self.own_side
        return self.cut, self.mode, self.share, side.model_dump_json() if side else ""

    @property
    def own_side(self) -> SideSection | None:
        """Its side network; None in a mode without one."""
        return self.side if MODES[self.mode].has_side else None

    @property
    def keeps_own(self) -> bool:
        """Whether it ends with an adapter of its own, beside the one that all share."""
        return self.share != "all" or self.own_side is not None

    @property
    def shared_blocks(self) -> int:
        """How many blocks have an adapter that it shares."""
        return self.blocks_shared_in(self.mode)

    def blocks_shared_in(self, mode: str) -> int:
        """The same, had it trained in another mode."""
        bottom, top = map(int, self.cut.split(":"))
        bare = not MODES[mode].adapts_bottom(self.side)
        if self.share == "none":
            return 0
        return top if bare or self.share == "top" else bottom + top


class GroupSection(Section):
    """So many clients that have something else than `client` says; groups take clients in order."""

    clients: int = Field(ge=1, description="How many.")
    mode: ModeName | None = None
    side: SideSection | None = None
    share: Share | None = None
    cache_gb: float | None = Field(default=None, ge=0)
    cut: CutText | None = None
    codec: Codecs | None = None
    r: int | None = Field(default=None, ge=1)
    network: Network | None = None
    device: Device | None = None
    budget: Budget | None = None


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """One client, with its group's values in place."""

    number: int
    name: str
    group: str
    options: ClientSection
