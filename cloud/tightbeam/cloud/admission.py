"""What the cloud takes on at a time, in all and from one tenant: a bound on its memory.

A tenant over its share is refused with CloudBusyError, which its edge retries; the others have theirs. What a
step may be is the card's limit, not this one, so a step larger than a share is admitted where it is alone.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tightbeam.common.errors import CloudBusyError
from tightbeam.common.wire.handshake import Session

__all__ = ["Opening", "Quota", "WaitingRoom"]

_WAIT_S = 60.0  # between a handshake and its stream


class Quota:
    """An amount that tenants share. Used from the event loop only."""

    def __init__(
        self,
        what: str,
        total: int,
        per_tenant: int,
        *,
        cure: str = "Retry later; close streams that are not in use, or send smaller steps.",
    ) -> None:
        self._what, self._total, self._per_tenant, self._cure = what, total, per_tenant, cure
        self._used: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """By all tenants together."""
        return self._used.total()

    def used_by(self, tenant: str) -> int:
        """By one tenant."""
        return self._used.get(tenant, 0)

    def take(self, tenant: str, amount: int = 1, *, instead_of: int = 0) -> None:
        """Count `amount` for `tenant`, in place of what it took before.

        Raises CloudBusyError when that is over its share or the total. One thing larger than a share is
        admitted alone, one in the cloud at a time, and takes nothing of the others' shares.
        """
        self.check(tenant, amount, instead_of=instead_of)
        self._used[tenant] += amount - instead_of

    def check(self, tenant: str, amount: int, *, instead_of: int = 0) -> None:
        """Raise what `take` would raise now."""
        share, mine = self._per_tenant, self.used_by(tenant) - instead_of
        others = [used for name, used in self._used.items() if name != tenant]
        if mine + amount <= share:
            if sum(min(used, share) for used in others) + mine + amount > self._total:
                raise self._busy(self._total, "for all clients")
        elif mine:
            raise self._busy(share, "for one client")
        elif any(used > share for used in others):
            raise self._busy(self._total, "for all clients")

    def give(self, tenant: str, amount: int = 1) -> None:
        """Return what was taken."""
        self._used[tenant] -= amount
        assert self._used[tenant] >= 0
        if not self._used[tenant]:
            del self._used[tenant]

    def _busy(self, limit: int, whose: str) -> CloudBusyError:
        return CloudBusyError(
            f"The cloud is at its limit of {limit:,} {self._what} {whose}.", cure=self._cure
        )


@dataclass(frozen=True, slots=True)
class Opening:
    """A session whose stream has not come yet."""

    session: Session
    span: range
    expires_s: float


class WaitingRoom:
    """Sessions between their handshake and their stream."""

    def __init__(
        self, quota: Quota, *, wait_s: float = _WAIT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quota, self._wait_s, self._clock = quota, wait_s, clock
        self._openings: dict[str, Opening] = {}  # by session id in hex, as streams name it

    def put(self, session: Session, span: range) -> None:
        """Keep a session for its stream; raises CloudBusyError when too many wait."""
        now = self._clock()
        for opening in [o for o in self._openings.values() if o.expires_s <= now]:
            self._remove(opening)
        self._quota.take(session.peer)
        self._openings[session.session_id.hex()] = Opening(session, span, now + self._wait_s)

    def take(self, session_id: str) -> Opening | None:
        """The session of that id (hex), once; None when there is none or its stream comes too late."""
        opening = self._openings.get(session_id)
        if opening is None:
            return None
        self._remove(opening)
        return opening if opening.expires_s > self._clock() else None

    def _remove(self, opening: Opening) -> None:
        del self._openings[opening.session.session_id.hex()]
        self._quota.give(opening.session.peer)
