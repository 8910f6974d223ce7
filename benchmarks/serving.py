"""A worker from inside: answers requests, lines of JSON, until the other end closes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TextIO

Reply = dict[str, object]
Answer = Callable[[Reply], None]


def answers() -> Answer:
    """What writes an answer. From here on it alone has standard output: whatever a library prints goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: Reply) -> None:
        lines.write(json.dumps(reply) + "\n")
        lines.flush()

    return answer


def serve(worker: object, requests: TextIO, answer: Answer) -> None:
    """Call the method of `worker` that each request names. What fails is answered too, as text."""
    for line in requests:
        request = json.loads(line)
        action = getattr(worker, request.pop("do"))
        try:
            answer(action(**request))
        except Exception as error:
            answer({"error": first_line(error)})


def first_line(error: Exception) -> str:
    """The type of an error, and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
