"""Steps that come again under a key that was billed.

Their replies may have been lost, so they are computed again and not billed: with the same content, not for
ever, and not by two at a time.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

from tightbeam.cloud.admission import Quota
from tightbeam.cloud.ledger import Billed, Ledger, LedgerEntry, conflict
from tightbeam.cloud.turns import TurnPool
from tightbeam.common.errors import CloudBusyError, StepRefusedError

__all__ = ["Repeats"]

_MOST = 32  # of one step; an edge gives up after fewer
_MOST_PER_TENANT = 256  # more than its new steps
_Key = tuple[str, str, int, str]  # as the ledger has it


class Repeats:
    """Judges a step before it is computed, and bills it after."""

    def __init__(self, ledger: Ledger, pool: TurnPool) -> None:
        self._ledger, self._pool = ledger, pool
        self._running: set[_Key] = set()
        self._quota = Quota(
            "steps computed again",
            1 << 62,
            _MOST_PER_TENANT,
            cure="Send new steps; these were answered before.",
        )

    @contextlib.contextmanager
    def alone(self, key: _Key) -> Iterator[None]:
        """Refuse a step that is being computed: what comes twice at once would be billed once."""
        if key in self._running:
            raise CloudBusyError(f"Step {key[2]} of run {key[1]!r} is being computed already.")
        self._running.add(key)
        try:
            yield
        finally:
            self._running.remove(key)

    async def expect(self, key: _Key, content: str) -> None:
        """Refuse a step that was billed with another `content` ("": not known yet), or repeated too often."""
        billed = await self.billed(key)
        if billed is None:
            return
        if content not in ("", billed.request_sha256):
            raise conflict(billed)
        if billed.reexecuted >= _MOST:
            raise StepRefusedError(
                f"Step {key[2]} ({key[3]}) of run {key[1]!r} was computed again {billed.reexecuted} times.",
                cure="Resume from the last checkpoint; something between edge and cloud loses the answers.",
            )
        self._quota.take(key[0])

    async def billed(self, key: _Key) -> LedgerEntry | None:
        """The entry of a step that was billed."""
        return await self._pool.run(key[0], partial(self._ledger.find, *key))

    async def bill(self, entry: LedgerEntry) -> Billed:
        """Write the step down; a new one makes room for one that comes again."""
        billed = await self._pool.run(entry.tenant, partial(self._ledger.record, entry))
        if billed.is_new and self._quota.used_by(entry.tenant):
            self._quota.give(entry.tenant)
        return billed
