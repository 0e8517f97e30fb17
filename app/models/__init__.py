"""The schema: one file a table, and every table imported here so that the metadata is whole."""

from app.models.api_key import ApiKey
from app.models.base import Base, uuid7
from app.models.checkpoint import Checkpoint
from app.models.dataset import Dataset
from app.models.discarded_blob import DiscardedBlob
from app.models.enrollment_token import EnrollmentToken
from app.models.event import Event, EventStream
from app.models.grant import Grant
from app.models.idempotency_key import IdempotencyKey
from app.models.job import Job
from app.models.ledger import Ledger
from app.models.ledger_entry import LedgerEntry
from app.models.lineage import Lineage
from app.models.organization import Organization
from app.models.participation import Participation
from app.models.principal import Principal
from app.models.round import Round
from app.models.secured_attempt import SecuredAttempt
from app.models.secured_member import SecuredMember
from app.models.task import Task
from app.models.update import Update
from app.models.worker import Worker

__all__ = [
    "ApiKey", "Base", "Checkpoint", "Dataset", "DiscardedBlob", "EnrollmentToken", "Event", "EventStream", "Grant",
    "IdempotencyKey", "Job", "Ledger", "LedgerEntry", "Lineage", "Organization", "Participation", "Principal", "Round",
    "SecuredAttempt", "SecuredMember", "Task", "Update", "Worker", "uuid7",
]  # fmt: skip
