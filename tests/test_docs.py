"""The documentation is true, as far as a machine can tell: tables, commands, links, examples, and the first job."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined
from typer.main import get_command
from typer.testing import CliRunner

from app.__main__ import cli as server_commands
from app.embedded_postgres import EmbeddedPostgres
from app.settings import Settings
from isthmus.codec.arrays import encode
from isthmus.commands.app import app as commands
from isthmus.commands.exits import ExitCode
from isthmus.commands.session import Surroundings
from isthmus.jobfile import parse_job
from isthmus.strict_yaml import parse
from isthmus.torch import draw_initial
from isthmus.wire.data import DataSpec, FeatureStatistics
from isthmus.wire.jobs import JobSpec
from isthmus.wire.layers import AnyLayer
from isthmus.wire.models import ModelSpec
from isthmus.wire.organizations import ROLE_SCOPES, Role, Scope
from isthmus.wire.problems import PROBLEMS
from isthmus_worker import agent
from isthmus_worker.commands import app as worker_commands
from isthmus_worker.data import CsvSource
from isthmus_worker.features import encode_inputs
from isthmus_worker.settings import CsvSettings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
DEPLOYED = sorted([ROOT / "docker-compose.yml", ROOT / ".dockerignore", *(ROOT / "docker").iterdir()])
PROGRAMS = {"isthmus": commands, "isthmus-worker": worker_commands, "isthmus-server": server_commands}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_S = 240


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path | str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path | str, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def rows_after(page: Path | str, marker: str) -> list[list[str]]:
    """The cells of the table that follows a comment; without its head."""
    return tables_of(text_of(page).split(f"<!-- {marker} -->", 1)[1])[0]


def tables_of(text: str) -> list[list[list[str]]]:
    """Every table of a text: rows of cells, as written, without the head."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not inside:
            found.append([])
            inside = True
            continue
        if not set(line) <= set("|-: "):
            found[-1].append(cells)
    return found


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- Tables ----------------------------------------------------------------------------------------------------------


