"""Secure aggregation from end to end: real processes, real data, killed in the middle; and the sum is the plain one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from isthmus.codec import arrays
from isthmus.codec.blocks import TensorFile
from isthmus.federation.aggregation import MemorySink, MemorySource
from isthmus.federation.secured import aggregate_sum, clipped, quantise
from isthmus.federation.strategies import strategy_of
from isthmus.privacy.scales import secured_lattice
from isthmus.wire.events import EventKind, verify_chain
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.manifest import Manifest
from isthmus.wire.rounds import RoundPhase
from isthmus.wire.secured import MASKED, Step
from tests.acceptance.island import Island, island, job_spec, until
