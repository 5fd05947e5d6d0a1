"""The simulated enclave in a process of its own: host and enclave exchange lines of JSON over pipes, never pickles.

    {"do": "accept", "ephemeral": "...", "sealed": "..."}   ->  {}  or  {"error": "..."}

Run as `python -m leakaudit.federated.secure.enclave_process`; its first line holds the terms and the simulated
vendor's private key, which real hardware would have been made with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import leakaudit
from leakaudit.federated.secure.enclave import (
    SealedSeed,
    SimulatedEnclave,
    SimulatedQuote,
    SimulatedVendor,
    Terms,
    decoded,
    encoded,
)
from leakaudit.federated.secure.primitives import ProtocolError
from leakaudit.federated.secure.ring import Ring

Answer = dict[str, str]
SECONDS = 60.0
"""The longest that one answer may take."""


class IsolatedEnclave:
    """`SimulatedEnclave` in a process of its own, with the same methods; use it in a `with` block, or `close` it.

    Args:
        seconds: after which an answer that has not come ends the process.

    Every method raises `ProtocolError` for what the enclave refuses, and when its process has ended.
    """

    def __init__(self, terms: Terms, vendor: SimulatedVendor, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        package = str(Path(leakaudit.__file__).parents[1])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        quote = self._ask(
            {
                "bits": terms.ring.bits,
                "length": terms.ring.length,
                "goal": terms.goal,
                "session": encoded(terms.session),
                "vendor": encoded(vendor.private),
            }
        )
        self._quote = SimulatedQuote(*(decoded(quote[name]) for name in ("code", "public", "signature")))

    def __enter__(self) -> IsolatedEnclave:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def quote(self) -> SimulatedQuote:
        return self._quote

    def accept(self, seed: SealedSeed) -> None:
        self._ask({"do": "accept", "ephemeral": encoded(seed.ephemeral), "sealed": encoded(seed.sealed)})

    def release(self, buffer: int) -> bytes:
        return decoded(self._ask({"do": "release", "buffer": buffer})["masks"])

    def close(self) -> None:
        """End the process; what it has summed is lost."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # it held what the process will not read any more
                    continue

    def _ask(self, message: Mapping[str, object]) -> Answer:
        """Send a line, wait for a line; a process that does not answer in time is ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(self._seconds, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # a broken or closed pipe
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise ProtocolError("the process of the simulated enclave has ended, or did not answer in time")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise ProtocolError(answer["error"])
        return answer


def serve(lines: IO[str], answers: IO[str]) -> None:
    """Answer every line until there are no more; the enclave's key lives as long."""
    first = json.loads(lines.readline())
    terms = Terms(Ring(first["bits"], first["length"]), first["goal"], decoded(first["session"]))
    enclave = SimulatedEnclave(terms, SimulatedVendor(decoded(first["vendor"])))
    quote = enclave.quote()
    _answer(
        answers,
        {
            "code": encoded(quote.code),
            "public": encoded(quote.public),
            "signature": encoded(quote.signature),
        },
    )
    for line in lines:
        _answer(answers, _reply(enclave, line))


def _reply(enclave: SimulatedEnclave, line: str) -> Answer:
    """A line that is no message is refused, and the enclave goes on."""
    actions: dict[object, Callable[[dict], Answer]] = {
        "accept": lambda message: _accept(enclave, message),
        "release": lambda message: {"masks": encoded(enclave.release(int(message["buffer"])))},
    }
    try:
        message = json.loads(line)
        return actions[message["do"]](message)
    except ProtocolError as error:
        return {"error": str(error)}
    except (ValueError, KeyError, TypeError):
        return {"error": "the enclave was sent a line that is no message"}


def _accept(enclave: SimulatedEnclave, message: dict) -> Answer:
    enclave.accept(SealedSeed(decoded(message["ephemeral"]), decoded(message["sealed"])))
    return {}


def _answer(answers: IO[str], answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
