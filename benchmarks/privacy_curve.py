"""Accuracy against epsilon: the four hospitals of examples/heart, records protected, and how sure the figures are.

    python -m benchmarks.privacy_curve --seeds 10 --picture docs/images/privacy-curve.png

`isthmus simulate`'s engine runs the job of examples/heart with `unit: record` at each epsilon, and once without a
privacy unit, for several seeds. A seed decides the initial weights and which records are held out; the noise is fresh
anyway. The accuracy is that of the final model on the records that the hospitals hold out, by the number of records
behind it. Error bars are 95 % intervals of the mean over the seeds (Student's t). Coins and noise are secret, so the
same command gives other figures, within those bars.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.tables import Report, Spread, arguments
from isthmus.jobfile import load_job
from isthmus.wire.jobs import JobSpec
from isthmus_worker.simulation.clients import Client, load_client, read_clients
from isthmus_worker.simulation.engine import Simulation, simulate
from isthmus_worker.simulation.pool import Pool

HEART: Final = Path("examples/heart")
RANGES: Final = {"age": (18, 100), "trestbps": (60, 240), "chol": (80, 600), "thalach": (50, 230), "oldpeak": (-4, 8)}
"""What is known of these quantities, not what was seen in the data."""
# 97.5 % quantiles of Student's t, by degrees of freedom.
_T: Final = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
_T_MANY: Final = 1.96
