"""What the organization decides about its worker: one TOML file, read once, refused at start and not at midnight."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from isthmus.wire.base import Finite, Label, Name
from isthmus.wire.datasets import Budget, UsePolicy
from isthmus.wire.models import EntryPoint, ModelKind
from isthmus.wire.privacy import Delta, Epsilon, PrivacyMode


class SettingsRefused(Exception):
    """The configuration cannot be used. The message names the file and every key that is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CsvSettings(_Section):
    """Records in a CSV file with a header line, in UTF-8."""

    kind: Literal["csv"] = "csv"
    path: Path
    """Relative paths are seen from the configuration file."""
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1)] = ","
    missing: tuple[str, ...] = ()
    """Texts that mean "not recorded", besides an empty cell."""


class NpzSettings(_Section):
    """Records in a NumPy archive (`.npz`): arrays with one entry a record along their first side.

    A vector of numbers or of words is a column of them; an array of more sides is a column of kind `tensor`, such as
    images. Archives with pickled objects are refused.
    """

    kind: Literal["npz"] = "npz"
    path: Path
    """Relative paths are seen from the configuration file."""
    max_mb: int = Field(default=2048, ge=1)
    """Most that all arrays may take in memory, unpacked: the file may be far smaller than what it unpacks to."""


class EntryPointSettings(_Section):
    """Records that the organization's own function reads: it returns a `DataSource`."""

    kind: Literal["entry_point"] = "entry_point"
    function: EntryPoint
    options: dict[str, Any] = {}
    """Handed to the function as keyword arguments."""


SourceSettings = Annotated[CsvSettings | NpzSettings | EntryPointSettings, Field(discriminator="kind")]


class DatasetSettings(_Section):
    """One dataset that this worker serves."""

    name: Name
    description: Label = "no description"
    source: SourceSettings
    budget: Budget | None = None
    """What all jobs together may ever learn of one record. None: no job with a privacy unit passes."""


_GONE: Final = {
    "require_clipping": (
        "require_clipping is gone: say which jobs pass by modes = [...], and how much they may learn by a budget of "
        "the dataset instead (jobs with a privacy unit always clip; max_clip_norm bounds those without)"
    ),
    "min_noise_multiplier": (
        "min_noise_multiplier is gone: say which jobs pass by modes = [...], and how much they may learn by a budget "
        "of the dataset (and max_epsilon) instead; the noise follows from them"
    ),
}
"""Keys of earlier versions, and what to write today."""


def _kinds(value: Any) -> Any:
    return [ModelKind(item) if isinstance(item, str) and item in set(ModelKind) else item for item in value]


def _bound(value: Any) -> Any:
    if value == "unbounded":
        raise ValueError("leave max_clip_norm out where there shall be no bound")
    return value


