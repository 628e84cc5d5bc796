"""Taking turns on the event loop."""

import asyncio
import time

TURN_SECONDS = 0.01


class Turn:
    """For loops over what may all be there already, where `await` alone never lets the others run."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    async def pass_on(self) -> None:
        """Let the others run if this turn has lasted `TURN_SECONDS`."""
        if time.monotonic() - self._began > TURN_SECONDS:
            await asyncio.sleep(0)
            self._began = time.monotonic()
