"""How late the event loop runs what is due: what every request waits for beside its own work."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

PROBE_SECONDS = 0.1


@contextlib.asynccontextmanager
async def measured_lag(
    observe: Callable[[float], None], probe_seconds: float = PROBE_SECONDS
) -> AsyncIterator[None]:
    """While this is open, `observe` is told every `probe_seconds` how many seconds late it was called."""
    task = asyncio.get_running_loop().create_task(_probe(observe, probe_seconds))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _probe(observe: Callable[[float], None], probe_seconds: float) -> None:
    while True:
        due = time.monotonic() + probe_seconds
        await asyncio.sleep(probe_seconds)
        observe(max(0.0, time.monotonic() - due))
