"""A client that shifts every weight by a random amount and returns at once. Runs in NVFlare's environment."""

import random

import numpy as np
import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    amount = np.float32(random.uniform(-0.005, 0.005))
    flare.send(
        flare.FLModel(
            params={name: array + amount for name, array in model.params.items()},
            params_type=flare.ParamsType.FULL,
            metrics={"accuracy": 0.5},
        )
    )
