"""Who takes part in a simulation, and what each of them holds."""

import hashlib
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.federation.cohort import ParticipationKey
from isthmus.wire.base import Digest, Name
from isthmus.wire.jobs import JobSpec
from isthmus_worker.data import DataSource, Table, open_source
from isthmus_worker.features import encode_targets, strata
from isthmus_worker.settings import CsvSettings, NpzSettings, SourceSettings
from isthmus_worker.simulation.partitions import Partition, Rows

_KEY_DOMAIN: Final = b"isthmus simulation hold-out key v1"


class ClientsRefused(ValueError):
    """The clients, or the test set, cannot be simulated. The message says why, and what would help."""


@dataclass(frozen=True)
class Client:
    """One participation: an organization's dataset, as a worker would serve it.

    Attributes:
        organization, dataset: its names. The order of clients and their seeds follow from them, as in a federation.
        table: its records; at least the columns that the job reads.
        holdout_key: the secret by which its worker chooses the records that it holds out; None: derived from the
            job's seed and the names. To repeat a real run, give each worker's own.
    """

    organization: str
    dataset: str
    table: Table
    holdout_key: bytes | None = None

    @property
    def key(self) -> ParticipationKey:
        """What it is ordered and drawn by."""
        return ParticipationKey(self.organization, self.dataset)


def holdout_key_of(client: Client, job_seed: str) -> bytes:
    """The client's own key, or the one that stands for it: 32 bytes."""
    if client.holdout_key is not None:
        return client.holdout_key
    names = f"{len(client.organization)}:{client.organization}:{client.dataset}"
    return hashlib.sha256(_KEY_DOMAIN + bytes.fromhex(job_seed) + names.encode()).digest()


def clients_of(table: Table, parts: Sequence[Rows]) -> list[Client]:
    """One client for each part of a dataset, named `client-000/rows`, `client-001/rows`, ... in their order."""
    digits = max(3, len(str(len(parts) - 1)))
    return [Client(f"client-{number:0{digits}}", "rows", table.only(part)) for number, part in enumerate(parts)]


def cut(table: Table, spec: JobSpec, partition: Partition, clients: int, *, seed: int, min_rows: int) -> list[Client]:
    """Cut one dataset into clients.

    Raises:
        PartitionRefused: the records do not allow it.
        DataRefused: the target is not what the job wants.
    """
    labels = labels_of(table, spec)
    return clients_of(table, partition.cut(labels, clients, seed=seed, min_rows=min_rows))


def labels_of(table: Table, spec: JobSpec) -> NDArray[np.int64]:
    """Each record's class; 0 everywhere for regression.

    Raises:
        DataRefused: the target is not what the job wants.
    """
    return strata(spec.data, encode_targets(table, spec.data))


def require_disjoint(clients: Iterable[Client], test: Table) -> None:
    """Refuse a test set that holds records of the clients: a model would be measured on what it was trained on.

    Raises:
        ClientsRefused: some record of the test set equals one of a client's, in all columns.
    """
    tested = set(test.fingerprints)
    shared = Counter[str]()
    for client in clients:
        if found := len(tested.intersection(client.table.fingerprints)):
            shared[client.organization] = found
    if shared:
        raise ClientsRefused(
            f"{shared.total()} records of the test set are also held by clients ({_some(list(shared))}): accuracy on "
            "them would be accuracy on training records. Take them out of the test set (--drop-shared does)."
        )


def without_shared(clients: Iterable[Client], test: Table) -> tuple[Table, int]:
    """The test set without the records that some client also holds, and how many those were."""
    held = {fingerprint for client in clients for fingerprint in client.table.fingerprints}
    rows = [row for row, fingerprint in enumerate(test.fingerprints) if fingerprint not in held]
    return test.only(np.array(rows, dtype=np.int64)), test.rows - len(rows)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- Files -----------------------------------------------------------------------------------------------------------


class ClientSettings(BaseModel):
    """One `[[clients]]` of a clients file: names, and a source as in a worker's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    organization: Name
    dataset: Name = "rows"
    source: SourceSettings
    holdout_key: Digest | None = None
    """64 hexadecimal digits: the worker's own secret, to repeat a real run."""


class ClientsFile(BaseModel):
    """Everything that a clients file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: Annotated[tuple[ClientSettings, ...], Field(min_length=1, max_length=100_000)]


def read_clients(path: Path) -> ClientsFile:
    """The clients in a TOML file, their relative paths seen from that file.

    Raises:
        ClientsRefused: it cannot be read, or says what is no client, or names a client or a file twice.
    """
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
        found = ClientsFile.model_validate(plain)
    except OSError as error:
        raise ClientsRefused(f"{path}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ClientsRefused(f"{path}: is not valid TOML: {error}.") from error
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        )
        raise ClientsRefused(f"{path}: {said}.") from error
    clients = tuple(_resolved(client, path.resolve().parent) for client in found.clients)
    _require_different([f"{client.organization}/{client.dataset}" for client in clients], f"{path}: the client")
    files = [
        str(client.source.path.resolve()) for client in clients if isinstance(client.source, CsvSettings | NpzSettings)
    ]
    _require_different(files, f"{path}: clients share no records, but the file")
    return ClientsFile(clients=clients)


def load_client(settings: ClientSettings, spec: JobSpec) -> Client:
    """A client with the records that the job reads.

    Raises:
        DataRefused: they cannot be read.
    """
    return Client(
        settings.organization,
        settings.dataset,
        open_source(settings.source).load(spec.data.columns()),
        None if settings.holdout_key is None else bytes.fromhex(settings.holdout_key),
    )


def source_of(path: Path) -> DataSource:
    """The source that reads a file, by its suffix: `.csv` or `.npz`.

    Raises:
        ClientsRefused: it has another one.
    """
    if path.suffix == ".csv":
        return open_source(CsvSettings(path=path))
    if path.suffix == ".npz":
        return open_source(NpzSettings(path=path))
    raise ClientsRefused(f"{path}: data is read from .csv and .npz files; describe others in a clients file.")


def require_same_columns(data: DataSource, test: DataSource) -> None:
    """Refuse a test set whose columns are not those of the data: equal records could not be told then.

    Raises:
        ClientsRefused: they differ.
        DataRefused: one of them cannot be read.
    """
    held, tested = ({column.name for column in source.schema().columns} for source in (data, test))
    if held != tested:
        raise ClientsRefused(
            f"The test set's columns are not those of the data: {_some(sorted(held ^ tested))} is in one of them only. "
            "Whether a test record is also a training record could not be told."
        )


def _resolved(client: ClientSettings, base: Path) -> ClientSettings:
    if not isinstance(client.source, CsvSettings | NpzSettings):
        return client
    source = client.source.model_copy(update={"path": base / client.source.path.expanduser()})
    return client.model_copy(update={"source": source})


def _require_different(texts: list[str], what: str) -> None:
    twice = [text for text, times in Counter(texts).items() if times > 1]
    if twice:
        raise ClientsRefused(f"{what} {twice[0]} is listed twice.")
