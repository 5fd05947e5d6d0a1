"""The server: FedAvg, and one line of leakaudit."""

from __future__ import annotations

import os

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_photos.client_app import FACTS, FOLDER
from flower_photos.task import fresh_net, net
from leakaudit.integrations.flower import record_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_evaluate=1.0)
    strategy = record_strategy(
        strategy, os.path.join(FOLDER, "server"), model=net(), facts=FACTS
    )  # the one line
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(fresh_net().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"learning-rate": float(context.run_config["learning-rate"])}),
    )
