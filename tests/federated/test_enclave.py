"""The simulated enclave: exact sums of a buffer, one release, and what host, enclave and client refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ciphers import chacha20
from scipy.stats import chisquare

from leakaudit.federated.secure import enclave_process
from leakaudit.federated.secure.enclave import (
    Contribution,
    Enclave,
    Host,
    SealedSeed,
    SimulatedEnclave,
    SimulatedVendor,
    Terms,
    check_quote,
    code_hash,
    contribute,
)
from leakaudit.federated.secure.enclave_process import IsolatedEnclave
from leakaudit.federated.secure.primitives import ProtocolError, simulated_randomness
from leakaudit.federated.secure.ring import Ring, Vector

TERMS = Terms(Ring(32, 50), goal=3, session=bytes(range(16)))
VENDOR = SimulatedVendor(bytes(range(32)))


def refused(match: str) -> pytest.RaisesExc[ProtocolError]:
    return pytest.raises(ProtocolError, match=match)


def vectors(terms: Terms, count: int, seed: int = 0) -> list[Vector]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 1 << terms.ring.bits, terms.ring.length, dtype=np.uint64) for _ in range(count)]


def contributions(terms: Terms, enclave: Enclave, given: list[Vector], name: str = "") -> list[Contribution]:
    source = simulated_randomness(0, name)
    return [
        contribute(terms, enclave.quote(), VENDOR.public, i, vector, source) for i, vector in enumerate(given)
    ]


@pytest.fixture(params=["in this process", "isolated"])
def enclave(request: pytest.FixtureRequest) -> Iterator[Enclave]:
    made = (SimulatedEnclave if request.param == "in this process" else IsolatedEnclave)(TERMS, VENDOR)
    yield made
    made.close()


def test_a_buffer_sums_exactly_and_is_released_once(enclave: Enclave) -> None:
    host, given = Host(TERMS, enclave), vectors(TERMS, 6)
    sent = contributions(TERMS, enclave, given)
    for buffer in range(2):
        mine = slice(3 * buffer, 3 * buffer + 3)
        for contribution in sent[mine]:
            with refused(f"buffer {buffer} holds {host.count} of 3 contributions"):
                host.release()
            host.add(contribution)
        assert host.full
        expected = [sum(int(v[i]) for v in given[mine]) % 2**32 for i in range(50)]
        assert host.release().tolist() == expected
        with refused(f"masks of buffer {buffer} were released before"):
            enclave.release(buffer)
        with refused(f"buffer {buffer + 1} holds 0 of 3"):
            enclave.release(buffer + 1)


def test_contributions_that_are_refused_leave_nothing_behind(enclave: Enclave) -> None:
    host, given = Host(TERMS, enclave), vectors(TERMS, 4)
    first, second, third, fourth = contributions(TERMS, enclave, given)
    host.add(first)
    with refused("accepted before"):
        host.add(first)
    with refused("accepted before"):
        host.add(replace(second, seed=first.seed))
    with refused("of another session"):
        host.add(replace(second, session=bytes(16)))
    with refused("a vector of 199 bytes; accepted: 200"):
        host.add(replace(second, masked=second.masked[1:]))
    tampered = bytes([second.seed.sealed[0] ^ 1]) + second.seed.sealed[1:]
    with refused("tampered with, or sealed for somebody else"):
        host.add(replace(second, seed=replace(second.seed, sealed=tampered)))
    with refused("tampered with"):
        host.add(replace(second, seed=replace(second.seed, ephemeral=third.seed.ephemeral)))
    with refused("not one of X25519"):
        host.add(replace(second, seed=replace(second.seed, ephemeral=bytes(32))))
    with refused("a sealed seed of 32 and 3 bytes; accepted: 32 and 60"):
        host.add(replace(second, seed=replace(second.seed, sealed=b"abc")))
    assert host.count == 1
    host.add(second)
    host.add(third)
    with refused("buffer 0 is full with 3"):
        host.add(fourth)
    assert host.release().tolist() == [sum(int(v[i]) for v in given[:3]) % 2**32 for i in range(50)]
    with refused("accepted before"):
        host.add(first)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 63), st.integers(2, 6), st.integers(1, 30), st.integers(0, 2**32))
def test_sums_of_any_size(bits: int, goal: int, length: int, seed: int) -> None:
    terms = Terms(Ring(bits, length), goal, bytes(16))
    enclave, given = SimulatedEnclave(terms, VENDOR), vectors(terms, goal, seed)
    host = Host(terms, enclave)
    for contribution in contributions(terms, enclave, given, str(seed)):
        host.add(contribution)
    assert host.release().tolist() == [sum(int(v[i]) for v in given) % 2**bits for i in range(length)]


def test_the_mask_against_an_independent_computation_and_uniform() -> None:
    terms = Terms(Ring(32, 20_000), 2, bytes(16))
    enclave, zero = SimulatedEnclave(terms, VENDOR), terms.ring.zeros()
    source = simulated_randomness(0, "mask")
    sent = contribute(terms, enclave.quote(), VENDOR.public, 0, zero, source)
    stream = chacha20(simulated_randomness(0, "mask")(32), 400)
    assert sent.masked[:400] == stream
    digits = np.bincount(np.frombuffer(sent.masked, dtype=np.uint8), minlength=256)
    assert chisquare(digits).pvalue > 1e-4


def test_quotes_that_a_client_refuses() -> None:
    quote = SimulatedEnclave(TERMS, VENDOR).quote()
    check_quote(quote, TERMS, VENDOR.public, code_hash())
    vector = TERMS.ring.zeros()
    with refused("other code than the client expects"):
        contribute(TERMS, replace(quote, code=bytes(32)), VENDOR.public, 0, vector)
    forged = SimulatedEnclave(TERMS, VENDOR).quote().public
    for terms, wrong, vendor in (
        (TERMS, replace(quote, public=forged), VENDOR.public),
        (TERMS, quote, SimulatedVendor().public),
        (replace(TERMS, goal=2), quote, VENDOR.public),
        (TERMS, replace(quote, signature=bytes(64)), VENDOR.public),
    ):
        with refused("not signed by the vendor for these terms"):
            contribute(terms, wrong, vendor, 0, vector)
    with refused("accepted: \\(50,\\) and uint64"):
        contribute(TERMS, quote, VENDOR.public, 0, vector[1:])


def test_terms_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="goal must be at least 2 contributions, got 1"):
        replace(TERMS, goal=1)
    with pytest.raises(ValueError, match="session must have 16 bytes"):
        replace(TERMS, session=b"")


def test_a_process_that_has_ended_is_an_error_and_no_hang() -> None:
    enclave = IsolatedEnclave(TERMS, VENDOR)
    sent = contributions(TERMS, enclave, vectors(TERMS, 1))
    enclave._process.kill()
    with refused("has ended, or did not answer in time"):
        enclave.accept(sent[0].seed)
    enclave.close()
    enclave.close()


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with IsolatedEnclave(TERMS, VENDOR) as enclave:
        stuck = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        enclave._process.kill()
        enclave._process.wait()
        monkeypatch.setattr(enclave, "_process", stuck)
        monkeypatch.setattr(enclave, "_seconds", 0.2)
        with refused("has ended, or did not answer in time"):
            enclave.release(0)


def test_the_enclaves_process_survives_lines_that_are_no_messages() -> None:
    first = StringIO()
    vendor, session = (enclave_process.encoded(value) for value in (VENDOR.private, TERMS.session))
    opening = f'{{"bits": 32, "length": 50, "goal": 3, "session": "{session}", "vendor": "{vendor}"}}'
    lines = [
        opening,
        "nonsense",
        "[]",
        '{"do": "dump keys"}',
        '{"do": "release"}',
        '{"do": "release", "buffer": 0}',
    ]
    enclave_process.serve(
        StringIO("\n".join([*lines, '{"do": "accept", "ephemeral": "?", "sealed": ""}'])), first
    )
    answers = first.getvalue().splitlines()
    assert '"signature"' in answers[0]
    assert ["sent a line that is no message" in answer for answer in answers[1:]] == [True] * 4 + [False] * 2
    assert "0 of 3 contributions" in answers[5]
    assert "not base64" in answers[6]


def test_the_enclaves_process_loads_no_torch() -> None:
    script = (
        "import sys, leakaudit.federated.secure.enclave_process\n"
        "assert not {'torch', 'scipy', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sizes_are_those_of_the_wire() -> None:
    enclave = SimulatedEnclave(TERMS, VENDOR)
    sent = contributions(TERMS, enclave, vectors(TERMS, 1))[0]
    assert sent.size == 20 + 200 + 32 + (12 + 32 + 16)
    assert enclave.quote().size == 20 + 32 + 32 + 64
    assert isinstance(sent.seed, SealedSeed)