class Policy(_Section):
    """What this organization lets its worker do. Closed by default: nobody may ask, for nothing, never without noise.

    It is announced with every dataset under the worker's signature: the service asks it too, and a steward may tighten
    it there. What is loosened is loosened here.
    """

    principals: tuple[Label, ...] = Field(default=(), max_length=1000)
    """Names of the researchers who may ask; `"*"` stands for anybody."""
    purposes: tuple[Label, ...] = Field(default=(), max_length=100)
    """Purposes that pass; `"*"` stands for any."""
    model_kinds: Annotated[tuple[ModelKind, ...], BeforeValidator(_kinds)] = (ModelKind.DECLARATIVE,)
    entry_points: tuple[EntryPoint, ...] = ()
    """Model functions installed here that jobs may name."""
    modes: tuple[PrivacyMode, ...] = Field(default=(PrivacyMode.RECORD,), max_length=len(PrivacyMode))
    """How a job may protect the records; `none` has to be listed to pass."""
    max_epsilon: Epsilon | None = None
    """Largest epsilon of one job; None: as far as the dataset's budget reaches."""
    max_delta: Delta = 1e-5
    max_clip_norm: Annotated[Annotated[Finite, Field(gt=0)] | None, BeforeValidator(_bound)] = None
    """Largest clip_norm of jobs without a privacy unit; an unclipped one does not pass either. None: any."""
    allow_exact_metrics: bool = False
    """Whether loss, accuracy and AUC may leave un-noised, in jobs without a privacy unit."""
    allow_exact_statistics: bool = False
    """Whether counts, means and variances of columns may leave un-noised, in jobs without a privacy unit."""
    require_secure_aggregation: bool = False
    """Whether updates of training leave masked only: a job without secure aggregation does not pass."""
    min_rows: int = Field(default=10, ge=2)
    """Fewest training records for any task, and fewest held-out ones behind numbers that leave un-noised."""
    min_cohort: int = Field(default=2, ge=2, le=100_000)
    """Fewest updates with which the job may close a round."""
    max_rounds: int = Field(default=1000, ge=1, le=1_000_000)
    max_model_bytes: int = Field(default=1_000_000_000, ge=1)
    pinned_peers_only: bool = False
    """Whether under secure aggregation only organizations may be in a round whose keys were trusted here beforehand."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_yesterday(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, advice in _GONE.items():
                if name in value:
                    raise ValueError(advice)
        return value


class Resources(_Section):
    """What one task may use, and how long the training process stays warm."""

    max_memory_mb: int = Field(default=4096, ge=512)
    max_task_s: float = Field(default=3600.0, gt=0)
    max_silence_s: float = Field(default=300.0, gt=0)
    """Longest time without a sign of life from the training process; then it is taken for stuck."""
    max_threads: int = Field(default=1, ge=1, le=256)
    idle_s: float = Field(default=60.0, ge=0)
    """The training process ends so long after its last task."""
    pass_environment: tuple[str, ...] = ()
    """Names of environment variables that the training process may see, for data sources that need them."""


class Settings(_Section):
    """Everything the worker takes from its configuration file."""

    service_url: Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+.*$")]
    state_dir: Path
    """Relative paths are seen from the configuration file."""
    ca_file: Path | None = None
    """Certificates to trust instead of the usual ones, in PEM, for a service with a certificate of your own."""
    allowed_sources: tuple[EntryPoint, ...] = ()
    """Functions that may be used as data sources."""
    datasets: tuple[DatasetSettings, ...] = Field(min_length=1)
    policy: Policy = Policy()
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Settings":
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError("datasets: a name is used twice")
        for dataset in self.datasets:
            source = dataset.source
            if isinstance(source, EntryPointSettings) and source.function not in self.allowed_sources:
                raise ValueError(
                    f"datasets: {source.function!r} (of {dataset.name!r}) is not listed in allowed_sources"
                )
        return self

    def dataset(self, name: str) -> DatasetSettings | None:
        """The dataset of that name, if this worker serves it."""
        return next((dataset for dataset in self.datasets if dataset.name == name), None)


def announced_policy(settings: Settings, dataset: DatasetSettings) -> UsePolicy:
    """What the configuration allows for a dataset, as the worker announces it to the service."""
    policy = settings.policy
    return UsePolicy(
        purposes=policy.purposes,
        principals=policy.principals,
        model_kinds=policy.model_kinds,
        modes=policy.modes,
        budget=dataset.budget,
        max_epsilon=policy.max_epsilon,
        max_delta=policy.max_delta,
        max_clip_norm=policy.max_clip_norm,
        min_cohort=policy.min_cohort,
        max_rounds=policy.max_rounds,
        allow_exact_metrics=policy.allow_exact_metrics,
        allow_exact_statistics=policy.allow_exact_statistics,
        require_secure_aggregation=policy.require_secure_aggregation,
    )


def read_settings(path: Path) -> Settings:
    """The configuration in a TOML file, its relative paths made absolute.

    Raises:
        SettingsRefused: the file is missing, is not TOML, or a key is missing, unknown or out of its range.
    """
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsRefused(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingsRefused(f"{path}: is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsRefused(f"{path}: is not valid TOML: {error}") from error
    try:
        settings = Settings.model_validate(plain)
    except ValidationError as error:
        raise SettingsRefused("\n".join(_complaint(path, problem) for problem in error.errors())) from error
    return _resolved(settings, path.resolve().parent)


def _complaint(path: Path, problem: Any) -> str:
    steps = [str(step) for step in problem["loc"] if step not in ("csv", "npz", "entry_point")]
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {'.'.join(steps)}: {message}" if steps else f"{path}: {message}"


def _resolved(settings: Settings, base: Path) -> Settings:
    datasets = []
    for dataset in settings.datasets:
        source = dataset.source
        if isinstance(source, CsvSettings | NpzSettings):
            source = source.model_copy(update={"path": base / source.path.expanduser()})
        datasets.append(dataset.model_copy(update={"source": source}))
    ca_file = base / settings.ca_file.expanduser() if settings.ca_file is not None else None
    state_dir = base / settings.state_dir.expanduser()
    return settings.model_copy(update={"state_dir": state_dir, "ca_file": ca_file, "datasets": tuple(datasets)})


EXAMPLE: Final = """\
# The agent beside your data. Start it with: isthmus-worker run --config worker.toml

