"""Hand-built messages through the mods and strategies, as Flower itself would pass them."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

flwr = pytest.importorskip("flwr")

from flwr.app import (  # noqa: E402
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client.mod import LocalDpMod, make_ffn, secaggplus_mod  # noqa: E402
from flwr.common import FitIns, FitRes, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.common.typing import Code, Status  # noqa: E402
from flwr.server.strategy import FedAvg as LegacyFedAvg  # noqa: E402
from flwr.serverapp.strategy import (  # noqa: E402
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

try:
    from flwr.compat.common import recorddict_compat as compat
except ImportError:  # before flwr 1.30 or so
    from flwr.common import recorddict_compat as compat

from leakaudit.errors import InputError  # noqa: E402
from leakaudit.formats.checkpoint import load_checkpoint, parameters_sha256  # noqa: E402
from leakaudit.formats.loading import load_update  # noqa: E402
from leakaudit.formats.manifest import Manifest  # noqa: E402
from leakaudit.formats.reading import read_file, read_safetensors  # noqa: E402
from leakaudit.integrations.flower import record_mod, record_strategy  # noqa: E402
from leakaudit.models.spaces import Pixels  # noqa: E402
from leakaudit.models.victim import Victim  # noqa: E402
from leakaudit.subject import Sources, look, open_update  # noqa: E402

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # messages of older versions do not ask for it
    TaskIdentity = None

SHAPE = (1, 6, 6)
FACTS = Manifest(input_shape=SHAPE, num_classes=3)


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """New messages state who sends them, which Flower knows inside a run."""
    for name in ("_task_id", "_run_id", "_node_id") if TaskIdentity is not None else ():
        monkeypatch.setattr(TaskIdentity, name, 1)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 3)
        )


def victim(module: nn.Module | None = None) -> Victim:
    return Victim.of(module or network(), Pixels(SHAPE, (0.0,), (1.0,)), 3, "train", name="small")


def trained(module: nn.Module, count: int = 4, rate: float = 0.1) -> nn.Module:
    """One step of SGD on a batch of its own."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.rand(count, *SHAPE, generator=generator), torch.arange(count) % 3
    module.train()
    nn.functional.cross_entropy(module(x), y).backward()
    torch.optim.SGD(module.parameters(), lr=rate).step()
    return module


def context(partition: int | None = 7, **run_config: Any) -> Context:
    node = {} if partition is None else {"partition-id": partition, "num-partitions": 10}
    return Context(run_id=1, node_id=99, node_config=node, state=RecordDict(), run_config=run_config)


def instruction(module: nn.Module, **config: Any) -> Message:
    content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "config": ConfigRecord(config)})
    return Message(content=content, dst_node_id=99, message_type="train")


def client(message: Message, context: Context) -> Message:
    """A client as Flower's template has it."""
    module = network(1)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    trained(module)
    metrics = MetricRecord({"train_loss": 0.75, "num-examples": 4})
    content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


def through(mods: list[Any], message: Message, context: Context, app: Callable[..., Any] = client) -> Message:
    return make_ffn(app, mods)(message, context)


def frozen(message: Message) -> dict[str, Any]:
    """Everything a message holds, for comparison."""
    records: dict[str, Any] = {}
    for name, record in message.content.items():
        values = {key: getattr(value, "data", value) for key, value in record.items()}
        records[name] = (type(record).__name__, list(values.items()))
    return records


def one_file(folder: Path) -> Path:
    (found,) = [path for path in folder.glob("*.safetensors") if "-model" not in path.name]
    return found


# ------------------------------------------------------------------ the mod


