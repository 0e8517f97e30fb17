"""What the organization decides about its worker: one TOML file, read once, refused at start and not at midnight."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from isthmus.wire.base import Finite, Label, Name
from isthmus.wire.models import EntryPoint, ModelKind

ANY: Final = "*"


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


def _kinds(value: Any) -> Any:
    return [ModelKind(item) if isinstance(item, str) and item in set(ModelKind) else item for item in value]


class Policy(_Section):
    """What this organization lets its worker do. Closed by default: nobody may ask, and for nothing."""

    principals: tuple[str, ...] = ()
    """Names of the researchers who may ask; `"*"` stands for anybody."""
    purposes: tuple[str, ...] = ()
    """Purposes that pass; `"*"` stands for any."""
    model_kinds: Annotated[tuple[ModelKind, ...], BeforeValidator(_kinds)] = (ModelKind.DECLARATIVE,)
    entry_points: tuple[EntryPoint, ...] = ()
    """Model functions installed here that jobs may name."""
    require_clipping: bool = True
    max_clip_norm: Annotated[Finite, Field(gt=0)] | Literal["unbounded"] = 1.0
    min_noise_multiplier: Annotated[Finite, Field(ge=0)] = 0.0
    allow_exact_metrics: bool = False
    """Whether loss, accuracy and AUC may leave un-noised."""
    allow_exact_statistics: bool = False
    """Whether counts, means and variances of columns may leave un-noised."""
    min_rows: int = Field(default=10, ge=2)
    """Fewest training records for any task, and fewest held-out ones behind numbers that leave un-noised."""
    min_cohort: int = Field(default=2, ge=2)
    """Fewest updates with which the job may close a round."""
    max_rounds: int = Field(default=1000, ge=1)
    max_model_bytes: int = Field(default=1_000_000_000, ge=1)


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

# Your own rules, checked here for every task, whatever the service says. What is left out is closed.
[policy]
principals = []                  # who may ask, by name; ["*"] for anybody
purposes = []                    # for what, for example ["heart-research"]; ["*"] for anything
model_kinds = ["declarative"]    # "entry_point" only together with entry_points below
entry_points = []                # model functions that you installed and trust
require_clipping = true
max_clip_norm = 1.0              # or "unbounded"
min_noise_multiplier = 0.0
allow_exact_metrics = false      # loss, accuracy and AUC may leave as they are
allow_exact_statistics = false   # means and variances of columns may leave as they are
min_rows = 10                    # fewest training records, and held-out ones behind exact numbers
min_cohort = 3                   # a round must not close with fewer updates than that
max_rounds = 100
max_model_bytes = 100_000_000

[resources]
max_memory_mb = 4096
max_task_s = 3600
max_threads = 1
idle_s = 60                      # the training process ends so long after its last task
"""
"""A configuration with every key that people change, for `isthmus-worker example-config`."""
