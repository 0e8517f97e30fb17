"""What a job promises, to whom, and what it spent: as JSON, and as a page that loads nothing."""

import base64
import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any

import pytest

from app.jobs import references
from app.jobs.privacy_page import page_of
from isthmus.client import Client
from isthmus.privacy.events import PoissonGaussianRelease, Repeated
from isthmus.privacy.explaining import NO_CLAIM
from isthmus.privacy.planning import grant_event
from isthmus.privacy.reporting import analytic_gaussian_epsilon, rdp_epsilon_reference
from isthmus.wire.jobs import JobSpec, JobState, JobView
from isthmus.wire.privacy import PrivacyReport
from isthmus.wire.problems import ProblemCode
from tests.federation import (
    BY_HAND,
    CENTRAL,
    LOCAL,
    RECORD,
    UNIFORM,
    Federation,
    filled,
    initial,
    job_spec,
    measured,
)
from tests.running import missing_id, refused
from tests.standing import _standing, standing

__all__ = ["_standing", "standing"]

MakeFederation = Callable[..., Federation]
SMALL = {"optimizer": {"sgd": {"lr": 0.1}}, "batch_size": 20}


def one_round(federation: Federation) -> None:
    """Every site hands in its part of the open round."""
    for site in federation.sites:
        offer = site.claim()
        site.hand_in(offer, {**initial(), **measured(offer)})


def finished(federation: Federation, spec: JobSpec) -> JobView:
    """A job of which every site released everything."""
    job = federation.start(spec)
    for _ in range(spec.rounds):
        one_round(federation)
    done = federation.finish(job)
    assert done.state is JobState.COMPLETED, done.detail
    return done


# --- The figures ------------------------------------------------------------------------------------------------------


def test_records_are_told_what_the_job_may_cost_and_what_it_has(standing: Federation) -> None:
    spec = job_spec(privacy={**RECORD, "max_orgs_per_person": 3}, rounds=2, training=SMALL)
    job = standing.start(spec)
    before = standing.researcher.jobs.privacy(job.id)
    one_round(standing)
    standing.until(lambda: standing.job(job).rounds_completed == 1)
    between = standing.researcher.jobs.privacy(job.id)
    one_round(standing)
    assert standing.finish(job).state is JobState.COMPLETED
    after = standing.researcher.jobs.privacy(job.id)

    assert [(item.organization, item.dataset, item.declared_rows) for item in before.datasets] == [
        (f"clinic-0{number}", "heart", 100) for number in range(3)
    ]
    for item in before.datasets:
        assert item.plan is not None
        assert (item.epsilon_spent, item.rounds_released, item.releases) == (0.0, 0, 0)
        assert item.epsilon_person == 3 * item.plan.epsilon
    for item in between.datasets:
        assert (item.rounds_released, item.releases) == (1, 1)
        assert item.epsilon_spent == pytest.approx(sampled(spec, 5), rel=0.02)
    for item in after.datasets:
        assert item.plan is not None
        assert (item.rounds_released, item.releases, item.epsilon_spent) == (2, 2, item.plan.epsilon)
        assert item.epsilon_spent == pytest.approx(sampled(spec, 10), rel=0.02)
        assert item.epsilon_reference is not None
        assert 0.8 * item.epsilon_spent < item.epsilon_reference < item.epsilon_spent


def sampled(spec: JobSpec, steps: int) -> float:
    """Epsilon of so many steps over 100 records in batches of 20, by another accountant."""
    noise = spec.privacy.noise_multiplier
    assert noise is not None
    return rdp_epsilon_reference(Repeated(PoissonGaussianRelease(0.2, noise), steps), 1e-5)


def test_what_is_told_under_central_noise_is_the_claim_and_not_the_ledger_s_figure(standing: Federation) -> None:
    before = [budget(standing, number) for number in range(3)]
    spec = job_spec(privacy={**CENTRAL, "delta": 1e-5}, strategy=UNIFORM, rounds=4)

    report = standing.researcher.jobs.privacy(finished(standing, spec).id)

    exact = analytic_gaussian_epsilon(4.0 / 4**0.5, 1e-5)
    for number, item in enumerate(report.datasets):
        assert item.plan is not None
        assert item.epsilon_spent == item.plan.epsilon
        assert item.epsilon_reference == pytest.approx(exact, rel=1e-3)
        assert exact < item.epsilon_spent < 1.15 * exact
        assert budget(standing, number) - before[number] > item.epsilon_spent / 2
    assert "twice the sensitivity" in report.accountant
    entries = list(standing.sites[0].steward.datasets.ledger(standing.sites[0].dataset.id))
    ours = [entry for entry in entries if entry.job_id == report.job_id and entry.kind == "spend"]
    assert [entry.event and entry.event["sensitivity"] for entry in ours] == [2.0] * 4