def test_the_recorded_update_is_the_clients(tmp_path: Path) -> None:
    message = instruction(network(), **{"lr": 0.1, "server-round": 3})
    through([record_mod(tmp_path)], message, context(**{"local-epochs": 1, "batch-size": 4}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-0003-client-7-model.safetensors",
        "round-0003-client-7.safetensors",
    ]
    path, module = one_file(tmp_path), network(5)
    load_checkpoint(module, tmp_path / "round-0003-client-7-model.safetensors")
    shared = load_update(path, victim(module))
    after = dict(trained(copy.deepcopy(network())).named_parameters())
    for name, before in network().named_parameters():
        torch.testing.assert_close(
            shared.update[name], (before - after[name]).detach() / 0.1, atol=1e-6, rtol=1e-5
        )
    assert shared.has_scale
    assert list(shared.update) == list(victim().params)
    assert int(shared.buffers["1.num_batches_tracked"]) == 1
    manifest = shared.manifest
    stated = (manifest.kind, manifest.learning_rate, manifest.local_steps, manifest.num_examples)
    assert stated == ("weights", 0.1, 1, 4)
    assert manifest.message is not None
    assert manifest.message.software == f"flwr {flwr.__version__}"
    assert manifest.message.metrics == {"train_loss": "0.75"}
    assert manifest.message.config == {"lr": "0.1", "server-round": "3"}
    assert (manifest.message.sender, manifest.message.round) == ("7", 3)


def test_the_message_is_not_changed(tmp_path: Path) -> None:
    plain = through([], instruction(network(), lr=0.1), context())
    mod = record_mod(tmp_path, model=network(), facts=FACTS)
    recorded = through([mod], instruction(network(), lr=0.1), context())
    assert frozen(recorded) == frozen(plain)
    assert list(tmp_path.iterdir())


def test_the_record_says_what_inspection_needs(tmp_path: Path) -> None:
    message = instruction(network(), **{"lr": 0.1, "shuffle-seed": 1234})
    through([record_mod(tmp_path, model=network(), facts=FACTS)], message, context())
    module = network(3)
    load_checkpoint(module, tmp_path / "round-0001-client-7-model.safetensors")
    findings = {finding.name: finding for finding in look(Sources(one_file(tmp_path), module))}
    assert "train_loss=0.75" in findings["metrics in clear"].text
    assert "shuffle-seed=1234" in findings["seed in clear"].text
    assert "4 examples" in findings["number of examples"].text
    assert findings["buffers shared"].data["names"] == [
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    assert "advisory" not in findings
    assert "flwr" in findings["message"].text


def test_with_a_model_another_checkpoint_is_refused(tmp_path: Path) -> None:
    through([record_mod(tmp_path, model=network(), facts=FACTS)], instruction(network()), context())
    path = one_file(tmp_path)
    assert read_file(path).manifest.checkpoint_sha256 == parameters_sha256(network())
    with pytest.raises(InputError, match="the checkpoint in use is"):
        open_update(Sources(path, network(8)))


@pytest.mark.parametrize("outermost", [True, False])
def test_the_place_among_the_mods_decides_what_is_seen(tmp_path: Path, outermost: bool) -> None:
    def doubling(message: Message, context: Context, call_next: Any) -> Message:
        reply = call_next(message, context)
        state = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: 2 * tensor for name, tensor in state.items()})
        return reply

    mods = [record_mod(tmp_path), doubling]
    reply = through(mods if outermost else mods[::-1], instruction(network()), context())
    recorded, _ = read_safetensors(one_file(tmp_path))
    sent = reply.content["arrays"].to_torch_state_dict()
    for name, tensor in recorded.items():
        torch.testing.assert_close(tensor * (1 if outermost else 2), sent[name], rtol=0, atol=0)


def test_types_stay_as_they_were_sent(tmp_path: Path) -> None:
    def halving(message: Message, context: Context) -> Message:
        reply = client(message, context)
        state = reply.content["arrays"].to_torch_state_dict()
        half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
        reply.content["arrays"] = ArrayRecord(half)
        return reply

    through([record_mod(tmp_path)], instruction(network(), lr=0.1), context(), halving)
    shared = load_update(one_file(tmp_path), victim())
    assert set(shared.dtypes.values()) == {"float16"}
    assert shared.rounding > 1e-3


