"""Secure aggregation: sums of clients' vectors of which nobody sees the terms.

    ring.py             vectors of integers modulo 2^b, as they are masked and sent
    primitives.py       key agreement, encryption, shares of a secret: all from pycryptodome
    messages.py         what Bonawitz et al.'s parties send each other
    bonawitz.py         the protocol of Bonawitz et al. 2017
    enclave.py          asynchronous secure aggregation with a simulated trusted execution environment
    enclave_process.py  the same enclave in a process of its own
    fixed_point.py      updates <-> vectors of integers
    local.py            what clients of the two systems do before they mask

Only the last two import torch, so that the enclave's process starts fast.
"""
