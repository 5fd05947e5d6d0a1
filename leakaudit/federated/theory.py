"""What theory says of every system x role, in a sentence or two with its source.  No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from leakaudit.leakage_results import Role


@dataclass(frozen=True)
class Theory:
    """`text` says what the role can learn whatever attack is run; `source` who says it, or that it is arithmetic."""

    text: str
    source: str


_INVERSION = "Zhu, Liu and Han 2019; Geiping et al. 2020"
_ACROSS = "Zhu et al. 2019 (Distributed Training Across the World)"

_ONE_GRADIENT = Theory(
    "The server gets every worker's gradient of one batch, at a model that it knows. Nothing in the protocol limits"
    " what can be reconstructed; only the size of the batch and the model do.",
    _INVERSION,
)
_PEER = Theory(
    "After an all-reduce a peer knows the sum and takes its own gradient away: of n workers it sees the mean of the"
    " other n - 1, so of 2 the other's gradient exactly. In a ring more passes by: a worker also gets a part (1/n)"
    " of its predecessor's own gradient, which the recorded view leaves out.",
    "arithmetic; Patarasuk and Yuan 2009 for the ring",
)
_LOCAL = (
    "The server gets each client's model update after its local steps. These hide the order of batches and the models"
    " on the way, but both can be guessed and simulated, so the steps make the attack dearer and guarantee nothing."
)
_LOCAL_SOURCE = "McMahan et al. 2017; Geiping et al. 2020, section 6; Dimitrov et al. 2022"
_SPARSE = (
    "Only the largest numbers are sent: fewer equations, though the most telling ones. What is not sent waits in a"
    " residual that carries older samples into later messages, so a message mixes several steps."
)
_DENSE_LINK = Theory(
    "On encrypted links an observer sees sizes and times. A dense gradient has the size of the model whatever the data"
    " are; the time between download and upload is that of one batch, so it tells who is slow, not what they hold.",
    "the cost model; no update is seen",
)
_LOCAL_LINK = Theory(
    "On encrypted links an observer sees sizes and times. The size is the model's; the time between download and upload"
    " is local steps times seconds a step, so for known speeds it gives away how many steps, and with epochs how"
    " many examples, a client has.",
    "the cost model; no update is seen",
)
_SPARSE_LINK = Theory(
    "On encrypted links an observer sees sizes and times. The size of a sparse message is its number of values, hence"
    " the share that is kept and, in a warm-up, how far training is.",
    "the cost model; no update is seen",
)
_SECURE_LINK = Theory(
    "On encrypted links an observer sees sizes and times: who takes part, who drops out and at which round of the"
    " protocol. Masked vectors all have the same size, so sparsity does not show.",
    "Bonawitz et al. 2017 for the messages; no update is seen",
)

THEORY: dict[tuple[str, Role], Theory] = {
    ("ssgd", "server"): _ONE_GRADIENT,
    ("ssgd", "peer"): _PEER,
    ("ssgd", "network"): _DENSE_LINK,
    ("asgd", "server"): Theory(
        "Every gradient arrives alone, at a model that the server itself sent out: however stale it is, its base is"
        " known exactly. Staleness costs accuracy and protects nothing.",
        f"Dean et al. 2012 for the system; {_INVERSION}",
    ),
    ("asgd", "network"): _DENSE_LINK,
    ("dssgd", "server"): Theory(
        "Delay alone protects nothing: a server that sees every g_j can replay every local model,"
        " w_{i+1,j} = w_{i,j} - eta (g_{i,j} - g_{i-d,j} + mean_j g_{i-d,j}), and attack each gradient at the model"
        " where it was taken.",
        f"arithmetic of the update of {_ACROSS}",
    ),
    ("dssgd", "peer"): Theory(
        "A peer gets the mean of all gradients, d steps late. Of 2 workers that is the other's gradient exactly, from"
        " which its local model can be replayed. Of more, the others' models differ by their own last d gradients, of"
        " which it knows only the mean: the base is approximate, which is no guarantee.",
        f"arithmetic of the update of {_ACROSS}",
    ),
    ("dssgd", "network"): _DENSE_LINK,
    ("dts", "server"): Theory(
        "DTS is FedAvg with T steps, plus sparsity and a residual: a message sums gradients of T batches along a path"
        f" that can be replayed, so delay adds nothing. {_SPARSE} None of this is a guarantee.",
        f"{_ACROSS}; Lin et al. 2018; McMahan et al. 2017",
    ),
    ("dts", "peer"): Theory(
        "Sparse messages cannot be summed on the way and reach every peer as they are: a peer sees what a server would."
        f" Dense ones are summed, which leaves the mean of the other n - 1. {_SPARSE}",
        f"{_ACROSS}; Lin et al. 2018",
    ),
    ("dts", "network"): _SPARSE_LINK,
    ("dgc", "server"): Theory(
        f"{_SPARSE} Clipping bounds a message's length; momentum correction gives older steps a known weight."
        " Early work called a gradient with more than 20 % pruned safe from its own attack; that is no guarantee.",
        "Lin et al. 2018; Zhu, Liu and Han 2019",
    ),
    ("dgc", "peer"): Theory(
        f"Sparse messages reach every peer as they are: a peer sees what a server would. {_SPARSE}",
        "Lin et al. 2018",
    ),
    ("dgc", "network"): _SPARSE_LINK,
    ("fedavg", "server"): Theory(_LOCAL, _LOCAL_SOURCE),
    ("fedavg", "network"): _LOCAL_LINK,
    ("sync", "server"): Theory(
        f"{_LOCAL} Over-selection hides nobody: the server may look at every update that arrives, also at those that"
        " it leaves out.",
        f"{_LOCAL_SOURCE}; Bonawitz et al. 2019",
    ),
    ("sync", "network"): _LOCAL_LINK,
    ("timeout", "server"): Theory(
        f"{_LOCAL} The cut-off decides whose updates count: slow clients are seen less, which is a loss of fairness"
        " and no protection of the others.",
        f"{_LOCAL_SOURCE}; Bonawitz et al. 2019",
    ),
    ("timeout", "network"): _LOCAL_LINK,
    ("fedbuff", "server"): Theory(
        "Without secure aggregation the server gets each client's update with its staleness, and knows which model it"
        " had sent: staleness does not protect, and the staleness weight is the server's own and divides out. The"
        f" buffer mixes clients only for whoever sees nothing but its sum. {_LOCAL}",
        f"Nguyen et al. 2022; {_LOCAL_SOURCE}",
    ),
    ("fedbuff", "network"): _LOCAL_LINK,
    ("secagg", "server"): Theory(
        "The server learns the sum over the survivors and, as long as fewer than t parties collude, nothing else of"
        " them. One survivor's sum would be its update, which is why the protocol aborts below t. What remains is the"
        " attack on a sum: n clients are one client with n times the examples, not a guarantee.",
        "Bonawitz et al. 2017, section 6",
    ),
    ("secagg", "network"): _SECURE_LINK,
    ("async-secagg", "server"): Theory(
        "Only the sum of K masked updates is unmasked, once: the server sees a sum of K clients with their staleness"
        " and no update by itself, as far as the enclave can be trusted (here its attestation is simulated). A sum"
        " of K is mixing, not a guarantee.",
        "Huba et al. 2022 (Papaya); Nguyen et al. 2022",
    ),
    ("async-secagg", "enclave-host"): Theory(
        "The host sees x + PRG(seed) modulo 2^b, which is uniform and independent of x for whoever lacks the seed, and"
        " the seed encrypted to the enclave. An attack that works here has found a fault of the implementation.",
        "Huba et al. 2022 (Papaya)",
    ),
    ("async-secagg", "network"): _SECURE_LINK,
}

UNWRITTEN = Theory("Nothing has been written down for this role in this system.", "")


def theory_of(system: str, role: Role) -> Theory:
    """What theory says; `UNWRITTEN` for a system from elsewhere."""
    return THEORY.get((system, role), UNWRITTEN)
