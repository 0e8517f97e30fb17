"""A round under secure aggregation: its step, who is missing, what it takes; and the same words for its events."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from rich.table import Table

from isthmus.commands.rendering.text import Cell, fields, span
from isthmus.wire.events import EventKind
from isthmus.wire.rounds import RoundPhase, RoundView
from isthmus.wire.secured import SecuredRound, Step

MOST_NAMED: Final = 8
"""Participations that are named; more would fill the screen."""

WORDS: Final[Mapping[Step, str]] = {
    Step.KEYS: "fresh public keys",
    Step.SHARES: "shares of the secrets",
    Step.UPDATE: "masked updates",
    Step.SURVIVORS: "signatures of who is in the sum",
    Step.UNMASK: "shares that take the masks off",
}
"""What members send at each step."""

EVENT_WORDS: Final[Mapping[str, str]] = {
    EventKind.KEYS_CLOSED: f"{WORDS[Step.KEYS]} are in",
    EventKind.SHARES_CLOSED: f"{WORDS[Step.SHARES]} are in",
    EventKind.SURVIVORS_SIGNED: f"enough {WORDS[Step.SURVIVORS]} are in",
    EventKind.UNMASKED: f"enough {WORDS[Step.UNMASK]} are in",
    EventKind.SHARES_WRONG: f"{WORDS[Step.UNMASK]} do not open what they should; one more is waited for",
    EventKind.ATTEMPT_ABORTED: "the attempt is given up and nothing was learned; another has new keys",
}


def secured_fields(current: RoundView, secured: SecuredRound) -> Table:
    """Where the round stands, for `isthmus job show`."""
    pairs: list[tuple[str, Cell]] = [("secured", "only the sum of the updates is opened"), ("step", _step(secured))]
    if current.phase is RoundPhase.AGGREGATING:
        pairs.append(("unmasked", "not begun" if secured.progress is None else f"{100 * secured.progress:.0f} %"))
    else:
        pairs.append(("arrived", f"{secured.arrived}, and {len(secured.missing)} missing"))
    pairs.append(("missing", named(secured.missing) or None))
    pairs.append(("dropped", named(secured.dropped) or None))
    pairs.append(
        (
            "threshold",
            f"{secured.threshold} of the {secured.members} that were asked have to stay to the end, and the sum needs "
            f"{secured.needed}",
        )
    )
    pairs.append(("attempt", secured.attempt))
    if current.phase is not RoundPhase.AGGREGATING:
        pairs.append(("step closes", secured.step_closes_at))
    return fields([pair for pair in pairs if pair[1] is not None])


def secured_sentence(current: RoundView, secured: SecuredRound, now: datetime) -> str:
    """What the round waits for, as one sentence."""
    name = f"Round {current.number} ({current.kind}), attempt {secured.attempt}"
    if current.phase is RoundPhase.AGGREGATING:
        if secured.progress is None:
            return f"{name}, has all that opens its sum; the masks are about to be taken off."
        return f"{name}, takes the masks off its sum: {100 * secured.progress:.0f} % are done."
    missing = named(secured.missing)
    waits = f"; it waits for {missing}" if missing else ""
    closes = ""
    if secured.step_closes_at is not None:
        left = (secured.step_closes_at - now).total_seconds()
        closes = f"; the step closes in {span(left)}" if left > 0 else "; the step's time has passed"
    enough = f" of the {secured.threshold} that are enough" if secured.step in (Step.SURVIVORS, Step.UNMASK) else ""
    return f"{name}, is at step {_step(secured)}: {secured.arrived}{enough} have arrived{waits}{closes}."


def _step(secured: SecuredRound) -> str:
    steps = list(Step)
    return f"{secured.step} ({steps.index(secured.step) + 1} of {len(steps)}, {WORDS[secured.step]})"


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
