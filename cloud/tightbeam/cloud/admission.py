"""What the cloud takes on at a time, in all and from one tenant: a bound on its memory.

A tenant over its share is refused with CloudBusyError, which its edge retries; the others have theirs. One
thing alone is always admitted, however large: what a step may be is the card's limit, not this one.
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

    def __init__(self, what: str, total: int, per_tenant: int) -> None:
        self._what, self._total, self._per_tenant = what, total, per_tenant
        self._used: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """By all tenants together."""
        return self._used.total()

    def take(self, tenant: str, amount: int = 1) -> None:
        """Count `amount` for `tenant`; raises CloudBusyError when that is over its share or the total."""
        for used, limit, whose in (
            (self._used[tenant], self._per_tenant, "for one client"),
            (self.used, self._total, "for all clients"),
        ):
            if used and used + amount > limit:
                raise CloudBusyError(
                    f"The cloud is at its limit of {limit:,} {self._what} {whose}.",
                    cure="Retry later; close streams that are not in use, or send smaller steps.",
                )
        self._used[tenant] += amount

    def give(self, tenant: str, amount: int = 1) -> None:
        """Return what was taken."""
        self._used[tenant] -= amount
        assert self._used[tenant] >= 0
        if not self._used[tenant]:
            del self._used[tenant]


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