def test_rounds_are_chosen_and_counted(tmp_path: Path) -> None:
    mod = record_mod(tmp_path / "some", rounds={2})
    for number in (1, 2, 3):
        through([mod], instruction(network(), **{"server-round": number}), context())
    assert one_file(tmp_path / "some").name == "round-0002-client-7.safetensors"
    unnumbered = record_mod(tmp_path / "counted")
    for _ in range(2):
        through([unnumbered], instruction(network()), context(None))
    names = {path.name for path in (tmp_path / "counted").glob("*-client-99.safetensors")}
    assert names == {"round-0001-client-99.safetensors", "round-0002-client-99.safetensors"}


def test_a_delta_has_its_sign(tmp_path: Path) -> None:
    def difference(message: Message, context: Context) -> Message:
        reply = client(message, context)
        before = message.content["arrays"].to_torch_state_dict()
        after = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: after[name] - before[name] for name in after})
        return reply

    through([record_mod(tmp_path / "w")], instruction(network(), lr=0.1), context())
    through(
        [record_mod(tmp_path / "d", sends="delta")], instruction(network(), lr=0.1), context(), difference
    )
    weights, delta = (load_update(one_file(tmp_path / name), victim()) for name in "wd")
    assert delta.manifest.sign == "after-minus-before"
    assert float((weights.update - delta.update).norm() / weights.update.norm()) < 1e-5
    for name, tensor in weights.buffers.items():
        torch.testing.assert_close(delta.buffers[name].float(), tensor.float())


@pytest.mark.parametrize("config", [{"lr": 0.0}, {"lr": "small"}, {"lr": float("nan")}])
def test_settings_that_say_nothing_are_left_out(tmp_path: Path, config: dict[str, Any]) -> None:
    through([record_mod(tmp_path)], instruction(network(), **config), context(**{"batch-size": 512}))
    manifest = read_file(one_file(tmp_path)).manifest
    assert manifest.learning_rate is None
    assert manifest.local_batch_size is None  # larger than the client's data: the whole of it


def test_a_failure_is_logged_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    mod = record_mod(tmp_path / "file")
    with caplog.at_level(logging.WARNING, "leakaudit"):
        replies = [through([mod], instruction(network()), context()) for _ in range(3)]
    assert all(reply.has_content() for reply in replies)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on" in caplog.text


def test_what_is_no_training_reply_is_left_alone(tmp_path: Path) -> None:
    content = RecordDict({"arrays": ArrayRecord(network().state_dict()), "config": ConfigRecord()})
    evaluation = Message(content=content, dst_node_id=99, message_type="evaluate")
    through([record_mod(tmp_path)], evaluation, context())

    def failing(message: Message, context: Context) -> Message:
        return Message(Error(code=1, reason="no data"), reply_to=message)

    assert through([record_mod(tmp_path)], instruction(network()), context(), failing).has_error()
    assert not list(tmp_path.iterdir())


def test_nan_is_said_and_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def diverged(message: Message, context: Context) -> Message:
        reply = client(message, context)
        state = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({**state, "4.bias": state["4.bias"] / 0})
        return reply

    through([record_mod(tmp_path)], instruction(network()), context(), diverged)
    assert "NaN or infinite" in caplog.text
    assert not (tmp_path / "round-0001-client-7.safetensors").exists()


def test_further_records_are_named(tmp_path: Path) -> None:
    def scaffold(message: Message, context: Context) -> Message:
        reply = client(message, context)
        extra = ArrayRecord([np.zeros(3, np.float32)])
        arrays = reply.content["arrays"]
        reply.content = RecordDict({"control": extra, "arrays": arrays, "metrics": reply.content["metrics"]})
        return reply

    through([record_mod(tmp_path)], instruction(network()), context(), scaffold)
    manifest = read_file(one_file(tmp_path)).manifest
    assert manifest.message is not None
    assert manifest.message.records == ("control",)
    assert "4.weight" in (manifest.parameter_order or ())


