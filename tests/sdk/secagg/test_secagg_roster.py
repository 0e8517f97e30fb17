"""Rosters have one form, and graphs have the neighbours that were asked for."""

import hashlib

import pytest

from isthmus.secagg.graph import neighbours
from isthmus.secagg.roster import Member, Roster
from isthmus.secagg.violations import ProtocolViolation


def member(name: str, *, dataset: str = "patients", identity: int | None = None, weight: int = 1) -> Member:
    key = bytes([identity]) * 32 if identity is not None else hashlib.sha256(name.encode()).digest()
    return Member(name, dataset, key, weight)


THREE = [member("charite", weight=303), member("basel", weight=2**64 - 1), member("zurich")]


def test_a_roster_is_sorted_and_comes_back_from_its_bytes() -> None:
    roster = Roster(THREE)
    assert [found.organization for found in roster.members] == ["basel", "charite", "zurich"]
    assert len(roster) == 3
    assert roster[1].weight == 303
    assert Roster.from_bytes(roster.to_bytes()) == roster
    assert roster.to_bytes().startswith(b"\0\0\0\3\5basel\x08patients")
    assert roster.digest() == hashlib.sha256(roster.to_bytes()).hexdigest()
    assert Roster(reversed(THREE)).digest() == roster.digest()


def test_every_field_of_a_roster_is_in_its_digest() -> None:
    others = [
        member("aarau", weight=303),
        member("charite", dataset="others", weight=303),
        member("charite", identity=7, weight=303),
        member("charite", weight=304),
    ]
    assert len({Roster([other, *THREE[1:]]).digest() for other in [THREE[0], *others]}) == 5


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (THREE[:2], "a roster has 3 to 512 members, not 2"),
        ([member(f"org-{i}") for i in range(513)], "not 513"),
        ([*THREE, member("basel", dataset="others", identity=3)], "an organization is in the roster twice"),
        ([*THREE[:2], member("a", identity=1), member("b", identity=1)], "the same identity"),
    ],
)
def test_rosters_that_count_somebody_twice_or_have_too_few_are_refused(members: list[Member], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Roster(members)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (("", "patients", bytes(32), 1), "'' is no name: it has 1 to 63 of a-z"),
        (("a" * 64, "patients", bytes(32), 1), "is no name"),
        (("a", "b" * 64, bytes(32), 1), "is no name"),
        (("Ulm", "patients", bytes(32), 1), "'Ulm' is no name"),
        (("zürich", "patients", bytes(32), 1), r"'z\\xfcrich' is no name"),
        (("a", "with space", bytes(32), 1), "'with space' is no name"),
        (("ulm\n", "patients", bytes(32), 1), r"'ulm\\n' is no name"),
        (("a\r\x1b[2Kulm", "patients", bytes(32), 1), r"'a\\r\\x1b\[2Kulm' is no name"),
        (("a", "pat\u202eients", bytes(32), 1), r"'pat\\u202eients' is no name"),
        (("a", "patients", bytes(31), 1), "31 bytes, not 32"),
        (("a", "patients", bytes(32), 0), "weight of a is 0"),
        (("a", "patients", bytes(32), 2**64), "not in 1 to"),
    ],
)
def test_odd_members_are_refused(fields: tuple[str, str, bytes, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Member(*fields)


def _raw(members: list[Member]) -> bytes:
    """The bytes of members that are no roster."""
    parts = [Roster([found, member("zz1"), member("zz2")]).to_bytes()[4:] for found in members]
    tail = len(Roster([member("zz0"), member("zz1"), member("zz2")]).to_bytes()[4:]) * 2 // 3
    return len(members).to_bytes(4, "big") + b"".join(part[:-tail] for part in parts)


def test_rosters_that_came_in_another_form_are_violations() -> None:
    inorder = sorted(THREE, key=lambda found: found.place)
    assert Roster.from_bytes(_raw(inorder)) == Roster(THREE)
    for raw, reason in [
        (_raw(THREE), "members are not in their order"),
        (_raw(inorder[:2]), "a roster has 3 to 512 members, not 2"),
        (_raw([inorder[0], inorder[0], inorder[1]]), "in the roster twice"),
        (_raw(inorder) + b"\0", "1 bytes more than belong to it"),
        (_raw(inorder)[:-1], "ends too early"),
        (b"\xff" * 400, "says that it has 4294967295 members"),
        (_raw(inorder).replace(b"zurich", b"\xff\xferich"), "not UTF-8"),
        (_raw(inorder).replace(b"zurich", b"zu\nich"), r"The roster is not valid: 'zu\\nich' is no name"),
        (_raw(inorder).replace(b"patients", b"\x1b[2Kents"), r"'\\x1b\[2Kents' is no name"),
        (b"", "ends too early"),
    ]:
        with pytest.raises(ProtocolViolation, match=reason):
            Roster.from_bytes(raw)


@pytest.mark.parametrize(("members", "degree"), [(3, 2), (5, 2), (10, 4), (10, 5), (61, 20), (8, 7), (2, 1), (200, 56)])
def test_everybody_has_as_many_neighbours_and_is_theirs(members: int, degree: int) -> None:
    graph = [neighbours(members, degree, b"seed", index) for index in range(members)]
    for index, near in enumerate(graph):
        assert len(near) == degree
        assert index not in near
        assert all(index in graph[other] for other in near)
    reached, frontier = {0}, {0}
    while frontier:
        frontier = set().union(*(graph[index] for index in frontier)) - reached
        reached |= frontier
    assert reached == set(range(members))


def test_the_seed_shuffles_the_ring() -> None:
    assert len({neighbours(50, 6, bytes([seed]), 0) for seed in range(20)}) > 15
    assert neighbours(50, 49, b"a", 3) == neighbours(50, 49, b"b", 3) == frozenset(range(50)) - {3}


@pytest.mark.parametrize(("members", "degree", "index"), [(5, 3, 0), (5, 5, 0), (5, 0, 0), (5, 4, 5), (5, 4, -1)])
def test_graphs_that_cannot_be_are_refused(members: int, degree: int, index: int) -> None:
    with pytest.raises(ValueError, match=r"there is no member|no graph of"):
        neighbours(members, degree, b"", index)
