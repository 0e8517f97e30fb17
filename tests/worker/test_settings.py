"""The configuration file."""

from pathlib import Path

import pytest

from isthmus_worker.settings import EXAMPLE, Policy, SettingsRefused, read_settings


def _written(folder: Path, text: str) -> Path:
    path = folder / "worker.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_can_be_read_and_its_paths_are_seen_from_the_file(tmp_path: Path) -> None:
    settings = read_settings(_written(tmp_path, EXAMPLE))

    assert settings.state_dir == tmp_path / "state"
    assert settings.datasets[0].source.path == tmp_path / "cleveland.csv"  # type: ignore[union-attr]  # it is a CSV


def test_a_policy_that_says_nothing_lets_nothing_pass() -> None:
    policy = Policy()

    assert policy.principals == ()
    assert policy.purposes == ()
    assert policy.require_clipping
    assert policy.max_clip_norm == 1.0
    assert not policy.allow_exact_metrics
    assert not policy.allow_exact_statistics


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("min_cohort = 3", "min_cohort = 1"), r"worker.toml: policy.min_cohort: .*greater than or equal to 2"),
        (("min_cohort = 3", "min_kohort = 3"), r"worker.toml: policy.min_kohort: Extra inputs"),
        (("max_clip_norm = 1.0", 'max_clip_norm = "none"'), r"worker.toml: policy.max_clip_norm"),
        (('path = "cleveland.csv", ', ""), r"worker.toml: datasets.0.source.path: Field required"),
        (('"https://isthmus.example.org"', '"isthmus.example.org"'), r"worker.toml: service_url"),
        (("entry_points = []", 'entry_points = ["not a function"]'), r"worker.toml: policy.entry_points.0"),
        (("[policy]", "[policy"), r"worker.toml: is not valid TOML"),
        (
            (
                'kind = "csv", path = "cleveland.csv", delimiter = ",", missing = []',
                'kind = "entry_point", function = "a.b:c"',
            ),
            r"worker.toml: datasets: 'a.b:c' \(of 'cleveland'\) is not listed in allowed_sources",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(tmp_path: Path, change: tuple[str, str], complaint: str) -> None:
    assert change[0] in EXAMPLE
    with pytest.raises(SettingsRefused, match=complaint):
        read_settings(_written(tmp_path, EXAMPLE.replace(*change, 1)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsRefused, match=r"nowhere.toml: cannot be read"):
        read_settings(tmp_path / "nowhere.toml")