def test_importing_leakaudit_never_imports_flower() -> None:
    script = "import sys, leakaudit, leakaudit.integrations.flower\nassert 'flwr' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", script], check=True)


# ------------------------------------------------------------------ legacy applications, and masks


def fit_client(module_of: Callable[[], nn.Module] = network) -> Callable[[Message, Context], Message]:
    """As Flower answers for a NumPyClient, emptying the message on the way."""

    def app(message: Message, context: Context) -> Message:
        fit = compat.recorddict_to_fitins(message.content, keep_input=False)
        module = module_of()
        arrays = parameters_to_ndarrays(fit.parameters)
        state = {
            name: torch.from_numpy(a.copy()) for name, a in zip(module.state_dict(), arrays, strict=True)
        }
        module.load_state_dict(state)
        after = [tensor.numpy() for tensor in trained(module).state_dict().values()]
        status = Status(Code.OK, "")
        result = FitRes(status, ndarrays_to_parameters(after), 4, {"accuracy": 0.5})
        return Message(compat.fitres_to_recorddict(result, keep_input=True), reply_to=message)

    return app


def fit_message(module: nn.Module, **config: Any) -> Message:
    parameters = ndarrays_to_parameters([tensor.numpy() for tensor in module.state_dict().values()])
    content = compat.fitins_to_recorddict(FitIns(parameters, config), keep_input=True)
    return Message(content=content, dst_node_id=99, message_type="train")


@pytest.mark.parametrize("named", [True, False])
def test_legacy_clients_without_names(tmp_path: Path, named: bool) -> None:
    mod = record_mod(tmp_path, model=network() if named else None)
    through([mod], fit_message(network(), server_round=2, learning_rate=0.1), context(), fit_client())
    module = network(4)
    load_checkpoint(module, tmp_path / "round-0002-client-7-model.safetensors")
    assert parameters_sha256(module) == parameters_sha256(network())
    shared = load_update(tmp_path / "round-0002-client-7.safetensors", victim(module))
    after = dict(trained(network()).named_parameters())
    for name, before in network().named_parameters():
        torch.testing.assert_close(
            shared.update[name], (before - after[name]).detach() / 0.1, atol=1e-6, rtol=1e-5
        )
    assert shared.manifest.num_examples == 4
    assert shared.manifest.message is not None
    assert shared.manifest.message.metrics == {"accuracy": "0.5"}
    assert (read_file(tmp_path / "round-0002-client-7.safetensors").tensors is not None) == named


def test_after_local_differential_privacy_the_noise_is_in_the_file(tmp_path: Path) -> None:
    private = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=10.0, delta=1e-5)
    torch.manual_seed(0)
    np.random.seed(0)
    message = fit_message(network(), learning_rate=0.1)
    reply = through([record_mod(tmp_path, model=network()), private], message, context(), fit_client())
    sent = parameters_to_ndarrays(compat.recorddict_to_fitres(reply.content, keep_input=True).parameters)
    recorded, _ = read_safetensors(one_file(tmp_path))
    for name, array in zip(network().state_dict(), sent, strict=True):
        np.testing.assert_array_equal(recorded[name].numpy(), array)
    shared = load_update(one_file(tmp_path), victim())
    after = dict(trained(network()).named_parameters())["4.weight"].detach()
    std = float((shared.raw["4.weight"] - after).std())
    assert std == pytest.approx(np.sqrt(2 * np.log(1.25 / 1e-5)) / 10.0, rel=0.3)


