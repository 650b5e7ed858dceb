"""Reading what is needed next while something else is computed.

A forward pass and the stored logits that it is compared with need different parts of a machine, so the reading goes on
in threads beside it: decoding, checksums and copies leave the interpreter's lock alone. `logits_ahead` does it for
stored logits; `ReadAhead` knows nothing of them.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor

from trm_audit.shards.logits import Runs, StoredLogits

AHEAD_BYTES = 256 << 20
THREADS = max(1, min(8, (os.cpu_count() or 1) // 4))
"""Row groups decoded side by side: one beside the forward of a small machine, enough for a fast disk on a large one."""

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")
Submit = Callable[[Callable[[], Any]], Future[Any]]


class ReadAhead(Generic[RequestT, ResultT]):
    """Iterates over what `read` returns for each request, in order, read by a thread before it is asked for.

    Reading begins at once and ends with the `with` block, however that is left: what has not begun is dropped, what is
    being read is waited for, and no thread stays behind.

        with ReadAhead(requests, read, size_of, max_bytes=1 << 28) as results:
            for result in results:
                ...

    An exception of `read` is raised where its result would have come; the next request follows after it.

    Args:
        requests: in the order in which they will be used; taken one by one as there is room.
        read: one request -> its result; called by one thread, never twice at a time.
        size_of: one request -> bytes of its result.
        max_bytes: of results that are read or being read and not asked for yet; one is on its way however large it is,
            and the one asked for last comes on top.
        prepare: called with each request as it is taken, and with the `submit` of an executor of so many `threads`, to
            begin what `read` would wait for.
    """

    def __init__(
        self,
        requests: Iterable[RequestT],
        read: Callable[[RequestT], ResultT],
        size_of: Callable[[RequestT], int],
        *,
        max_bytes: int = AHEAD_BYTES,
        prepare: Callable[[RequestT, Submit], None] | None = None,
        threads: int = 1,
    ) -> None:
        self._read, self._size_of, self._max_bytes, self._prepare = read, size_of, max_bytes, prepare
        self._to_read = deque[RequestT]()
        self._requests = iter(requests)
        self._waiting = deque[tuple[Future[ResultT], int]]()
        self._waiting_bytes = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._helpers = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead-helper")
        self._fill()

    def __enter__(self) -> ReadAhead[RequestT, ResultT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[ResultT]:
        return self

    def __next__(self) -> ResultT:
        if not self._waiting:
            raise StopIteration
        future, size = self._waiting.popleft()
        self._waiting_bytes -= size
        self._fill()
        return future.result()

    def close(self) -> None:
        """Stops reading and waits until no thread does. What was read and not asked for is forgotten."""
        self._requests = iter(())
        self._to_read.clear()
        self._waiting.clear()
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._helpers.shutdown(cancel_futures=True)
        self._reader.shutdown()

    def _fill(self) -> None:
        """Takes requests while there is room for their results."""
        while self._to_read or self._take():
            request = self._to_read[0]
            size = self._size_of(request)
            if self._waiting and self._waiting_bytes + size > self._max_bytes:
                return
            self._to_read.popleft()
            if self._prepare is not None:
                self._prepare(request, self._helpers.submit)
            self._waiting.append((self._reader.submit(self._read, request), size))
            self._waiting_bytes += size

    def _take(self) -> bool:
        self._to_read.extend(itertools.islice(self._requests, 1))
        return bool(self._to_read)


def logits_ahead(
    stored: StoredLogits,
    requests: Iterable[tuple[str, Runs]],
    *,
    max_bytes: int = AHEAD_BYTES,
    pin: bool = False,
    threads: int = THREADS,
) -> ReadAhead[tuple[str, Runs], Tensor]:
    """Rows of stored logits, [n, V] for each request, in order and unchecked (`StoredLogits.gather`, `diagnose`).

    In memory at most: the cache of `stored` and half as much again, `threads` row groups that are being read,
    `max_bytes`, and the tensor asked for last.

    Args:
        stored: the logits; may be used beside this.
        requests: rollout and runs of its response positions.
        max_bytes: of tensors that wait.
        pin: into page-locked memory (needs a GPU).
        threads: that decode row groups.
    """
    return ReadAhead(
        requests,
        lambda request: stored.gather(*request, pin=pin),
        lambda request: stored.gathered_bytes(*request),
        max_bytes=max_bytes,
        prepare=lambda request, submit: stored.read_soon(*request, submit),
        threads=threads,
    )
