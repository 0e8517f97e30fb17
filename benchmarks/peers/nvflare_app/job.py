"""FedAvg over one array of so many float32: job.py WORKSPACE ELEMENTS CLIENTS ROUNDS. Runs in NVFlare's environment."""

import sys
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

workspace = Path(sys.argv[1])
elements, clients, rounds = map(int, sys.argv[2:])
initial = workspace / "initial.npy"
np.save(initial, np.random.default_rng(0).standard_normal(elements, dtype=np.float32))
recipe = NumpyFedAvgRecipe(
    name="trivial",
    initial_ckpt=str(initial),
    min_clients=clients,
    num_rounds=rounds,
    train_script=str(Path(__file__).parent / "client.py"),
)
recipe.execute(SimEnv(num_clients=clients, num_threads=clients, workspace_root=str(workspace / "simulation")))