def masked_round(folder: Path, mods: Callable[[int], list[Any]], clients: int = 3) -> list[Message]:
    """The first three stages of Flower's own SecAgg+, its mod answering hand-built messages."""
    nodes = range(1, clients + 1)
    contexts = {
        node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
        for node in nodes
    }

    def ask(node: int, config: dict[str, Any]) -> Message:
        message = fit_message(network(), server_round=1)
        message.metadata.dst_node_id = node
        message.content.config_records["secaggplus_configs"] = ConfigRecord(config)
        return through(mods(node), message, contexts[node], fit_client())

    setup: dict[str, Any] = {
        "stage": "setup",
        "sample_num": clients,
        "share_num": clients,
        "threshold": 2,
        "clipping_range": 8.0,
        "target_range": 1 << 22,
        "mod_range": 1 << 32,
        "max_weight": 1000.0,
    }
    keys = {node: ask(node, setup).content.config_records["secaggplus_configs"] for node in nodes}
    public = {str(node): [record["pk1"], record["pk2"]] for node, record in keys.items()}
    shares = {
        node: ask(node, {"stage": "share_keys", **public}).content.config_records["secaggplus_configs"]
        for node in nodes
    }
    for_node: dict[int, tuple[list[int], list[bytes]]] = {node: ([], []) for node in nodes}
    for source, record in shares.items():
        for target, text in zip(record["dsts"], record["ctxts"], strict=True):
            for_node[target][0].append(source)
            for_node[target][1].append(text)
    collect = {
        node: {"stage": "collect_masked_vectors", "srcs": sources, "ctxts": texts}
        for node, (sources, texts) in for_node.items()
    }
    return [ask(node, collect[node]) for node in nodes]


def test_a_masked_vector_is_recorded_and_not_attacked(tmp_path: Path) -> None:
    mod = record_mod(tmp_path, model=network(), facts=FACTS)
    replies = masked_round(tmp_path, lambda node: [mod, secaggplus_mod] if node == 2 else [secaggplus_mod])
    path = one_file(tmp_path)
    assert path.name == "round-0001-client-2.safetensors"
    sent = replies[1].content.config_records["secaggplus_configs"]["masked_params"]
    recorded, _ = read_safetensors(path)
    assert len(recorded) == len(sent) == 1 + len(network().state_dict())
    assert max(int(tensor.max()) for tensor in recorded.values()) > 1 << 31
    findings = {finding.name: finding for finding in look(Sources(path))}
    assert "masked; nothing to reconstruct from this message alone" in findings["masked"].text
    assert findings["masked"].data["modulus"] == 1 << 32
    assert findings["masked"].data["p_value"] > 1e-6
    assert "4 examples" in findings["number of examples"].text
    assert findings["number of examples"].severity == "hint"
    assert "accuracy=0.5" in findings["metrics in clear"].text
    assert "flower/issues/7522" in findings["advisory"].text
    with pytest.raises(InputError, match="masked by secure aggregation"):
        open_update(Sources(path, network()))


def test_behind_the_masks_the_plain_update_is_recorded(tmp_path: Path) -> None:
    mod = record_mod(tmp_path, model=network(), facts=FACTS)
    masked_round(tmp_path, lambda node: [secaggplus_mod, mod] if node == 2 else [secaggplus_mod])
    shared = load_update(one_file(tmp_path), victim())
    after = dict(trained(network()).named_parameters())
    torch.testing.assert_close(shared.raw["4.weight"], after["4.weight"].detach())


# ------------------------------------------------------------------ the server


class Grid:
    def get_node_ids(self) -> list[int]:
        return [11, 12]


def replies_to(messages: list[Message]) -> list[Message]:
    return [through([], message, context()) for message in messages]


def served(strategy: Any) -> tuple[list[Message], Any, Any]:
    """One round of a message-based strategy."""
    arrays = ArrayRecord(network().state_dict())
    config = ConfigRecord({"lr": 0.1})
    messages = list(strategy.configure_train(1, arrays, config, Grid()))
    replies = replies_to(messages)
    return replies, *strategy.aggregate_train(1, replies)