def budget(federation: Federation, number: int) -> float:
    """What a site's budget says is spent."""
    site = federation.sites[number]
    found = site.steward.datasets.get(site.dataset.id).budget
    assert found is not None
    return found.spent_epsilon


def test_without_a_claim_nothing_is_promised_and_the_page_says_so_in_red(standing: Federation) -> None:
    job = finished(standing, job_spec())

    report = standing.researcher.jobs.privacy(job.id)
    page = standing.researcher.jobs.privacy_page(job.id)

    assert report.guarantee.startswith(NO_CLAIM)
    for item in report.datasets:
        assert (item.plan, item.epsilon_spent, item.epsilon_person, item.epsilon_reference) == (None, None, None, None)
        assert (item.rounds_released, item.releases) == (1, 1)
    (style,) = re.findall(r"\.none {([^}]*)}", page)
    assert "color: #b00020" in style
    assert f'<p class="none">{NO_CLAIM}' in page
    assert "epsilon" not in page.partition("</style>")[2].lower()


def test_a_draft_has_its_words_and_no_dataset_yet(standing: Federation) -> None:
    job = standing.draft(job_spec(privacy=LOCAL, strategy=UNIFORM))

    report = standing.researcher.jobs.privacy(job.id)

    assert (report.datasets, report.unit, report.where) == ([], "organization", "local")
    assert "No dataset was asked yet." in standing.researcher.jobs.privacy_page(job.id)


def test_a_plan_that_promises_next_to_nothing_has_no_second_opinion(standing: Federation) -> None:
    job = standing.start(job_spec(privacy={**LOCAL, "noise_multiplier": 0.2}, strategy=UNIFORM))

    for item in standing.researcher.jobs.privacy(job.id).datasets:
        assert item.plan is not None
        assert item.plan.epsilon > 20
        assert item.epsilon_reference is None


def test_nothing_of_an_update_that_only_the_service_may_see_is_told_to_anybody_else(standing: Federation) -> None:
    """Training is a function of the records: who suspects what they are could try out its digest, or its norm."""
    job = standing.start(job_spec(privacy=CENTRAL, strategy=UNIFORM))
    sent = []
    for number, site in enumerate(standing.sites):
        sent.append(site.hand_in(site.claim(), filled(0.01 * (1 + number))).digest)
    assert standing.finish(job).state is JobState.COMPLETED

    own = standing.sites[0].steward
    for client, known in ((standing.researcher, []), (own, sent[:1]), (standing.platform.admin, sent)):
        http = standing.platform.http(client)
        told = "".join(
            http.get(f"/v1/jobs/{job.id}{path}").text
            for path in ("", "/rounds", "/rounds/1", "/metrics", "/participations", "/privacy")
        )
        assert [digest for digest in sent if digest in told] == known
        norms = [update.l2_norm for update in client.jobs.round(job.id, 1).updates]
        assert norms == (
            [None] * 3 if client is standing.researcher else [pytest.approx(n) for n in NORMS[: len(known)]]
        )
        story = http.get(f"/v1/jobs/{job.id}/events").text
        assert not [digest for digest in sent if digest in story]
    assert "update-accepted" in story
    assert "round-frozen" in story


NORMS = [6**0.5 * 0.01 * (1 + number) for number in range(3)]


# --- Who sees what ----------------------------------------------------------------------------------------------------


def test_a_steward_sees_its_own_dataset_s_part_and_strangers_see_nothing(standing: Federation) -> None:
    job = standing.start(job_spec(privacy=RECORD))
    whole = standing.researcher.jobs.privacy(job.id)
    site = standing.sites[1]

    own = site.steward.jobs.privacy(job.id)

    assert [item.organization for item in whole.datasets] == ["clinic-00", "clinic-01", "clinic-02"]
    assert own == whole.model_copy(update={"datasets": whole.datasets[1:2]})
    assert "clinic-00" not in site.steward.jobs.privacy_page(job.id)
    assert standing.platform.admin.jobs.privacy(job.id) == whole
    for stranger in (standing.platform.researcher(), standing.platform.steward(standing.platform.organization())):
        for ask in (stranger.jobs.privacy, stranger.jobs.privacy_page):
            with refused(ProblemCode.NOT_FOUND):
                ask(job.id)
    with refused(ProblemCode.NOT_FOUND):
        standing.researcher.jobs.privacy(missing_id())
    with refused(ProblemCode.FORBIDDEN):
        site.worker.jobs.privacy(job.id)


