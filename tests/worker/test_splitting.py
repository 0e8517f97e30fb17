"""Holding out record by record, as privacy of records needs it."""

import os

import numpy as np

from isthmus_worker.data import Table
from isthmus_worker.parts import mark_holdout
from isthmus_worker.splitting import held_out, held_out_apart
from tests.worker.factories import make_record_spec, make_spec

KEY = b"a worker's secret"


def fingerprints(count: int) -> list[bytes]:
    """Of different records."""
    return [number.to_bytes(16, "big") for number in range(count)]


def test_one_record_more_moves_no_other_one_between_the_parts() -> None:
    found = fingerprints(500)
    for share in (0.05, 0.2, 0.5, 0.9):
        whole = held_out_apart(found, share, KEY)
        for left_out in range(0, 500, 17):
            rest = found[:left_out] + found[left_out + 1 :]
            assert np.array_equal(held_out_apart(rest, share, KEY), np.delete(whole, left_out))


def test_the_split_by_ranks_does_move_others_which_is_why_it_is_not_used_then() -> None:
    found, labels = fingerprints(500), np.zeros(500, np.int64)
    whole = held_out(labels, found, 0.2, KEY)
    moved = [
        not np.array_equal(held_out(labels[1:], found[:place] + found[place + 1 :], 0.2, KEY), np.delete(whole, place))
        for place in range(100)
    ]
    assert any(moved)


def test_about_the_share_is_held_out_and_a_larger_share_holds_out_the_same_ones_too() -> None:
    found = fingerprints(20_000)
    fifth, half = held_out_apart(found, 0.2, KEY), held_out_apart(found, 0.5, KEY)
    assert abs(fifth.mean() - 0.2) < 6 * (0.2 * 0.8 / 20_000) ** 0.5
    assert (half | ~fifth).all()
    assert not held_out_apart(found, 0.0, KEY).any()


def test_who_is_held_out_is_the_workers_secret_and_equal_records_go_together() -> None:
    found = fingerprints(2000)
    one = held_out_apart(found, 0.5, os.urandom(32))
    assert 0.4 < (one == held_out_apart(found, 0.5, os.urandom(32))).mean() < 0.6
    twice = held_out_apart([found[3], found[4], found[3]], 0.5, KEY)
    assert twice[0] == twice[2]


def test_a_job_that_protects_records_holds_them_out_one_by_one_for_all_that_it_does() -> None:
    chance = np.random.default_rng(0)
    columns = {"age": chance.normal(50, 10, 300), "pressure": chance.normal(130, 20, 300), "sex": ["F"] * 300}
    table = Table({**columns, "ill": np.arange(300) % 2}, fingerprints(300))
    rest = np.delete(np.arange(300), 100)
    spec = make_record_spec()
    whole = mark_holdout(table, spec, KEY).holdout
    assert np.array_equal(mark_holdout(table.only(rest), spec, KEY).holdout, whole[rest])
    assert 0 < whole.sum() < 300
    assert mark_holdout(table, make_spec(), KEY).holdout.sum() == 60  # exact shares where nothing is claimed
