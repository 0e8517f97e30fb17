"""YAML as people expect it: plain data, each key once, no anchors, numbers and booleans as in YAML 1.2.

YAML 1.1, which PyYAML reads, takes `no` for false, `010` for 8, `12:30` for 750 and `1e-5` for a word. Anchors and
aliases can make a page of text fill the memory. None of that has a place in a file that says what happens to records.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

MAX_BYTES: Final = 2**20
MAX_NESTING: Final = 64

Place = tuple[str | int, ...]
"""Where a value stands: keys and numbers of items, from the outside in."""


class NotStrictYaml(ValueError):
    """A file is no YAML, or says something in a way that is refused. `line` counts from 1; None: not known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what if line is None else f"line {line}: {what}")
        self.what = what
        self.line = line


class Document(NamedTuple):
    """Plain data, and the line where each of its parts stands."""

    value: Any
    lines: Mapping[Place, int]

    def line_of(self, place: Sequence[str | int]) -> int | None:
        """The line of `place`, or else of the nearest part around it."""
        for length in range(len(place), 0, -1):
            line = self.lines.get(tuple(place[:length]))
            if line is not None:
                return line
        return None


def read(path: Path) -> Document:
    """The document in a file.

    Raises:
        NotStrictYaml: it is too large, not UTF-8, no YAML, or refused for what the head of this module says.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return parse(file.read(MAX_BYTES + 1))


def parse(data: bytes | str) -> Document:
    """The document in a text; otherwise as `read`."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        raise NotStrictYaml(f"the file is larger than {MAX_BYTES // 2**20} MiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise NotStrictYaml("the file is not UTF-8 text") from None
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise NotStrictYaml(
            f"this is no YAML: {error.problem or error.context}", mark.line + 1 if mark is not None else None
        ) from None
    except yaml.YAMLError as error:
        raise NotStrictYaml(f"this is no YAML: {str(error).splitlines()[0]}") from None
    lines: dict[Place, int] = {}
    return Document(None if node is None else _value(node, (), lines), lines)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_WORDS: Final = {"null": None, "Null": None, "NULL": None, "~": None, "": None,
                 "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}  # fmt: skip
_NUMBER: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WHOLE: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_ENDLESS: Final = re.compile(r"([-+]?)\.(inf|Inf|INF)|(\.nan|\.NaN|\.NAN)")


def _check_events(text: str) -> None:
    """Refuse, before anything is built from it, what could grow or nest without bound."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark is not None else None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise NotStrictYaml("anchors (&) and aliases (*) are refused; write the value out", line)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise NotStrictYaml(f"tags are refused: {tag}", line)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_NESTING:
                raise NotStrictYaml(f"values are nested more than {MAX_NESTING} deep", line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*place, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = _value(key_node, place, lines)
            if not isinstance(key, str):
                raise NotStrictYaml(f"a key is a word; put it in quotes if it is meant: {_shown(key_node)}", key_line)
            if key in found:
                raise NotStrictYaml(f"{key!r} stands here twice", key_line)
            lines[*place, key] = key_line
            found[key] = _value(value_node, (*place, key), lines)
        return found
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style is not None else _plain(node.value, line)


def _plain(word: str, line: int) -> Any:
    """What a scalar without quotes stands for in YAML 1.2."""
    if word in _WORDS:
        return _WORDS[word]
    try:
        if _WHOLE.fullmatch(word):
            return int(word, 0) if word[:2] in ("0o", "0x") else int(word, 10)
        if _NUMBER.fullmatch(word):
            return float(word)
    except ValueError:  # Python's bound on the number of digits
        raise NotStrictYaml("a number has too many digits", line) from None
    endless = _ENDLESS.fullmatch(word)
    if endless is None:
        return word
    return float("nan") if endless.group(3) else float(f"{endless.group(1)}inf")


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a table"
