"""A thread pool that tenants take turns in: who asks for a lot waits for its own work, the others do not."""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["TurnPool"]

T = TypeVar("T")


class TurnPool:
    """`max_workers` threads; of each tenant's work the oldest, of all tenants one after the other."""

    def __init__(self, max_workers: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(max_workers, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()

    def submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        """Run `work` when it is the tenant's turn."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append((future, work))
        self._threads.submit(self._take_turn)  # one call for each piece of work, whichever it will be
        return future

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """As `submit`, from an event loop; a caller that is cancelled gives up its place in the queue."""
        return await asyncio.wrap_future(self.submit(tenant, work))

    def close(self) -> None:
        """Finish what runs; what waits is cancelled."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for queue in self._waiting.values():
            for future, _ in queue:
                future.cancel()

    def _take_turn(self) -> None:
        with self._lock:
            tenant, queue = self._waiting.popitem(last=False)
            future, work = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind the others
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work()
        except BaseException as error:  # belongs to who waits for it
            future.set_exception(error)
        else:
            future.set_result(result)
