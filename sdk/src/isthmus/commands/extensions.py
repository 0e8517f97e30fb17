"""Sub-commands that other distributions bring, by the entry-point group `isthmus.commands`.

An entry point is a `typer.Typer` or a plain function; its name is the name of the sub-command. It is loaded when it is
called or listed, so that what it imports costs nobody else anything.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

import typer
from typer.core import TyperGroup

GROUP: Final = "isthmus.commands"


class ExtensibleGroup(TyperGroup):
    """The group of our own commands and of those that are found installed. Our own names win."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name."""
        own = super().list_commands(ctx)
        return [*own, *sorted(name for name in extensions() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None if there is none."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        found = extensions().get(cmd_name)
        return _command(found) if found is not None else None


def extensions() -> dict[str, EntryPoint]:
    """Name -> entry point of everything in the group that is installed."""
    return {found.name: found for found in entry_points(group=GROUP)}


def _command(found: EntryPoint) -> Any:
    try:
        loaded = found.load()
    except Exception as error:
        return _broken(found, error)
    if isinstance(loaded, typer.Typer):
        command = typer.main.get_command(loaded)
    else:
        single = typer.Typer(add_completion=False)
        single.command(found.name)(loaded)
        command = typer.main.get_command(single)
    command.name = found.name
    return command


def _broken(found: EntryPoint, error: Exception) -> Any:
    """A command that says why it cannot be loaded, so that one broken distribution does not stop the others."""
    single = typer.Typer(add_completion=False)
    why = f"{found.name!r} of {found.dist.name if found.dist else found.value} cannot be loaded: {error}"

    @single.command(found.name, help=f"({why})")
    def say() -> None:
        raise RuntimeError(why)

    return typer.main.get_command(single)
