"""A job file is read strictly, and what is wrong with it is said where it stands."""

from pathlib import Path

import pytest

from isthmus.jobfile import FileInvalid, load, load_job, parse_job
from isthmus.strict_yaml import MAX_BYTES, NotStrictYaml, parse
from isthmus.wire.datasets import UsePolicy

JOB = """\
name: heart-disease
model:
  layers:
    - {linear: {in: 2, out: 16}}
    - relu
    - {linear: {in: 16, out: 2}}
data: {task: classification, features: [age, sex], target: disease, classes: 2, standardize: federated}
training: {optimizer: {sgd: {lr: 0.05, momentum: 0.9}}, batch_size: 32, epochs: 2, loss: cross_entropy}
strategy: fedavg
privacy: none
rounds: 20
"""


def complaints_about(text: str) -> list[str]:
    with pytest.raises(FileInvalid) as invalid:
        parse_job(text)
    return [str(complaint) for complaint in invalid.value.complaints]


def test_a_job_as_a_person_writes_it_is_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("\ufeff" + JOB)
    spec = load_job(path)
    assert spec.name == "heart-disease"
    assert spec == parse_job(JOB)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("lr: 0.05", "lr: -1", "training.optimizer.sgd.lr: must be greater than 0 (line 8)"),
        ("{sgd: {lr: 0.05, momentum: 0.9}}", "{kind: sgd, lr: x}", "training.optimizer.lr: must be a number (line 8)"),
        ("sgd:", "sgdd:", "training.optimizer: must be one of 'sgd', 'adam', 'adamw', not 'sgdd' (line 8)"),
        ("batch_size: 32", "batch_size: many", "training.batch_size: must be a whole number or 'all' (line 8)"),
        ("- relu", "- reluu", "model.layers[1]: 'reluu' is no known name; is 'relu' meant? (line 5)"),
        ("out: 16}}", "out: x}}", "model.layers[0].linear.out: must be a whole number (line 4)"),
        ("in: 16", "in: 15", "layer 2 (linear) takes 15 inputs but gets 16"),
        ("classification", "guessing", "data.task: must be 'classification' or 'regression' (line 7)"),
        ("sex]", "{name: sex, form: x}]", "data.features[1].form: is not known here (line 7)"),
        (
            "name: heart-disease",
            "name: Heart Disease",
            "name: must be 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit (line 1)",
        ),
        ("rounds: 20\n", "", "rounds: is required"),
        ("rounds: 20", "rounds: 20\nrounds: 21", "'rounds' stands here twice (line 12)"),
        ("name: heart", "name: &a heart", "anchors (&) and aliases (*) are refused; write the value out (line 1)"),
        (
            "name: heart",
            "name: !!python/name:os.system heart",
            "tags are refused: tag:yaml.org,2002:python/name:os.system (line 1)",
        ),
        (
            "target: disease",
            "target: 010",
            "data.target: must be text; put it in quotes if it looks like a number (line 7)",
        ),
        ("rounds: 20", "rounds: [1,", "this is no YAML: expected the node content, but found '<stream end>' (line 12)"),
        ("rounds: 20", "rounds: " + "9" * 5000, "a number has too many digits (line 11)"),
        ("rounds: 20", "3: 4", "a key is a word; put it in quotes if it is meant: '3' (line 11)"),
        ("rounds: 20", "rounds: " + "[" * 100, "values are nested more than 64 deep (line 11)"),
    ],
)
def test_a_mistake_is_said_where_it_stands(old: str, new: str, complaint: str) -> None:
    assert old in JOB
    assert complaint in complaints_about(JOB.replace(old, new))


def test_noise_in_shares_without_secure_aggregation_is_refused_with_what_to_write() -> None:
    section = "privacy: {unit: organization, where: distributed, epsilon: 3.0, clip_norm: 1.0}"
    (found,) = complaints_about(JOB.replace("privacy: none", section))
    assert "shares of noise under secure aggregation: write secure_aggregation: true beside privacy" in found


def test_secure_aggregation_is_yes_or_no_or_a_section() -> None:
    job = JOB.replace("privacy: none", "privacy: {unit: none, clip_norm: 10}\ncohort: {min_updates: 3}").replace(
        ", standardize: federated", ""
    )
    secured = parse_job(job + "secure_aggregation: true\n").secure_aggregation
    assert secured == parse_job(job + "secure_aggregation: {step_s: 60}\n").secure_aggregation
    assert secured is not None
    assert parse_job(job + "secure_aggregation: false\n").secure_aggregation is None
    (found,) = complaints_about(job.replace("min_updates: 3", "min_updates: 2") + "secure_aggregation: true\n")
    assert "secure aggregation needs cohort.min_updates of 3 at least" in found


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    found = complaints_about(JOB.replace("lr: 0.05", "lr: 0").replace("rounds: 20", "rounds: 0\nfoo: 1"))
    assert [line.split(":")[0] for line in found] == ["training.optimizer.sgd.lr", "rounds", "foo"]


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "a: 1\n---\nb: 2"])
def test_what_holds_no_fields_is_no_job(text: str) -> None:
    assert len(complaints_about(text)) == 1


def test_a_file_too_large_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(FileInvalid, match="larger than 1 MiB"):
        load_job(path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(FileInvalid, match="not UTF-8"):
        load_job(path)


def test_a_bomb_of_aliases_is_refused() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    with pytest.raises(NotStrictYaml, match="anchors"):
        parse(bomb)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("12:30", "12:30"),
        ("1e-5", 1e-5),
        ("-.5", -0.5),
        ("+3", 3),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("'3'", "3"),
        ('"true"', "true"),
        ("=", "="),
        ("-.inf", float("-inf")),
        ("1.2.3", "1.2.3"),
        ("<<", "<<"),
    ],
)
def test_words_mean_what_they_mean_in_yaml_1_2(word: str, value: object) -> None:
    got = parse(f"key: {word}").value["key"]
    assert (type(got), got) == (type(value), value)


def test_merge_keys_are_plain_keys() -> None:
    assert parse("<<: {a: 1}").value == {"<<": {"a": 1}}


def test_a_policy_is_read_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("purposes: [research]\nmin_cohort: 3\n")
    assert load(path, UsePolicy) == UsePolicy(purposes=("research",), min_cohort=3)
    path.write_text("min_cohort: 1\n")
    with pytest.raises(FileInvalid, match=r"min_cohort: must be at least 2 \(line 1\)"):
        load(path, UsePolicy)
