"""The configuration file."""

from pathlib import Path

import pytest

from isthmus.wire.datasets import Budget, UsePolicy
from isthmus.wire.privacy import PrivacyMode
from isthmus_worker.settings import EXAMPLE, Policy, SettingsRefused, announced_policy, read_settings


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
    assert policy.modes == (PrivacyMode.RECORD,)
    assert not policy.allow_exact_metrics
    assert not policy.allow_exact_statistics
    assert not policy.require_secure_aggregation


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("min_cohort = 3", "min_cohort = 1"), r"worker.toml: policy.min_cohort: .*greater than or equal to 2"),
        (("min_cohort = 3", "min_kohort = 3"), r"worker.toml: policy.min_kohort: Extra inputs"),
        (("# max_clip_norm = 1.0", 'max_clip_norm = "none"'), r"worker.toml: policy.max_clip_norm"),
        (("# max_clip_norm = 1.0", 'max_clip_norm = "unbounded"'), r"worker.toml: policy.max_clip_norm: leave"),
        (("max_rounds = 100", "require_clipping = true"), r"worker.toml: policy: require_clipping is gone: .*modes = "),
        (
            ("max_rounds = 100", "min_noise_multiplier = 0.5"),
            r"worker.toml: policy: min_noise_multiplier is gone: .*modes = \[...\].*budget",
        ),
        (('modes = ["record"]', 'modes = ["records"]'), r"worker.toml: policy.modes.0"),
        (("# max_epsilon = 3 ", "max_epsilon = 0 "), r"worker.toml: policy.max_epsilon"),
        (("max_delta = 1e-5", "max_delta = 1.0"), r"worker.toml: policy.max_delta"),
        (("epsilon = 10,", "epsilon = 1e9,"), r"worker.toml: datasets.0.budget.epsilon"),
        (("epsilon = 10,", "epsilon = -1,"), r"worker.toml: datasets.0.budget.epsilon"),
        (("epsilon = 10,", "epsilon = nan,"), r"worker.toml: datasets.0.budget.epsilon"),
        (("delta = 1e-5 }", "delta = 1 }"), r"worker.toml: datasets.0.budget.delta"),
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


def test_what_is_announced_is_what_the_file_says(tmp_path: Path) -> None:
    text = EXAMPLE.replace("principals = []", 'principals = ["rosa"]').replace("# max_epsilon = 3 ", "max_epsilon = 3 ")
    text = text.replace("require_secure_aggregation = false", "require_secure_aggregation = true")
    settings = read_settings(_written(tmp_path, text))

    announced = announced_policy(settings, settings.datasets[0])

    assert announced.budget == Budget(epsilon=10.0, delta=1e-5)
    assert announced.require_secure_aggregation
    shared = set(UsePolicy.model_fields) & set(Policy.model_fields)
    assert shared == set(UsePolicy.model_fields) - {"budget", "automatic_approval"}
    assert {name: getattr(announced, name) for name in shared} == {
        name: getattr(settings.policy, name) for name in shared
    }


def test_a_file_that_says_nothing_is_announced_as_closed(tmp_path: Path) -> None:
    text = EXAMPLE[: EXAMPLE.index("[policy]")].replace("budget = ", "# budget = ")
    settings = read_settings(_written(tmp_path, text))

    assert announced_policy(settings, settings.datasets[0]) == UsePolicy(principals=())