def test_the_strategy_records_what_arrives_and_changes_nothing(tmp_path: Path) -> None:
    original = FedAvg()
    strategy = record_strategy(original, tmp_path, model=network(), facts=FACTS)
    assert isinstance(strategy, FedAvg)
    assert type(original) is FedAvg
    replies, arrays, metrics = served(strategy)
    plain = FedAvg().aggregate_train(1, replies)
    assert {name: array.data for name, array in arrays.items()} == {n: a.data for n, a in plain[0].items()}
    assert dict(metrics) == dict(plain[1])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "round-0001-aggregate.safetensors",
        "round-0001-client-11.safetensors",
        "round-0001-client-12.safetensors",
        "round-0001-model.safetensors",
    ]
    shared = load_update(tmp_path / "round-0001-client-12.safetensors", victim())
    after = dict(trained(network()).named_parameters())
    torch.testing.assert_close(shared.raw["4.weight"], after["4.weight"].detach())
    assert shared.manifest.learning_rate == 0.1
    assert shared.manifest.message is not None
    assert shared.manifest.message.checkpoint == "round-0001-model.safetensors"
    total = load_update(tmp_path / "round-0001-aggregate.safetensors", victim())
    assert (total.manifest.clients, total.manifest.num_examples) == (2, 8)
    torch.testing.assert_close(total.raw["4.weight"], after["4.weight"].detach())


def test_a_strategy_with_a_loop_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Custom(FedAvg):
        rounds = 0

        def start(self, *args: Any) -> int:
            self.rounds += 1
            served(self)
            return self.rounds

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            self.last = server_round
            return super().aggregate_train(server_round, replies)

    strategy = record_strategy(Custom(), tmp_path)
    assert (strategy.start(), strategy.start(), strategy.last) == (1, 2, 1)
    assert (tmp_path / "round-0001-client-11.safetensors").exists()


def test_around_and_inside_a_wrapper(tmp_path: Path) -> None:
    """What arrives is not clipped yet; what the wrapper hands to the strategy inside is."""

    def wrapper(inside: Any) -> Any:
        return DifferentialPrivacyServerSideFixedClipping(inside, 0.0, 0.01, 2)

    served(record_strategy(wrapper(FedAvg()), tmp_path / "around"))
    served(wrapper(record_strategy(FedAvg(), tmp_path / "inside")))
    lengths = []
    for name in ("around", "inside"):
        tensors, _ = read_safetensors(tmp_path / name / "round-0001-client-11.safetensors")
        moved = [(tensors[n] - before).flatten() for n, before in network().named_parameters()]
        lengths.append(float(torch.cat(moved).norm()))
    assert lengths[1] < 0.02 < lengths[0]


def test_a_failing_record_does_not_stop_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    _, arrays, _ = served(record_strategy(FedAvg(), tmp_path / "file"))
    assert arrays is not None
    assert "could not record" in caplog.text


def test_what_is_no_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="configure_train"):
        record_strategy(object(), tmp_path)


def test_a_legacy_strategy(tmp_path: Path) -> None:
    class Proxy:
        def __init__(self, cid: str) -> None:
            self.cid = cid

    class Manager:
        def num_available(self) -> int:
            return 2

        def sample(self, **_: Any) -> list[Proxy]:
            return [Proxy("a"), Proxy("b")]

    strategy = record_strategy(
        LegacyFedAvg(on_fit_config_fn=lambda number: {"lr": 0.1}, inplace=False), tmp_path, model=network()
    )
    before = ndarrays_to_parameters([tensor.numpy() for tensor in network().state_dict().values()])
    after = ndarrays_to_parameters([tensor.numpy() for tensor in trained(network()).state_dict().values()])
    instructions = strategy.configure_fit(4, before, Manager())
    results = [(proxy, FitRes(Status(Code.OK, ""), after, 4, {"loss": 1.0})) for proxy, _ in instructions]
    parameters, _ = strategy.aggregate_fit(4, results, [])
    assert len(parameters.tensors) == len(after.tensors)
    shared = load_update(tmp_path / "round-0004-client-b.safetensors", victim())
    expected = dict(trained(network()).named_parameters())["4.weight"].detach()
    torch.testing.assert_close(shared.raw["4.weight"], expected)
    assert shared.manifest.learning_rate == 0.1
    assert (tmp_path / "round-0004-aggregate.safetensors").exists()
