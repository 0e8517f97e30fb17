"""A few of the most dangerous moments, with real processes; `make torture` has them all, and hundreds of plans."""

from pathlib import Path

from tests.torture.driver import Driver
from tests.torture.ground import ground
from tests.torture.plans import CUT, EXACT, KILL, ONE, Plan, Step
from tests.torture.points import COORDINATOR, POINTS, SERVER

PLANS = (
    Plan(
        "spent and not stored", ONE, "momentum",
        (
            Step("update-durable", SERVER, 2, KILL),
            Step("spent", "clinic-0", 2, KILL),
            Step("wire-receipt", "clinic-1", 2, CUT),
        ),
    ),
    Plan(
        "stored and not published", ONE, "momentum",
        (
            Step("aggregate-unpublished", COORDINATOR, 2, KILL),
            Step("published-untold", COORDINATOR, 2, KILL),
            Step("upload-written", "clinic-2", 2, KILL),
        ),
    ),
    Plan(
        "the service at every phase of a secured round", ONE, "secured",
        (
            Step("step-uncommitted", SERVER, 2, KILL),  # keys
            Step("step-closed", SERVER, 2, KILL),  # shares
            Step("update-durable", SERVER, 2, KILL),
            Step("survivors-fixed", SERVER, 1, KILL),
            Step("unmasking-open", SERVER, 1, KILL),
            Step("unmasked", SERVER, 2, KILL),
            Step("secrets-rebuilt", COORDINATOR, 1, KILL),
            Step("attempt-forgotten", COORDINATOR, 2, KILL),
        ),
    ),
    Plan(
        "workers at every phase of a secured round", ONE, "distributed",
        (
            Step("keys-made", "clinic-0", 1, KILL),
            Step("shares-made", "clinic-1", 1, KILL),
            Step("masked-kept", "clinic-2", 1, KILL),
            Step("mask-written", "clinic-0", 2, KILL),
            Step("survivors-kept", "clinic-1", 2, KILL),
            Step("reveal-charged", "clinic-2", 2, KILL),
            Step("revealed", "clinic-0", 2, KILL),
        ),
    ),
)  # fmt: skip


def test_what_is_killed_in_its_most_dangerous_moments_loses_and_doubles_nothing(
    database_url: str, tmp_path: Path
) -> None:
    """Every named point is passed in an undisturbed job: an order at one that nobody passes would prove nothing."""
    with ground(tmp_path, database_url) as opened:
        driver = Driver(opened)
        for variant in ("momentum", "record", "central", "secured", "distributed"):
            driver.undisturbed(variant)
        assert {point.name for point in POINTS.values() if not point.needs} - opened.passed() == set()
        for plan in PLANS:
            outcome = driver.run(plan)
            assert outcome.wrong == [], plan
            assert set(outcome.happened) == set(plan.steps), plan
            assert outcome.same_model is (True if plan.variant in EXACT else None)
        assert driver.finale() == []
