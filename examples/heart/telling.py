"""How the demo speaks: a word on the left, what there is to say on the right."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

LEFT = 10


class Teller:
    """Writes to a terminal, or to a file in lines of a readable length."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def title(self, text: str) -> None:
        """What this is about."""
        self.console.print(Text(text, style="bold"))
        self.console.print()

    def say(self, left: str, *right: str, seconds: float | None = None) -> None:
        """One line or several, all to the right of the same word."""
        for number, text in enumerate(right):
            line = Table.grid(padding=(0, 2, 0, 0), expand=True)
            line.add_column(width=LEFT + 2, no_wrap=True)
            line.add_column(ratio=1, overflow="fold")
            line.add_column(justify="right", no_wrap=True, style="dim", width=6)
            took = f"{seconds:.1f} s" if seconds is not None and number == 0 else ""
            line.add_row(Text(f"  {left}" if number == 0 else "", style="cyan"), Text(text), took)
            self.console.print(line)

    def spell(self, left: str, *right: str) -> None:
        """The same for what will be copied: never broken into lines."""
        for number, text in enumerate(right):
            start = Text(f"  {left if number == 0 else '':<{LEFT}}  ", style="cyan")
            self.console.print(start.append(text, style="default"), soft_wrap=True)

    def gap(self) -> None:
        """An empty line."""
        self.console.print()


def console_of_the_demo() -> Console:
    """Standard output; 100 columns where it is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=100)


def shown(path: Path) -> str:
    """A path as seen from here, if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
