"""What the benchmarks say is what they measured: spreads, tables, peers' logs, requirements that cannot be met."""

import json
from pathlib import Path

import pytest

from benchmarks.federation import parameters_of, shapes_of, trivial_job, width_of
from benchmarks.peers.environments import NotInstalled, relax
from benchmarks.peers.nvflare import told
from benchmarks.peers.running import Ended
from benchmarks.sockets import socket_floor
from benchmarks.tables import Report, Spread, shown
from isthmus.torch import build


def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (spread.median, spread.least, spread.most) == (3.0, 1.0, 10.0)
    assert [spread.percentile(share) for share in (0.2, 0.21, 0.9, 1.0)] == [1.0, 2.0, 10.0, 10.0]
    assert Spread.of(range(1, 101)).percentile(0.9) == 90
    with pytest.raises(ValueError, match="no sample"):
        Spread.of([])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04127, "0.0413"), (0.3764, "0.376"), (4.91, "4.91"), (27.43, "27.4"), (100.0, "100"), (1234.6, "1235")],
)
def test_figures_have_three_digits_that_count_and_no_exponent(value: float, text: str) -> None:
    assert shown(value) == text


def test_the_file_holds_every_sample_that_the_table_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("demo", "A table", ("what", "s"))
    report.row("ours", Spread.of([0.1, 0.3, 0.2]))
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        report.row("theirs")
    report.section("Another", ("MB",))
    report.row(None)
    report.note("Said [so].")
    report.finish(tmp_path / "deep" / "demo.json")

    found = json.loads((tmp_path / "deep" / "demo.json").read_text())
    assert found["tables"][0]["rows"] == [
        {
            "what": "ours",
            "s": {"median": 0.2, "p90": 0.3, "p99": 0.3, "min": 0.1, "max": 0.3, "samples": [0.1, 0.3, 0.2]},
        }
    ]
    assert found["tables"][1]["rows"] == [{"MB": None}]
    assert {"cores", "processor", "memory_gib", "python", "load_average"} <= found["machine"].keys()
    printed = capsys.readouterr().out
    assert "0.2 [0.1..0.3]" in printed
    assert "Said [so]." in printed


@pytest.mark.parametrize("model_mb", [0.25, 10, 100])
def test_a_trivial_model_has_the_size_that_was_asked_for(model_mb: float) -> None:
    width = width_of(model_mb)
    assert 0.97 * model_mb < 4 * parameters_of(width) / 1e6 <= model_mb
    assert len(shapes_of(width)) == 20
    module = build(trivial_job(model_mb, 3, 2).model)
    assert [tuple(parameter.shape) for parameter in module.parameters()] == shapes_of(width)


def test_requirements_without_a_version_lose_their_bounds_one_by_one() -> None:
    tried: list[list[str]] = []

    def pip(wanted: list[str]) -> str:
        tried.append(list(wanted))
        missing = [one for one in wanted if one in ("certifi>=2099", "uv>=9")]
        return f"ERROR: No matching distribution found for {missing[0]}" if missing else ""

    wanted = ["certifi-extras>=1", "certifi>=2099", "uv>=9"]
    assert relax(wanted, pip) == ["certifi>=2099", "uv>=9"]
    assert tried[-1] == ["certifi-extras>=1", "certifi", "uv"]


@pytest.mark.parametrize("complaint", ["the disk is full", "No matching distribution found for certifi"])
def test_what_cannot_be_relaxed_is_not_installed(complaint: str) -> None:
    with pytest.raises(NotInstalled, match="cannot be met"):
        relax(["certifi"], lambda _wanted: complaint)


def test_a_peer_s_rounds_are_read_from_its_log_with_the_updates_that_were_in(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert told(log) == []
    log.write_text(
        "2026-01-02 03:04:05,000 - INFO - Aggregated 1/2 results\n"
        "2026-01-02 03:04:05,500 - INFO - Aggregated 2/2 results\n"
        "2026-01-02 03:04:06,250 - INFO - End persist model on server.\n"
        "2026-01-02 03:04:07,000 - INFO - Round 1 started.\n"
        "2026-01-02 03:04:08,000 - INFO - Aggregated 2/2 results\n"
        "2026-01-02 03:04:08,750 - INFO - End persist model on server.\n"
        "2026-01-02 03:04:09,750 - INFO - End persist model on server.\n"
    )
    first, second, third = told(log)
    assert (first.updates, second.updates, third.updates) == (2, 2, 0)
    assert second.at_s - first.at_s == 2.5
    assert isinstance(first, Ended)


def test_the_floor_moves_all_bytes_down_and_up_and_leaves_no_file_of_an_update(tmp_path: Path) -> None:
    size = (1 << 20) + 17
    with socket_floor(tmp_path / "floor", size, 2) as floor:
        assert all(floor.round() > 0 for _ in range(2))
        assert [path.name for path in (tmp_path / "floor").iterdir()] == ["model"]
        assert (tmp_path / "floor" / "model").stat().st_size == size
