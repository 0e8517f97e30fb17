"""How the demo speaks: a word on the left, what there is to say on the right."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from rich.console import Console
from rich.text import Text

LEFT = 14
RIGHT = 8


class Teller:
    """Writes to a terminal, or to a file in lines of a readable length."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def title(self, text: str) -> None:
        """What this is about."""
        self.console.print(Text(text, style="bold"))
        self.console.print()

    def say(self, left: str, *right: str, seconds: float | None = None) -> None:
        """Sentences to the right of a word, and how long it took."""
        room = self.console.width - LEFT - RIGHT
        lines = [line for sentence in right for line in wrap(sentence, room, break_on_hyphens=False)]
        for number, text in enumerate(lines):
            line = Text(f"  {left if number == 0 else '':<{LEFT - 2}}", style="cyan").append(text, style="default")
            if number == 0 and seconds is not None:
                line.append(f"{seconds:.1f} s".rjust(room - len(text) + RIGHT), style="dim")
            self.console.print(line)

    def spell(self, left: str, *right: str) -> None:
        """The same for what will be copied: never broken into lines."""
        for number, text in enumerate(right):
            start = Text(f"  {left if number == 0 else '':<{LEFT - 2}}", style="cyan")
            self.console.print(start.append(text, style="default"), soft_wrap=True)

    def heading(self, text: str) -> None:
        """What stands below."""
        self.console.print(Text(f"  {text}", style="bold"))
        self.gap()

    def conclude(self, sentences: Sequence[str]) -> None:
        """Paragraphs."""
        for sentence in sentences:
            for line in wrap(sentence, self.console.width - 4, break_on_hyphens=False):
                self.console.print(Text(f"  {line}"))
            self.gap()

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
