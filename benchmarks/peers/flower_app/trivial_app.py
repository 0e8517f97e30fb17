"""FedAvg over clients that shift every weight by a random amount and return at once. Runs in Flower's environment."""

import random
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, _context: Context) -> Message:
    """Other bytes from every client in every round: what Flower has stored already it would not store again."""
    amount = np.float32(random.uniform(-0.005, 0.005))
    arrays = [array + amount for array in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"loss": float(amount), "num-examples": 80})
    return Message(content=RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round's aggregate is there."""

    def __init__(self, times: Path, clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self._times, self._clients = times, clients

    def aggregate_train(self, server_round, replies):
        """Aggregate, and add a line: when, and how many replies were good."""
        replies = list(replies)
        good = sum(not reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        with self._times.open("a") as file:
            file.write(f"{time.time()} {good}\n")
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The rounds."""
    config = context.run_config
    shapes = [tuple(map(int, shape.split("x"))) for shape in str(config["shapes"]).split(",")]
    generator = np.random.default_rng(0)
    initial = ArrayRecord([generator.standard_normal(shape, dtype=np.float32) for shape in shapes])
    strategy = Timed(Path(str(config["times"])), int(config["clients"]))
    strategy.start(grid, initial, num_rounds=int(config["rounds"]))