def test_a_dataset_that_was_only_asked_has_a_plan_and_spent_nothing(make_federation: MakeFederation) -> None:
    federation = make_federation(policy=BY_HAND, sites=2)
    job = federation.start(job_spec(privacy=RECORD))

    for item in federation.researcher.jobs.privacy(job.id).datasets:
        assert item.state == "pending"
        assert item.plan is not None
        assert item.epsilon_spent == 0.0


# --- The page ---------------------------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """What a page would load, run or send, and whether its tags fit each other."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "form", "a", "base"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "style") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_browsers_run_nothing_on_it(standing: Federation) -> None:
    job = standing.start(job_spec(privacy=RECORD))

    answer = standing.platform.http(standing.researcher).get(
        f"/v1/jobs/{job.id}/privacy", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    )

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "Accept"
    loaded = Loaded(answer.text)
    assert (loaded.found, loaded.open) == ([], [])
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"default-src 'none'; style-src 'sha256-{digest}';" in policy
    report = standing.researcher.jobs.privacy(job.id)
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", answer.text))
    for sentence in (report.guarantee, report.mechanism, *report.assumptions, *report.not_protected, *report.released):
        assert sentence.replace("'", "&#x27;") in text


def test_names_on_the_page_are_text(standing: Federation) -> None:
    job = standing.start(job_spec(privacy=RECORD))
    report = standing.researcher.jobs.privacy(job.id)
    hostile = '<script src="//evil">&'

    page = page_of(
        report.model_copy(
            update={
                "job": hostile,
                "guarantee": hostile,
                "not_protected": [hostile],
                "datasets": [report.datasets[0].model_copy(update={"organization": hostile, "state": hostile})],
            }
        )
    )

    assert Loaded(page).found == []
    assert page.count("&lt;script src=&quot;//evil&quot;&gt;&amp;") == 7


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.00000001, "1.001"), (2.9999, "3"), (3.0, "3"), (0.0, "0"), (0.012345, "0.01235"), (1e6, "1e+06")],
)
def test_an_epsilon_is_never_shown_below_what_it_is(standing: Federation, value: float, shown: str) -> None:
    job = standing.start(job_spec(privacy=RECORD))
    report = standing.researcher.jobs.privacy(job.id)
    item = report.datasets[0].model_copy(update={"epsilon_spent": value})

    page = page_of(report.model_copy(update={"datasets": [item]}))

    assert f'<td class="number">{shown}</td>' in page


# --- The second opinion -----------------------------------------------------------------------------------------------


class Accountant:
    """One that answers when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked: list[Any] = []

    def __call__(self, event: Any, delta: float) -> float:
        self.asked.append((event, delta))
        assert self.go.wait(30)
        return 1.25


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Accountant:
    """An accountant that takes as long as the test wants it to."""
    accountant = Accountant()
    monkeypatch.setattr(references, "pld_epsilon", accountant)
    monkeypatch.setattr("app.jobs.privacy.references", references.References())
    return accountant


def test_a_figure_that_takes_long_holds_up_nobody_and_is_computed_once(standing: Federation, slow: Accountant) -> None:
    job = standing.start(job_spec(privacy=RECORD))

    def ask(client: Client) -> PrivacyReport:
        return client.jobs.privacy(job.id)

    with ThreadPoolExecutor(2) as pool:
        try:
            asking = [pool.submit(ask, client) for client in (standing.researcher, standing.platform.admin)]
            standing.until(lambda: slow.asked)
            assert standing.job(job).state is JobState.RUNNING, "the service answers meanwhile"
            assert all(item.epsilon_reference is None for each in asking for item in each.result().datasets)
        finally:
            slow.go.set()

    def known() -> bool:
        return all(item.epsilon_reference == 1.25 for item in ask(standing.researcher).datasets)

    standing.until(known)
    view = standing.job(job)
    plan = ask(standing.researcher).datasets[0].plan
    assert plan is not None
    assert view.manifest is not None
    assert slow.asked == [(grant_event(view.spec, plan, view.manifest.averaged_elements, 1), 1e-5)]


@pytest.mark.parametrize("failure", [OverflowError(), KeyError("an error that nobody foresaw")])
def test_an_accountant_that_fails_leaves_a_gap_and_answers_the_next(
    standing: Federation, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def failing(event: Any, delta: float) -> float:
        if delta == 1e-5:
            raise failure
        return 0.5

    monkeypatch.setattr(references, "pld_epsilon", failing)
    monkeypatch.setattr("app.jobs.privacy.references", references.References())
    one, other = (standing.start(job_spec(privacy={**RECORD, "delta": delta})) for delta in (1e-5, 1e-6))

    assert {item.epsilon_reference for item in standing.researcher.jobs.privacy(one.id).datasets} == {None}
    assert {item.epsilon_reference for item in standing.researcher.jobs.privacy(other.id).datasets} == {0.5}
