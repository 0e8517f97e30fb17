"""Four hospitals train one model together, on this machine: `make demo`, or `python -m examples.heart.demo`.

The service, and each hospital's worker, is a process of its own; each worker has a folder that holds only its own rows.
Read `play` for the story.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from examples.heart import database
from examples.heart.federation import Federation
from examples.heart.hospitals import HOSPITALS, JOB, RESEARCHER
from examples.heart.processes import (
    SERVICE,
    Process,
    ProcessDied,
    Processes,
    birth,
    command,
    environment_of_a_process,
    record_in,
    recorded,
    stop,
    tail,
)
from examples.heart.watching import watch
from isthmus.client import IsthmusError
from isthmus.jobfile import load_job
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.rounds import TaskKind

FOLDER: Final = Path(__file__).parents[2] / ".demo"
