"""Organizations, and the tokens with which their workers enrol."""

from isthmus.wire.organizations import CreateEnrollmentToken, CreateOrganization
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, introduction, missing_id, refused


def test_an_organization_is_read_as_it_was_created(platform: Platform) -> None:
    created = platform.admin.organizations.create(CreateOrganization(name="cleveland", display_name="Cleveland Clinic"))

    assert platform.admin.organizations.get(created.id) == created
    assert list(platform.admin.organizations.list()) == [created]
    assert (created.name, created.display_name) == ("cleveland", "Cleveland Clinic")


def test_a_name_is_given_once(platform: Platform) -> None:
    platform.organization("cleveland")

    with refused(ProblemCode.NAME_TAKEN):
        platform.organization("cleveland")


def test_organizations_are_listed_in_pages_without_gaps(platform: Platform) -> None:
    created = [platform.organization().id for _ in range(5)]

    seen, cursor = [], None
    while True:
        page = platform.admin.organizations.page(limit=2, cursor=cursor)
        assert len(page.items) <= 2
        seen += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break

    assert seen == created


def test_a_cursor_that_no_list_gave_out_is_refused(platform: Platform) -> None:
    for cursor in ("x", "bm90LWFuLWlk", "%00", "=" * 9, "AAAA"):
        with refused(ProblemCode.CURSOR_INVALID):
            platform.admin.organizations.page(cursor=cursor)


def test_a_page_has_bounds(platform: Platform) -> None:
    for limit in (0, -1, 501, 10**30):
        with refused(ProblemCode.INVALID_REQUEST):
            platform.admin.organizations.page(limit=limit)


def test_a_creation_repeated_with_its_key_is_done_once(platform: Platform) -> None:
    body = CreateOrganization(name="cleveland", display_name="Cleveland Clinic")

    first = platform.admin.organizations.create(body, idempotency_key="one")
    assert platform.admin.organizations.create(body, idempotency_key="one") == first

    assert len(list(platform.admin.organizations.list())) == 1
    with refused(ProblemCode.IDEMPOTENCY_CONFLICT) as refusal:
        platform.admin.organizations.create(body.model_copy(update={"name": "other"}), idempotency_key="one")
    assert refusal[0].status == 422


def test_a_creation_that_was_refused_may_be_repeated_with_its_key(platform: Platform) -> None:
    platform.organization("cleveland")
    taken = CreateOrganization(name="cleveland", display_name="x")

    with refused(ProblemCode.NAME_TAKEN):
        platform.admin.organizations.create(taken, idempotency_key="one")

    free = CreateOrganization(name="hungarian", display_name="x")
    assert platform.admin.organizations.create(free, idempotency_key="one").name == "hungarian"


def test_a_token_is_shown_once_and_kept_only_as_a_hash(platform: Platform) -> None:
    organization = platform.organization()
    issued = platform.admin.organizations.issue_enrollment_token(organization.id, idempotency_key="one")

    with refused(ProblemCode.SECRET_SHOWN_ONCE):
        platform.admin.organizations.issue_enrollment_token(organization.id, idempotency_key="one")

    secret = issued.token.removeprefix("iet_")
    for table in ("enrollment_tokens", "events", "idempotency_keys"):
        assert not [row for row in platform.execute(f"SELECT t::text FROM {table} t") if secret in row[0]]
    assert platform.execute("SELECT count(*) FROM enrollment_tokens") == [(1,)]


def test_a_steward_issues_tokens_for_the_own_organization_only(platform: Platform) -> None:
    own, foreign = platform.organization(), platform.organization()
    steward = platform.steward(own)

    token = steward.organizations.issue_enrollment_token(own.id, CreateEnrollmentToken(expires_in_s=60))
    assert token.organization == own.name
    assert platform.client().workers.enroll(introduction(token.token)).worker.organization_id == own.id

    answers = []
    for organization_id in (foreign.id, missing_id()):
        with refused(ProblemCode.NOT_FOUND) as refusal:
            steward.organizations.issue_enrollment_token(organization_id)
        answers.append(refusal[0].detail.replace(str(organization_id), "<id>"))
    assert answers[0] == answers[1]


def test_a_token_for_an_organization_that_is_missing_is_refused(platform: Platform) -> None:
    with refused(ProblemCode.NOT_FOUND):
        platform.admin.organizations.issue_enrollment_token(missing_id())
