"""Options that many commands have."""

from typing import Annotated

import typer

from isthmus.commands.durations import parse_duration


def _duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else there.")]


def duration_option(name: str, help_text: str) -> typer.models.OptionInfo:
    """An option that takes a span of time, as 12h or 30d; it gives seconds."""
    found: typer.models.OptionInfo = typer.Option(name, parser=_duration, metavar="SPAN", help=help_text)
    return found
