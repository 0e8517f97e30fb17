"""Clients from files, and their secrets."""

from pathlib import Path

import numpy as np
import pytest

from isthmus_worker.simulation.clients import (
    Client,
    ClientsRefused,
    clients_of,
    holdout_key_of,
    load_client,
    read_clients,
    require_same_columns,
    source_of,
)
from tests.worker.simulation.cases import SEED, job_spec, points, write_npz

TWO = """
[[clients]]
organization = "geneva"
dataset = "patients"
source = { kind = "npz", path = "geneva.npz" }

[[clients]]
organization = "oslo"
source = { kind = "csv", path = "oslo.csv", delimiter = ";" }
holdout_key = "KEY"
""".replace("KEY", "ab" * 32)


def written(folder: Path, text: str) -> Path:
    path = folder / "clients.toml"
    path.write_text(text)
    return path


def test_clients_are_read_from_files_beside_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "geneva.npz", points(30))
    (tmp_path / "oslo.csv").write_text("a;b;c;d;kind\n1;2;3;4;0\n5;6;7;8;2\n")
    path = written(tmp_path, TWO)
    monkeypatch.chdir("/")

    geneva, oslo = (load_client(one, job_spec()) for one in read_clients(path).clients)

    assert (geneva.organization, geneva.dataset, geneva.table.rows, geneva.holdout_key) == (
        "geneva",
        "patients",
        30,
        None,
    )
    assert (oslo.organization, oslo.dataset, oslo.table.rows) == ("oslo", "rows", 2)
    assert oslo.holdout_key == bytes.fromhex("ab" * 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("oslo.csv", "geneva.npz"), "share no records, but the file .*geneva.npz is listed twice"),
        (('"oslo"', '"geneva"\ndataset = "patients"'), "the client geneva/patients is listed twice"),
        (('"oslo"', '"Oslo!"'), r"clients.1.organization"),
        (("ab" * 32, "ab"), r"clients.1.holdout_key"),
        (("delimiter", "separator"), r"clients.1.source.csv.separator"),
        (('"oslo"', "oslo"), "is not valid TOML"),
        (("[[clients]]", "[[hospitals]]"), "clients: Field required"),
    ],
    ids=["file twice", "name twice", "name", "key", "unknown", "no TOML", "no clients"],
)
def test_a_list_that_is_wrong_is_refused_in_a_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(ClientsRefused, match=said):
        read_clients(written(tmp_path, TWO.replace(*change)))


def test_a_list_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientsRefused, match="cannot be read"):
        read_clients(tmp_path / "none.toml")


def test_a_client_has_a_secret_of_its_own_that_follows_from_the_job_unless_it_is_given() -> None:
    table = points(3)
    one, other = Client("a", "bc", table), Client("ab", "c", table)

    assert len(holdout_key_of(one, SEED)) == 32
    assert holdout_key_of(one, SEED) == holdout_key_of(Client("a", "bc", points(9)), SEED)
    assert holdout_key_of(one, SEED) != holdout_key_of(other, SEED)
    assert holdout_key_of(one, SEED) != holdout_key_of(one, "00" * 32)
    assert holdout_key_of(Client("a", "bc", table, b"k" * 32), SEED) == b"k" * 32


def test_parts_become_clients_whose_names_are_in_their_order() -> None:
    parts = [np.array([row]) for row in range(1200)]
    names = [client.organization for client in clients_of(points(1200), parts)]

    assert names == sorted(names)
    assert (names[0], names[-1]) == ("client-0000", "client-1199")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClientsRefused, match=r"\.csv and \.npz"):
        source_of(tmp_path / "points.parquet")


def test_a_test_set_of_other_columns_is_refused(tmp_path: Path) -> None:
    data = source_of(write_npz(tmp_path / "data.npz", points(30)))
    alike = source_of(write_npz(tmp_path / "alike.npz", points(20, 9)))
    np.savez(tmp_path / "more.npz", **points(20, 9).columns, patient=np.arange(20))  # type: ignore[arg-type]

    require_same_columns(data, alike)
    with pytest.raises(ClientsRefused, match="patient is in one of them only"):
        require_same_columns(data, source_of(tmp_path / "more.npz"))
