"""What a client reads out of a stream."""

import json
from typing import Any

import httpx


def events_of(content: str) -> list[Any]:
    """The objects of a whole stream, which must end with its only `[DONE]`; comments are left out.

    Not by lines: JSON may hold, as they are, characters at which `splitlines` breaks.
    """
    events = [event for event in content.split("\n\n") if not event.startswith(":")]
    assert events[-2:] == ["data: [DONE]", ""], content
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def end_of_stream(response: httpx.Response) -> str:
    """The finish reason of the only choice, or the code of the error; of a whole answer to `stream`."""
    if response.status_code != httpx.codes.OK:
        return str(response.json()["error"]["code"])
    last = events_of(response.text)[-1]
    return str(last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"])
