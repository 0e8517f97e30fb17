"""Keys of other organizations: pinned when first seen, trusted or forgotten by people here."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from isthmus.secagg.roster import Member
from isthmus_worker.commands import app
from isthmus_worker.journal import Journal
from isthmus_worker.settings import Settings
from isthmus_worker.state import StateDir
from tests.worker.factories import toml_of

FIRST, SECOND = "1a" * 32, "2b" * 32


def member(organization: str, key: str) -> Member:
    return Member(organization, "patients", bytes.fromhex(key), 1)


@pytest.fixture
def config(settings: Settings, tmp_path: Path) -> Path:
    path = tmp_path / "worker.toml"
    path.write_text(toml_of(settings), encoding="utf-8")
    return path


@pytest.fixture
def journal(settings: Settings) -> Journal:
    return Journal.open(StateDir.open(settings.state_dir))


def said(config: Path, *words: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["peers", *words, "--config", str(config)])
    assert found.exit_code == code, found.output
    return found.output


def test_the_first_key_of_an_organization_is_pinned_and_another_is_refused(journal: Journal) -> None:
    peers = journal.peers
    assert peers.objections([member("jena", FIRST)], trusted_only=False) == []
    assert [peer.organization for peer in peers.pin([member("jena", FIRST), member("lyon", SECOND)])] == [
        "jena",
        "lyon",
    ]

    assert peers.pin([member("jena", SECOND)]) == []
    assert peers.objections([member("jena", FIRST), member("lyon", SECOND)], trusted_only=False) == []
    (found,) = peers.objections([member("jena", SECOND), member("lyon", SECOND)], trusted_only=False)
    assert found.startswith("jena is pinned to another identity at this worker: the roster has the key 2b2b")


def test_pinned_is_not_trusted(journal: Journal) -> None:
    journal.peers.pin([member("jena", FIRST)])

    assert len(journal.peers.objections([member("jena", FIRST)], trusted_only=True)) == 1
    journal.peers.trust("jena", FIRST)
    assert journal.peers.objections([member("jena", FIRST)], trusted_only=True) == []


def test_trust_puts_out_whoever_was_only_seen_first(journal: Journal) -> None:
    """That one may be an impostor, who came before anybody had asked."""
    journal.peers.pin([member("jena", FIRST), member("lyon", FIRST)])

    journal.peers.trust("jena", SECOND)

    assert journal.peers.objections([member("jena", SECOND)], trusted_only=False) == []
    (found,) = journal.peers.objections([member("jena", FIRST), member("lyon", FIRST)], trusted_only=False)
    assert found.startswith("jena is pinned to another identity")
    journal.peers.trust("jena", FIRST)  # its second worker's, as it turns out
    assert journal.peers.objections([member("jena", FIRST)], trusted_only=True) == []
    assert journal.peers.objections([member("jena", SECOND)], trusted_only=True) == []


def test_people_see_their_own_fingerprint_and_trust_and_forget_others_while_the_agent_runs(
    config: Path, journal: Journal, settings: Settings
) -> None:
    state = StateDir(settings.state_dir)
    own = state.identity().public_key().public_bytes_raw().hex()
    journal.peers.pin([member("jena", FIRST)])
    with state.locked():  # as an agent does
        assert f"own           {own}" in said(config, "list")
        assert f"{FIRST} (first seen" in said(config, "list")
        said(config, "trust", "jena", SECOND.upper())
        assert f"{SECOND} (trusted" in said(config, "list")
        assert journal.peers.objections([member("jena", SECOND)], trusted_only=True) == []

        said(config, "forget", "jena")
        assert "No other organization was met yet." in said(config, "list")
        assert journal.peers.objections([member("jena", SECOND)], trusted_only=False) == []


def test_what_is_no_fingerprint_and_whom_nobody_knows_is_said_so(config: Path, journal: Journal) -> None:
    assert "is no fingerprint: it has 64 hexadecimal digits" in said(config, "trust", "jena", "1234", code=2)
    assert "knows no key of 'jena'" in said(config, "forget", "jena", code=2)
    assert journal.peers.all() == []


def test_before_the_first_start_there_is_nothing_to_trust_in(config: Path) -> None:
    assert "It is made when the agent starts" in said(config, "trust", "jena", FIRST, code=2)
    assert "own           none yet" in said(config, "list")