service_url = "https://isthmus.example.org"
# Keys, the journal of what was released, and caches. Back it up: it is your own account of what left.
state_dir = "state"
# Functions of yours that may be used as data sources, as "package.module:function".
allowed_sources = []

[[datasets]]
name = "cleveland"
description = "303 patients examined for coronary heart disease"
# Images and other arrays: { kind = "npz", path = "images.npz" }
source = { kind = "csv", path = "cleveland.csv", delimiter = ",", missing = [] }
# What all jobs together may ever learn of one patient. A small epsilon tells little: 1 is strict, 10 is loose. What is
# spent does not come back, also not under another name for the same file. Without a budget no job with a privacy unit
# passes. Delta should be well below 1 / number of records.
budget = { epsilon = 10, delta = 1e-5 }

# Your own rules, checked here for every task, whatever the service says. What is left out is closed. They are told to
# the service with each dataset, under this worker's signature: your stewards can tighten them there, and only this file
# can loosen them. They hold from the agent's next start.
[policy]
principals = []                  # who may ask, by name; ["*"] for anybody
purposes = []                    # for what, for example ["heart-research"]; ["*"] for anything
model_kinds = ["declarative"]    # "entry_point" only together with entry_points below
entry_points = []                # model functions that you installed and trust
# How a job may protect your records:
#   "record"                one record more or less cannot be told; the noise is added here, in every training step
#   "organization-central"  all of your data cannot be told; the service adds the noise, and sees your update before
#   "organization-local"    the same, with the noise added here
#   "organization-distributed"  the same, with the noise added by all organizations together, under secure aggregation
#   "none"                  no promise at all: what leaves is not counted in any budget
modes = ["record"]
# max_epsilon = 3              # the most that one job may take of the budget
max_delta = 1e-5
# max_clip_norm = 1.0          # only for jobs of mode "none": the longest update that may leave
allow_exact_metrics = false      # only for mode "none": loss, accuracy and AUC may leave as they are
allow_exact_statistics = false   # only for mode "none": means and variances of columns may leave as they are
require_secure_aggregation = false  # true: only jobs under secure aggregation, so that updates leave masked only
min_rows = 10                    # fewest training records, and held-out ones behind exact numbers
min_cohort = 3                   # a round must not close with fewer updates than that
max_rounds = 100
max_model_bytes = 100_000_000
pinned_peers_only = false        # secure aggregation only among those whom `isthmus-worker peers trust` has named

[resources]
max_memory_mb = 4096
max_task_s = 3600
max_threads = 1
idle_s = 60                      # the training process ends so long after its last task
"""
"""A configuration with every key that people change, for `isthmus-worker example-config`."""
