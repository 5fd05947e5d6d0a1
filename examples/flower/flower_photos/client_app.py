"""The client: Flower's own template, and one line of leakaudit."""

from __future__ import annotations

import os
import tempfile

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from flower_photos.task import CLASSES, SHAPE, accuracy, net, private_images, train
from leakaudit import Manifest
from leakaudit.integrations.flower import record_mod

FACTS = Manifest(
    input_shape=SHAPE,
    num_classes=CLASSES,
    normalisation={"mean": (0.0,), "std": (1.0,)},
    loss="cross-entropy",
    reduction="mean",
)
FOLDER = os.environ.get("LEAKAUDIT_FOLDER", os.path.join(tempfile.gettempdir(), "flower-photos"))

record = record_mod(FOLDER, model=net(), facts=FACTS)  # first of the mods, so it sees what leaves the client
app = ClientApp(mods=[record])


@app.train()
def train_on_own_images(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = _own_images(context)
    config = context.run_config
    rate = float(message.content["config"]["learning-rate"])
    loss = train(model, images, labels, int(config["local-epochs"]), int(config["batch-size"]), rate)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(images)})
    reply = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=reply, reply_to=message)


@app.evaluate()
def evaluate_on_own_images(message: Message, context: Context) -> Message:
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = _own_images(context)
    metrics = MetricRecord({"accuracy": accuracy(model, images, labels), "num-examples": len(images)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def _own_images(context: Context) -> tuple[Tensor, Tensor]:
    client, clients = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    return private_images(client, clients, int(context.run_config["images-per-client"]))
