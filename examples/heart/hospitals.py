"""The four hospitals, and the folder that each of them gets: its own rows, the worker's configuration, nothing else."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final

from isthmus.wire.datasets import AutomaticApproval, UsePolicy
from isthmus.wire.jobs import JobSpec

HERE: Final = Path(__file__).parent
JOB: Final = HERE / "job.yaml"
DATASET: Final = "heart"
RESEARCHER: Final = "researcher"


@dataclass(frozen=True)
class Hospital:
    """An organization with data of its own."""

    name: str
    """As an organization of the platform."""
    title: str
    short: str
    """The title where there is little room."""
    file: str

    @property
    def steward(self) -> str:
        """The name of the principal who decides on the hospital's data."""
        return f"{self.name}-steward"


HOSPITALS: Final = (
    Hospital("cleveland", "Cleveland Clinic Foundation", "Cleveland", "cleveland.csv"),
    Hospital("hungary", "Hungarian Institute of Cardiology, Budapest", "Hungary", "hungary.csv"),
    Hospital("switzerland", "University Hospitals, Zurich and Basel", "Switzerland", "switzerland.csv"),
    Hospital("va-long-beach", "V.A. Medical Center, Long Beach", "Long Beach", "va_long_beach.csv"),
)


@dataclass(frozen=True)
class Site:
    """A hospital's folder."""

    hospital: Hospital
    folder: Path

    @property
    def config(self) -> Path:
        """The worker's configuration."""
        return self.folder / "worker.toml"


def furnish(hospital: Hospital, root: Path, *, service_url: str, spec: JobSpec) -> Site:
    """Make a hospital's folder under `root`."""
    site = Site(hospital, root / hospital.name)
    site.folder.mkdir(mode=0o700)
    shutil.copyfile(HERE / "data" / hospital.file, site.folder / hospital.file)
    template = Template((HERE / "worker.toml").read_text(encoding="utf-8"))
    words = {
        "service_url": service_url,
        "dataset": DATASET,
        "description": f"Patients examined for heart disease at {hospital.title}",
        "file": hospital.file,
        "researcher": RESEARCHER,
        "purpose": spec.purpose,
    }
    # The comment at the top of the template explains the ${...} and holds none that is a name.
    site.config.write_text(template.safe_substitute(words), encoding="utf-8")
    return site


def use_policy(announced: UsePolicy) -> UsePolicy:
    """What every steward allows: what the worker's own configuration does, by rule and for a day."""
    return announced.model_copy(update={"automatic_approval": AutomaticApproval(grant_days=1, max_rounds=100)})
