"""A job (or a policy) as a YAML file, and what is wrong with it as sentences: where, and what."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from isthmus.strict_yaml import Document, NotStrictYaml, parse, read
from isthmus.wire.jobs import JobSpec

MANY_NAMES: Final = 8
"""More than these are not listed in a sentence."""

Model = TypeVar("Model", bound=BaseModel)


class Complaint(NamedTuple):
    """One thing that does not fit."""

    where: str
    """As `training.optimizer.sgd.lr`; empty for the file as a whole."""
    what: str
    line: int | None

    def __str__(self) -> str:
        sentence = f"{self.where}: {self.what}" if self.where else self.what
        return sentence if self.line is None else f"{sentence} (line {self.line})"


class FileInvalid(ValueError):
    """A file does not say what it should. `complaints` lists everything that was found."""

    def __init__(self, name: str, complaints: list[Complaint]) -> None:
        super().__init__(f"{name} does not fit:\n" + "\n".join(f"  {complaint}" for complaint in complaints))
        self.name = name
        self.complaints = complaints


def load_job(path: Path) -> JobSpec:
    """The job in a YAML file.

    Raises:
        FileInvalid: the file is no strict YAML, or no job; every complaint is listed.
        OSError: the file cannot be read.
    """
    return load(path, JobSpec)


def parse_job(text: str, name: str = "the job") -> JobSpec:
    """The job in a YAML text; otherwise as `load_job`."""
    try:
        document = parse(text)
    except NotStrictYaml as error:
        raise FileInvalid(name, [Complaint("", error.what, error.line)]) from None
    return check(document, JobSpec, name)


def load(path: Path, model: type[Model]) -> Model:
    """Any body of the contract in a YAML file; otherwise as `load_job`."""
    try:
        document = read(path)
    except NotStrictYaml as error:
        raise FileInvalid(str(path), [Complaint("", error.what, error.line)]) from None
    return check(document, model, str(path))


def check(document: Document, model: type[Model], name: str) -> Model:
    """What a document says, as `model`.

    Raises:
        FileInvalid: it does not fit.
    """
    if not isinstance(document.value, dict):
        what = "the file is empty" if document.value is None else "the file must hold fields, as `name: value`"
        raise FileInvalid(name, [Complaint("", what, None)])
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise FileInvalid(name, complaints(error, document)) from None


def complaints(error: ValidationError, document: Document) -> list[Complaint]:
    """Pydantic's errors as sentences about the document, in its order; several about one value become one."""
    found: dict[tuple[str | int, ...], list[str]] = defaultdict(list)
    for details in error.errors(include_url=False):
        place = _place(details, document.value)
        what = sentence(details)
        if what not in found[place]:
            found[place].append(what)
    listed = [Complaint(_dotted(place), _joined(whats), document.line_of(place)) for place, whats in found.items()]
    return sorted(listed, key=lambda complaint: complaint.line or 0)


def sentence(details: ErrorDetails) -> str:
    """What is wrong, in a few words."""
    speak = _SENTENCES.get(details["type"])
    if speak is not None:
        return speak(details.get("ctx", {}))
    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("Input should be", "must be", 1)
    return message[:1].lower() + message[1:] if message.startswith(("Must", "Input")) else message


def _place(details: ErrorDetails, value: Any) -> tuple[str | int, ...]:
    """Where the error stands in the document. Pydantic's location also names branches of unions: those are left out."""
    place: list[str | int] = []
    here = value
    for step in details["loc"]:
        if _holds(here, step):
            here = here[step]
        elif details["type"] != "missing" or step != details["loc"][-1]:
            continue
        place.append(step)
    return tuple(place)


def _joined(whats: list[str]) -> str:
    return " or ".join([whats[0], *(what.removeprefix("must be ") for what in whats[1:])])


def _holds(value: Any, step: str | int) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _dotted(place: tuple[str | int, ...]) -> str:
    dotted = ""
    for step in place:
        dotted += f"[{step}]" if isinstance(step, int) else f".{step}" if dotted else str(step)
    return dotted


def _expected(context: Mapping[str, Any]) -> str:
    return f"must be {context['expected']}"


def _tags(context: Mapping[str, Any]) -> str:
    names = [name.strip("' ") for name in context["expected_tags"].split(",")]
    if len(names) <= MANY_NAMES:
        return f"must be one of {context['expected_tags']}, not {context['tag']!r}"
    close = get_close_matches(context["tag"], names, n=1)
    return f"{context['tag']!r} is no known name" + (f"; is {close[0]!r} meant?" if close else "")


def _pattern(context: Mapping[str, Any]) -> str:
    return _PATTERNS.get(context["pattern"], f"must have the form {context['pattern']}")


_PATTERNS: Final[Mapping[str, str]] = {
    r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$": (
        "must be 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit"
    ),
    "^[0-9a-f]{64}$": "must be 64 hexadecimal digits",
    r"^[a-z0-9_.-]{1,63}/[a-z0-9_.-]{1,63}$": "must be written as organization/dataset",
    r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$": (
        "must be written as package.module:function"
    ),
    r"^[^\x00-\x1f\x7f]*$": "must be one line of text",
}

_SENTENCES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "missing": lambda _: "is required",
    "extra_forbidden": lambda _: "is not known here",
    "greater_than": lambda context: f"must be greater than {context['gt']:g}",
    "greater_than_equal": lambda context: f"must be at least {context['ge']:g}",
    "less_than": lambda context: f"must be less than {context['lt']:g}",
    "less_than_equal": lambda context: f"must be at most {context['le']:g}",
    "finite_number": lambda _: "must be a finite number",
    "int_type": lambda _: "must be a whole number",
    "int_parsing": lambda _: "must be a whole number",
    "int_from_float": lambda _: "must be a whole number",
    "float_type": lambda _: "must be a number",
    "float_parsing": lambda _: "must be a number",
    "bool_type": lambda _: "must be true or false",
    "bool_parsing": lambda _: "must be true or false",
    "string_type": lambda _: "must be text; put it in quotes if it looks like a number",
    "string_too_long": lambda context: f"must have at most {context['max_length']} characters",
    "string_too_short": lambda context: f"must have at least {context['min_length']} characters",
    "string_pattern_mismatch": _pattern,
    "too_short": lambda context: f"must hold at least {context['min_length']}, not {context['actual_length']}",
    "too_long": lambda context: f"must hold at most {context['max_length']}",
    "tuple_type": lambda _: "must be a list",
    "list_type": lambda _: "must be a list",
    "dict_type": lambda _: "must hold fields",
    "model_type": lambda _: "must hold fields",
    "model_attributes_type": lambda _: "must hold fields",
    "literal_error": _expected,
    "enum": _expected,
    "union_tag_invalid": _tags,
    "union_tag_not_found": lambda _: "must be one name, or one name with its options",
}
