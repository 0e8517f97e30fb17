"""Principals and their keys: who gets which, how they are replaced, and how they end."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import product
from uuid import UUID

import pytest

from app.errors import StateConflict
from isthmus.client import Client, Refused
from isthmus.wire.organizations import (
    ROLE_SCOPES,
    ApiKeyIssued,
    CreateApiKey,
    CreatePrincipal,
    Role,
    RotateApiKey,
    Scope,
)
from isthmus.wire.problems import ProblemCode
from tests.running import Platform, first_admin, missing_id, refused

HUMANS = (Role.ADMIN, Role.RESEARCHER, Role.STEWARD)


def somebody(platform: Platform, role: Role) -> Client:
    """A client of a new principal with the role."""
    organization = platform.organization() if role in (Role.STEWARD, Role.WORKER) else None
    if role is Role.WORKER:
        assert organization is not None
        return platform.worker(organization)
    return platform.client_of(platform.principal(role, organization))


def key_of(client: Client) -> str:
    return client.me().key_id


# --- Principals ---


@pytest.mark.parametrize("role", list(Role))
def test_everybody_is_told_who_they_are(platform: Platform, role: Role) -> None:
    me = somebody(platform, role).me()

    assert me.principal.role is role
    assert set(me.scopes) == ROLE_SCOPES[role]
    assert (me.organization is not None) == (role in (Role.STEWARD, Role.WORKER))
    assert (me.worker_id is not None) == (role is Role.WORKER)


def test_names_of_principals_are_given_once(platform: Platform) -> None:
    platform.principal(Role.RESEARCHER, name="ada")

    with refused(ProblemCode.NAME_TAKEN):
        platform.principal(Role.ADMIN, name="ada")


@pytest.mark.parametrize(
    "name", ["service", "worker:clinic/agent", "Ada", "ada\x00", "", "a" * 64, "../ada", "ada lovelace"]
)
def test_a_principal_cannot_take_the_name_of_the_service_or_of_a_worker(platform: Platform, name: str) -> None:
    body = {"name": name, "display_name": "x", "role": "researcher"}

    answer = platform.http(platform.admin).post("/v1/principals", json=body)

    assert answer.status_code in (409, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_workers_are_not_created_as_principals(platform: Platform) -> None:
    organization = platform.organization()
    body = {"name": "x", "display_name": "x", "role": "worker", "organization_id": str(organization.id)}

    assert platform.http(platform.admin).post("/v1/principals", json=body).status_code == 422


def test_a_steward_needs_an_organization_that_exists(platform: Platform) -> None:
    body = CreatePrincipal(name="sam", display_name="Sam", role=Role.STEWARD, organization_id=missing_id())

    with refused(ProblemCode.NOT_FOUND):
        platform.admin.principals.create(body)


def test_a_disabled_principal_is_shut_out_with_all_its_keys(platform: Platform) -> None:
    principal = platform.principal(Role.RESEARCHER)
    clients = [platform.client_of(principal) for _ in range(2)]

    disabled = platform.admin.principals.disable(principal.id)
    assert disabled.disabled_at is not None
    assert platform.admin.principals.disable(principal.id) == disabled

    for client in clients:
        with refused(ProblemCode.KEY_REVOKED):
            client.me()
    with refused(ProblemCode.STATE_CONFLICT):
        platform.client_of(principal)


def test_a_worker_that_is_disabled_as_a_principal_is_revoked(platform: Platform) -> None:
    organization = platform.organization()
    worker = platform.worker(organization)
    me = worker.me()
    assert me.worker_id is not None

    platform.admin.principals.disable(me.principal.id)

    assert platform.admin.workers.get(me.worker_id).revoked_at is not None
    with refused(ProblemCode.KEY_REVOKED):
        worker.me()


def test_the_last_admin_cannot_be_disabled(platform: Platform) -> None:
    with refused(ProblemCode.STATE_CONFLICT):
        platform.admin.principals.disable(platform.admin.me().principal.id)


def test_two_admins_that_disable_each_other_at_once_leave_one(platform: Platform) -> None:
    other = somebody(platform, Role.ADMIN)
    ids = [platform.admin.me().principal.id, other.me().principal.id]

    def disable(client: Client, other_id: UUID) -> bool:
        try:
            client.principals.disable(other_id)
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(disable, [platform.admin, other], reversed(ids)))

    assert platform.execute("SELECT count(*) FROM principals WHERE role = 'admin' AND disabled_at IS NULL") == [(1,)]


def test_the_first_admin_is_made_once(platform: Platform) -> None:
    with pytest.raises(StateConflict):
        first_admin(platform.database_url)


def test_an_admin_without_a_live_key_gets_a_new_one_where_the_service_runs(platform: Platform) -> None:
    before = platform.admin.me()
    platform.admin.keys.revoke(before.key_id)

    after = platform.client(first_admin(platform.database_url)).me()

    assert after.principal == before.principal
    assert after.key_id != before.key_id


# --- Issuing ---


def test_only_a_hash_of_a_key_is_kept(platform: Platform) -> None:
    issued = platform.admin.keys.create(CreateApiKey(label="second"), idempotency_key="one")
    secret = issued.key.removeprefix(f"isk_{issued.id}_")[:-6]

    assert len(secret) == 43
    for (table,) in platform.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        found = [row for row in platform.execute(f'SELECT t::text FROM "{table}" t') if secret in row[0]]
        assert found == [], table
    with refused(ProblemCode.SECRET_SHOWN_ONCE):
        platform.admin.keys.create(CreateApiKey(label="second"), idempotency_key="one")
    assert not hasattr(next(platform.admin.keys.list()), "key")


@pytest.mark.parametrize("role", HUMANS)
def test_people_issue_further_keys_of_their_own(platform: Platform, role: Role) -> None:
    client = somebody(platform, role)
    narrow = min(ROLE_SCOPES[role])

    issued = client.keys.create(CreateApiKey(label="second", scopes=(narrow,), expires_in_s=600))

    second = platform.client(issued.key).me()
    assert second.principal == client.me().principal
    assert second.scopes == [narrow]
    assert issued.expires_at is not None
    assert issued.expires_at - issued.created_at == timedelta(seconds=600)


@pytest.mark.parametrize("role", list(Role))
def test_no_scope_goes_beyond_the_role(platform: Platform, role: Role) -> None:
    principal = somebody(platform, role).me().principal

    for scope in Scope:
        body = CreateApiKey(principal_id=principal.id, scopes=(scope,))
        if scope in ROLE_SCOPES[role]:
            assert platform.admin.keys.create(body).scopes == [scope]
        else:
            with refused(ProblemCode.INVALID_REQUEST):
                platform.admin.keys.create(body)


def test_a_key_gives_no_more_than_it_has(platform: Platform) -> None:
    principal = platform.principal(Role.RESEARCHER)
    narrow = platform.client_of(principal, scopes=[Scope.JOBS_READ])

    for scopes in [(Scope.JOBS_WRITE,), (Scope.JOBS_READ, Scope.JOBS_WRITE), (Scope.PLATFORM,)]:
        with refused(ProblemCode.FORBIDDEN):
            narrow.keys.create(CreateApiKey(scopes=scopes))
        with refused(ProblemCode.FORBIDDEN):
            narrow.keys.create(CreateApiKey(principal_id=principal.id, scopes=scopes))

    assert narrow.keys.create().scopes == [Scope.JOBS_READ]


def test_a_key_gives_none_that_outlives_it(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    brief = client.keys.create(CreateApiKey(expires_in_s=600))
    holder = platform.client(brief.key)

    with refused(ProblemCode.FORBIDDEN):
        holder.keys.create(CreateApiKey(expires_in_s=3600))

    assert holder.keys.create().expires_at == brief.expires_at
    shorter = holder.keys.create(CreateApiKey(expires_in_s=60)).expires_at
    assert shorter is not None
    assert brief.expires_at is not None
    assert shorter < brief.expires_at


def test_nobody_but_an_admin_gets_keys_for_others(platform: Platform) -> None:
    admin_id = platform.admin.me().principal.id

    for role, principal_id in product((Role.RESEARCHER, Role.STEWARD), (admin_id, missing_id())):
        with refused(ProblemCode.NOT_FOUND):
            somebody(platform, role).keys.create(CreateApiKey(principal_id=principal_id))


def test_an_admin_key_without_the_platform_scope_is_no_admin(platform: Platform) -> None:
    reader = platform.client(platform.admin.keys.create(CreateApiKey(scopes=(Scope.JOBS_READ,))).key)
    other = platform.principal(Role.RESEARCHER)

    with refused(ProblemCode.NOT_FOUND):
        reader.keys.create(CreateApiKey(principal_id=other.id))
    with refused(ProblemCode.FORBIDDEN):
        reader.principals.page()
    with refused(ProblemCode.FORBIDDEN):
        reader.organizations.page()
    assert {key.principal_id for key in reader.keys.list()} == {reader.me().principal.id}


def test_a_worker_issues_no_keys(platform: Platform) -> None:
    with refused(ProblemCode.FORBIDDEN):
        somebody(platform, Role.WORKER).keys.create()


def test_keys_are_listed_to_their_holder_and_to_admins(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    principal_id = client.me().principal.id

    own = list(client.keys.list())
    assert [key.id for key in own] == [key_of(client)]
    assert [key.id for key in client.keys.list(principal_id=principal_id)] == [key_of(client)]
    assert [key.id for key in platform.admin.keys.list(principal_id=principal_id)] == [key_of(client)]
    assert {key_of(client), key_of(platform.admin)} <= {key.id for key in platform.admin.keys.list()}
    for other in (platform.admin.me().principal.id, missing_id()):
        with refused(ProblemCode.NOT_FOUND):
            client.keys.page(principal_id=other)


def test_keys_are_listed_in_pages_without_gaps(platform: Platform) -> None:
    issued = {platform.admin.keys.create().id for _ in range(5)}

    seen, cursor = [], None
    while True:
        page = platform.admin.keys.page(limit=2, cursor=cursor)
        seen += [key.id for key in page.items]
        if (cursor := page.next_cursor) is None:
            break

    assert len(seen) == len(set(seen)) == 6
    assert issued < set(seen)


# --- Presenting ---


def test_an_expired_key_is_refused_as_expired(platform: Platform) -> None:
    issued = platform.admin.keys.create(CreateApiKey(expires_in_s=60))
    platform.execute("UPDATE api_keys SET expires_at = clock_timestamp() WHERE id = %s", [issued.id])

    with refused(ProblemCode.KEY_EXPIRED) as refusal:
        platform.client(issued.key).me()
    assert refusal[0].status == 401


@pytest.mark.parametrize("change", ["x", "isk_", "secret", "id", "checksum", "nul", "long", "other"])
def test_a_key_that_was_not_issued_is_refused_without_a_hint(platform: Platform, change: str) -> None:
    key = platform.keys[platform.admin]
    presented = {
        "x": "x",
        "isk_": "isk_",
        "secret": key[:25] + ("a" if key[25] != "a" else "b") + key[26:],
        "id": "isk_" + ("a" if key[4] != "a" else "b") + key[5:],
        "checksum": key[:-1] + ("a" if key[-1] != "a" else "b"),
        "nul": key[:-1] + "\\x00",
        "long": key * 50,
        "other": f"isk_{'0' * 16}_{'0' * 49}",
    }[change]

    answer = platform.http().get("/v1/me", headers={"Authorization": f"Bearer {presented}"})

    assert answer.status_code == 401
    assert answer.json()["code"] == "unauthenticated"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_secret_for_a_known_id_is_refused(platform: Platform) -> None:
    one, other = platform.admin.keys.create(), platform.admin.keys.create()
    platform.execute("UPDATE api_keys SET secret_hash = sha256('') WHERE id = %s", [one.id])

    with refused(ProblemCode.UNAUTHENTICATED):
        platform.client(one.key).me()
    platform.client(other.key).me()


def test_the_last_use_of_a_key_is_noted(platform: Platform) -> None:
    issued = platform.admin.keys.create()
    assert issued.last_used_at is None

    platform.client(issued.key).me()

    noted = next(key for key in platform.admin.keys.list() if key.id == issued.id)
    assert noted.last_used_at is not None


# --- Rotating and revoking ---


def rotate(client: Client, key_id: str, overlap_s: int = 600) -> ApiKeyIssued:
    return client.keys.rotate(key_id, RotateApiKey(overlap_s=overlap_s))


@pytest.mark.parametrize("role", list(Role))
def test_everybody_rotates_their_own_key(platform: Platform, role: Role) -> None:
    client = somebody(platform, role)
    before = next(client.keys.list(principal_id=client.me().principal.id))

    issued = rotate(client, before.id)

    assert (issued.label, issued.scopes, issued.principal_id) == (before.label, before.scopes, before.principal_id)
    assert platform.client(issued.key).me().principal == client.me().principal
    ends = {key.id: key.expires_at for key in client.keys.list()}
    assert ends[issued.id] is None
    old = ends[before.id]
    assert old is not None
    assert timedelta(seconds=590) < old - datetime.now(UTC) <= timedelta(seconds=600)


def test_without_overlap_the_old_key_ends_at_once(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)

    issued = rotate(client, key_of(client), overlap_s=0)

    with refused(ProblemCode.KEY_EXPIRED):
        client.me()
    platform.client(issued.key).me()


def test_rotating_makes_nothing_live_longer(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    brief = client.keys.create(CreateApiKey(expires_in_s=300))
    holder = platform.client(brief.key)

    issued = rotate(holder, brief.id, overlap_s=86400)

    ends = {key.id: key.expires_at for key in client.keys.list()}
    assert ends[brief.id] == ends[issued.id] == brief.expires_at


def test_rotated_by_an_admin_a_key_gets_its_lifetime_anew(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    brief = client.keys.create(CreateApiKey(expires_in_s=300))
    platform.execute("UPDATE api_keys SET created_at = created_at - interval '100 seconds' WHERE id = %s", [brief.id])

    issued = rotate(platform.admin, brief.id)

    assert issued.expires_at is not None
    assert issued.expires_at - issued.created_at == timedelta(seconds=400)


def test_at_most_two_keys_of_a_rotation_live(platform: Platform) -> None:
    first = somebody(platform, Role.WORKER)
    second = platform.client(rotate(first, key_of(first)).key)
    third = platform.client(rotate(second, key_of(second)).key)

    with refused(ProblemCode.KEY_EXPIRED):
        first.me()
    second.me()
    third.me()


def test_a_rotation_whose_answer_was_lost_can_be_repeated(platform: Platform) -> None:
    client = somebody(platform, Role.WORKER)
    lost = platform.client(rotate(client, key_of(client)).key)

    found = platform.client(rotate(client, key_of(client)).key)

    with refused(ProblemCode.KEY_REVOKED):
        lost.me()
    found.me()
    client.me()


def test_a_key_whose_successor_is_in_use_is_not_rotated_again(platform: Platform) -> None:
    client = somebody(platform, Role.WORKER)
    platform.client(rotate(client, key_of(client)).key).me()

    with refused(ProblemCode.STATE_CONFLICT):
        rotate(client, key_of(client))


def test_a_key_that_is_rotated_many_times_at_once_has_one_live_successor(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    key_id = key_of(client)

    with ThreadPoolExecutor(4) as pool:
        issued = list(pool.map(lambda _: rotate(client, key_id), range(4)))

    assert len({key.id for key in issued}) == 4
    live = "SELECT count(*) FROM api_keys WHERE replaces_id = %s AND revoked_at IS NULL"
    assert platform.execute(live, [key_id]) == [(1,)]


def test_a_narrow_key_does_not_rotate_or_revoke_a_wide_one(platform: Platform) -> None:
    principal = platform.principal(Role.RESEARCHER)
    wide, narrow = platform.client_of(principal), platform.client_of(principal, scopes=[Scope.JOBS_READ])

    with refused(ProblemCode.FORBIDDEN):
        rotate(narrow, key_of(wide))
    with refused(ProblemCode.FORBIDDEN):
        narrow.keys.revoke(key_of(wide))
    wide.keys.revoke(key_of(narrow))


def test_a_revoked_key_is_refused_and_not_rotated(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    other = client.keys.create()

    revoked = client.keys.revoke(other.id)
    assert revoked.revoked_at is not None
    assert client.keys.revoke(other.id) == revoked

    with refused(ProblemCode.KEY_REVOKED):
        platform.client(other.key).me()
    with refused(ProblemCode.STATE_CONFLICT):
        rotate(client, other.id)


def test_keys_of_others_and_missing_keys_answer_alike(platform: Platform) -> None:
    client = somebody(platform, Role.RESEARCHER)
    admin_key = key_of(platform.admin)

    answers = set()
    for key_id in (admin_key, "0" * 16):
        for act in (lambda key_id: rotate(client, key_id), client.keys.revoke):
            with refused(ProblemCode.NOT_FOUND) as refusal:
                act(key_id)
            answers.add(refusal[0].detail.replace(key_id, "<id>"))

    assert len(answers) == 1
    platform.admin.me()