def field_tables() -> list[tuple[str, str]]:
    return [(named(page), name) for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", text_of(page))]


def spoken(value: Any) -> str:  # noqa: PLR0911 - a table: one line for each kind of value
    """A default as the tables write it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case timedelta():
            return str(TypeAdapter(timedelta).dump_python(value, mode="json"))
        case tuple():
            return f"[{', '.join(map(spoken, value))}]"
        case "":
            return '""'
    return str(value)


@pytest.mark.parametrize(("page", "name"), field_tables(), ids=lambda value: value)
def test_a_table_of_fields_lists_every_field_with_its_default(page: str, name: str) -> None:
    module, _, of = name.rpartition(".")
    model: type[BaseModel] = getattr(import_module(module), of)
    prefix = "ISTHMUS_" if model is Settings else ""

    told = {code(row[0])[0]: row[1].strip("`") for row in rows_after(page, f"table: {name}")}

    expected = {}
    for field, info in model.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else spoken(default)
        if isinstance(default, BaseModel):  # a section of its own, or a strategy by its name
            shown = getattr(default, "kind", "see below")
        expected[prefix + field.upper() if prefix else info.alias or field] = shown
    assert told == expected


def test_every_refusal_is_in_the_table_with_what_to_do() -> None:
    rows = rows_after("docs/api.md", "problems")

    assert [(code(row[0])[0], int(row[1]), row[2]) for row in rows] == [
        (problem.value, spec.status, spec.title) for problem, spec in PROBLEMS.items()
    ]
    assert all(len(row) == 4 and row[3] for row in rows)


def test_the_table_of_scopes_is_that_of_the_contract() -> None:
    rows = rows_after("docs/api.md", "scopes")

    told = {code(row[0])[0]: [bool(cell) for cell in row[1 : 1 + len(Role)]] for row in rows}
    assert told == {scope.value: [scope in ROLE_SCOPES[role] for role in Role] for scope in Scope}


def test_the_table_of_exit_codes_is_that_of_the_command_line() -> None:
    after = text_of("docs/api.md").split("## Exit codes of the command line", 1)[1]

    assert [int(row[0]) for row in tables_of(after)[0]] == [int(found) for found in ExitCode]


def test_every_layer_is_in_the_table_with_its_options_and_tensors() -> None:
    told = {}
    for row in rows_after("docs/jobs.md", "layers"):
        written = parse(code(row[0])[0]).value
        layer = ModelSpec.model_validate({"layers": [written]}).declared_layers()[0]
        told[layer.kind] = (layer, row)

    kinds = {kind for layer in get_args(AnyLayer) for kind in get_args(layer.model_fields["kind"].annotation)}
    assert set(told) == kinds
    for kind, (layer, row) in told.items():
        tensors, options = code(row[4]), row[1]
        if tensors == ["gru"]:
            tensors, options = code(told["gru"][1][4]), told["gru"][1][1]
        assert tensors == [name for name, _tensor in layer.tensors()], kind
        optional = {name: info for name, info in type(layer).model_fields.items() if not info.is_required()}
        defaults = {name: info.default for name, info in optional.items() if name not in ("kind", "p")}
        named_options = dict(re.findall(r"`(\w+)` \(`([^`]+)`", options))
        assert named_options == {name: spoken_list(default) for name, default in defaults.items()}, kind


def spoken_list(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else spoken(value)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_table_is_rendered_whole(page: Path) -> None:
    text = text_of(page)
    prose = FENCE.sub("", text)
    rendered = MarkdownIt("commonmark").enable("table").render(prose)

    written = [line for line in prose.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    assert rendered.count("<tr>") == len(written)
    for table in re.findall(r"<table>.*?</table>", rendered, re.DOTALL):
        widths = {len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(widths) == 1
    for line in written:  # GitHub cuts a cell too many, silently
        assert line.endswith("|"), line
    for table_lines in re.findall(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        assert len({line.count("|") for line in table_lines.splitlines()}) == 1, table_lines


# --- Commands --------------------------------------------------------------------------------------------------------


def typed() -> list[tuple[str, str]]:
    """Every command of ours that a page shows, in blocks for a shell and in the middle of sentences."""
    found = set()
    starts = re.compile(
        r"(?:^\s*|\| |\$\(|until |&& |/bin/|compose run --rm api )"
        r"(isthmus(?:-worker|-server)?) +(?=[a-z-])([^|<>;)&#`\n]*)"
    )
    for page in [*PAGES, ROOT / "docker-compose.yml"]:
        text = text_of(page)
        shells = [body.replace("\\\n", " ") for body in blocks(page, "sh", "bash", "ini")]
        inline = code(FENCE.sub("", text)) if page.suffix == ".md" else []
        for source in [*shells, *inline]:
            for line in source.splitlines():
                for program, rest in starts.findall(line):
                    found.add((program, " ".join(rest.split())))
    return sorted(found)


def test_commands_are_found() -> None:
    assert len(typed()) > 40
    assert ("isthmus", "--profile ada job watch $JOB") in typed()


@pytest.mark.parametrize(("program", "words"), typed(), ids=lambda value: value)
def test_a_command_exists_and_takes_its_options(program: str, words: str) -> None:
    command: Any = get_command(PROGRAMS[program])
    path: list[str] = []
    rest = iter(words.split())
    for word in rest:
        below = getattr(command, "commands", None)  # None: this is no group of commands
        if word.startswith("-"):
            options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
            assert word in options | {"--help", "-"}, f"{program} {' '.join(path)} takes no {word}"
            if below is not None and word == "--profile":
                next(rest)
        elif below is not None:
            found = command.get_command(None, word)  # also a command that another distribution brings
            assert found is not None, f"{program} {' '.join(path)} has no command {word}"
            command = found
            path.append(word)

    result = CliRunner().invoke(PROGRAMS[program], [*path, "--help"], obj=Surroundings())
    assert result.exit_code == 0, result.output


def test_the_unit_does_not_restart_what_a_restart_does_not_cure() -> None:
    final = sorted([agent.MISCONFIGURED, agent.KEY_REFUSED, agent.STATE_IN_USE, agent.NOTHING_TO_SERVE])

    assert f"RestartPreventExitStatus={' '.join(map(str, final))}" in text_of("docs/join.md")


# --- Links -----------------------------------------------------------------------------------------------------------


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{named(page)} links to {target}"
        assert file.is_relative_to(ROOT)
        assert not anchor or anchor in slugs(file), f"{named(page)} links to {target}"


def test_every_decision_is_listed_and_numbered_without_gaps() -> None:
    pages = sorted(page.name for page in (DOCS / "decisions").glob("0*.md"))

    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
    listed = tables_of(text_of("docs/decisions/README.md"))[0]
    assert [re.findall(r"\((0[^)]+)\)", row[0])[0] for row in listed] == pages
    for name, row in zip(pages, listed, strict=True):
        assert text_of(f"docs/decisions/{name}").startswith(f"# {name[:4]}: {row[1]}\n")


@pytest.mark.parametrize("page", [*PAGES, *DEPLOYED], ids=named)
def test_a_page_stands_alone(page: Path) -> None:
    assert not re.search(r"\.\./shared|/work\b|shared/design|issue #?\d|localhost:\d{5}", text_of(page))


# --- Tests that are named --------------------------------------------------------------------------------------------


def named_tests() -> list[tuple[str, str]]:
    """(file, function) of every test that a page names as its proof."""
    found = set()
    for page in sorted(DOCS.glob("*.md")):
        found |= set(re.findall(r"\b(tests/[\w./-]+\.py)::(\w+)", text_of(page)))
    return sorted(found)


def test_every_test_that_a_page_names_is_there() -> None:
    named_here = named_tests()

    assert len(named_here) >= 14
    for file, name in named_here:
        assert (ROOT / file).is_file(), f"{file} is named and not there"
        functions = {node.name for node in ast.parse(text_of(file)).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no test {name}"


def test_each_mistake_that_others_make_has_a_test_that_shows_ours_right() -> None:
    rows = rows_after("docs/privacy.md", "mistakes")

    assert len(rows) >= 14
    for mistake, instead, proof in rows:
        assert mistake, proof
        assert instead, mistake
        assert re.search(r"`tests/[\w./]+\.py::test_\w+`", proof), mistake


# --- Examples --------------------------------------------------------------------------------------------------------


def jobs() -> Iterator[Any]:
    for page in PAGES:
        for number, text in enumerate(blocks(page, "yaml")):
            yield pytest.param(text, id=f"{named(page)}-{number}")
        for number, text in enumerate(re.findall(r"cat > job.yaml <<'END'\n(.*?)^END$", text_of(page), re.M | re.S)):
            yield pytest.param(text, id=f"{named(page)}-typed-{number}")


@pytest.mark.parametrize("text", list(jobs()))
def test_a_job_that_is_shown_is_one(text: str) -> None:
    assert isinstance(parse_job(text), JobSpec)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_python_that_is_shown_compiles(page: Path) -> None:
    for body in blocks(page, "python"):
        ast.parse(body)


def test_json_that_is_shown_is_json() -> None:
    for page in PAGES:
        for body in blocks(page, "json"):
            json.loads(body)


def test_a_model_is_used_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_job(blocks("docs/jobs.md", "yaml")[0])
    arrays = draw_initial(spec.model, "5e" * 32)
    statistics = FeatureStatistics(names=["age"], count=[597.0], mean=[51.2], variance=[80.5], rows=597.0, sites=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(encode(arrays))
    about = {
        "spec": spec.model_dump(mode="json", by_alias=True),
        "manifest": spec.model.plan(spec.data.input_shape).manifest.model_dump(mode="json"),
        "statistics": statistics.model_dump(mode="json"),
    }
    (tmp_path / "model" / "model.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    plain, inputs, built = blocks("docs/jobs.md", "python")[:3]
    page: dict[str, Any] = {}

    exec(plain, page)
    exec(inputs, page)
    by_hand = page["model"]
    exec(built, page)

    record = torch.tensor([page["encode"](page["patient"], about)])
    with torch.no_grad():
        assert torch.equal(by_hand(record), page["model"](record))


def test_the_page_makes_inputs_as_the_sites_make_them() -> None:
    job = parse_job(text_of("examples/heart/job.yaml"))
    numbers = [feature.name for feature in job.data.numbers()]
    statistics = FeatureStatistics(
        names=numbers,
        count=[900.0] * len(numbers),
        mean=[float(position) for position, _ in enumerate(numbers)],
        variance=[0.0, *(2.5 * position for position, _ in enumerate(numbers[1:], start=1))],
        rows=920.0,
        sites=4,
    )
    raw = DataSpec.model_validate(job.data.model_dump() | {"features": [*job.data.model_dump()["features"]]})
    table = CsvSource(CsvSettings(path=ROOT / "examples/heart/data/hungary.csv")).load(raw.columns())
    about = {"spec": job.model_dump(mode="json", by_alias=True), "statistics": statistics.model_dump(mode="json")}
    page: dict[str, Any] = {}
    inputs = blocks("docs/jobs.md", "python")[1]
    exec(inputs[: inputs.index("\n\n\npatient")], page)

    told = [
        page["encode"]({name: values[row] for name, values in table.columns.items()}, about)
        for row in range(table.rows)
    ]

    assert np.array_equal(np.array(told, np.float32), encode_inputs(table, raw, statistics))


# --- The first job ---------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_the_first_job_of_the_readme_works_as_typed(tmp_path: Path) -> None:
    text = text_of("README.md").split("## The first job, step by step", 1)[1]
    steps = [body for language, body in FENCE.findall(text) if language == "bash"]
    port = free_port()
    script = "set -euo pipefail\n" + "\n".join(steps).replace(":8400", f":{port}")
    script = script.replace("kill $(jobs -p)", "kill $(jobs -p); wait || true; echo the end")
    folder = tmp_path / "first-job"
    folder.mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "ISTHMUS_PORT": str(port),
    }
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    process = subprocess.Popen(
        [bash, "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        database = folder / ".isthmus" / "postgres"
        if (database / "server" / "postmaster.pid").exists():
            EmbeddedPostgres(database).outlast()

    assert process.returncode == 0, said
    assert "the end" in said
    for line in text_of("README.md").split("What it waits for")[1].split("```")[0].strip().splitlines():
        assert line in said
    assert "All 5 rounds are done." in said
    about = json.loads((folder / "model" / "model.json").read_text())
    assert about["state"] == "completed"
    assert ModelSpec.model_validate(about["spec"]["model"]).kind == "declarative"
    assert "7 acknowledged" in said
