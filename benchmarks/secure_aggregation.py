"""Is the secure sum the plain sum for every dropout, and what does it cost?

    python benchmarks/secure_aggregation.py exact --clients 3,4,5
    python benchmarks/secure_aggregation.py cost --clients 10,50,100 --length 25000

`exact`: n clients, each of which stays or leaves in one of the four rounds of Bonawitz et al. 2017: 5^n patterns, with
the smallest threshold above n / 2.  Random updates in fixed point (22 bits, modulo 2^32); the sum of those whose
vectors arrived is compared, number for number, with the sum by Python's integers, and aborts with the count of
who is left.

`cost`: one run of the protocol with a threshold of 2 n / 3 + 1 and one client in ten leaving before its masked vector
arrives; CPU seconds of one thread and bytes, the mean over clients that stay.  Then the enclave: one contribution.
Time, hardware and versions are in the first line.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import TypeVar

import Crypto
import numpy as np
import torch

from leakaudit.federated.secure.bonawitz import ROUNDS, Aborted, Client, Server, Setup, Stage, secure_sum
from leakaudit.federated.secure.enclave import Host, SimulatedEnclave, SimulatedVendor, Terms, contribute
from leakaudit.federated.secure.fixed_point import FixedPoint
from leakaudit.federated.secure.primitives import operating_system
from leakaudit.federated.secure.ring import Ring, Vector
from leakaudit.randomness import fork
from leakaudit.update import Update

T = TypeVar("T")
BITS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("exact", "cost"))
    parser.add_argument("--clients", default="3,4")
    parser.add_argument("--length", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
    print(
        f"{now} UTC, {platform.machine()}, Python {platform.python_version()}, pycryptodome {Crypto.__version__}"
    )
    counts = [int(count) for count in options.clients.split(",")]
    if options.what == "exact":
        print("| clients | threshold | patterns | summed, exact | aborted, rightly | wrong |")
        print("|---|---|---|---|---|---|")
        for count in counts:
            exact(count, options.length)
        return
    print("| clients | threshold | up, KB | down, KB | client, s | server, s |")
    print("|---|---|---|---|---|---|")
    for count in counts:
        cost(count, options.length)
    enclave_cost(options.length)


def vectors(count: int, length: int) -> tuple[Ring, dict[int, Vector]]:
    """Random updates in fixed point, one a client."""
    numbers, like = FixedPoint(count, modulus_bits=BITS), Update({"w": torch.zeros(length)})
    draw = fork(0, f"updates/{count}")
    encoded = {
        index: numbers.encode(Update({"w": torch.randn(length, generator=draw)}), like)
        for index in range(count)
    }
    return numbers.ring(like), encoded


def exact(count: int, length: int) -> None:
    threshold = count // 2 + 1
    ring, given = vectors(count, length)
    summed = aborted = wrong = 0
    for pattern in product((*ROUNDS, Stage.ENDED), repeat=count):
        left = [sum(leaves > stage for leaves in pattern) for stage in ROUNDS]
        who = [index for index in range(count) if pattern[index] > Stage.MASKED_INPUT]
        setup = Setup(tuple(range(count)), threshold, ring, operating_system(16))
        try:
            outcome = secure_sum(setup, given, dict(enumerate(pattern)))
        except Aborted:
            right = min(left) < threshold
            aborted += right
        else:
            plain = np.array([given[index] for index in who], dtype=object).sum(0) % (1 << ring.bits)
            right = min(left) >= threshold and outcome.total.tolist() == plain.tolist()
            summed += right
        wrong += not right
    print(f"| {count} | {threshold} | {5**count} | {summed} | {aborted} | {wrong} |", flush=True)


class Stopwatch:
    """CPU seconds of this process."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, work: Callable[[], T]) -> T:
        began = time.process_time()
        result = work()
        self.seconds += time.process_time() - began
        return result


def cost(count: int, length: int) -> None:
    threshold = 2 * count // 3 + 1
    ring, given = vectors(count, length)
    setup = Setup(tuple(range(count)), threshold, ring, operating_system(16))
    watches, server_watch, up, down = [Stopwatch() for _ in given], Stopwatch(), [0] * count, [0] * count
    clients = [watch(lambda i=i: Client(setup, i)) for i, watch in enumerate(watches)]
    server = Server(setup)

    def collect(who: list[int], message: Callable) -> None:
        for index in who:
            sent = watches[index](lambda index=index: message(clients[index]))
            up[index] += sent.size
            server_watch(lambda sent=sent: server.receive(sent))

    everybody, stay = list(range(count)), list(range(count // 10, count))
    collect(everybody, Client.advertise)
    keys = server_watch(server.announce_keys)
    collect(everybody, lambda client: client.share(keys))
    relayed = server_watch(server.relay_shares)
    collect(stay, lambda client: client.mask(relayed[client.number], given[client.number]))
    request = server_watch(server.request_unmasking)
    collect(stay, lambda client: client.unmask(request))
    total = server_watch(server.unmask)
    assert total.tolist() == ring.reduce(np.sum([given[i] for i in stay], axis=0, dtype=np.uint64)).tolist()
    for index in stay:
        down[index] = keys.size + relayed[index].size + request.size
    client = statistics.mean(watches[index].seconds for index in stay)
    sizes = [statistics.mean(size[index] for index in stay) / 1e3 for size in (up, down)]
    print(
        f"| {count} | {threshold} | {sizes[0]:.1f} | {sizes[1]:.1f} | {client:.3f} | {server_watch.seconds:.2f} |",
        flush=True,
    )


def enclave_cost(length: int, goal: int = 20) -> None:
    terms = Terms(Ring(BITS, length), goal, operating_system(16))
    vendor, (_, given) = SimulatedVendor(), vectors(goal, length)
    enclave = SimulatedEnclave(terms, vendor)
    host, client, server = Host(terms, enclave), Stopwatch(), Stopwatch()
    for index, vector in given.items():
        sent = client(lambda i=index, v=vector: contribute(terms, enclave.quote(), vendor.public, i, v))
        server(lambda sent=sent: host.add(sent))
    server(host.release)
    print(
        f"enclave, a contribution: {sent.size / 1e3:.1f} KB up, {enclave.quote().size} bytes of quote down;"
        f" client {client.seconds / goal * 1e3:.1f} ms, host and enclave {server.seconds / goal * 1e3:.1f} ms;"
        f" {length * terms.ring.width / 1e3:.1f} KB would be the vector alone"
    )


if __name__ == "__main__":
    main()
