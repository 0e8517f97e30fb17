"""Why a task cannot be done, in words that may be sent to the service: they name columns, never a count or a value.

Under privacy of records even that is too much: whether there is a reason may hang on one record, and who chooses the
job chooses the question. So no record is a reason there (see `isthmus_worker.features`): what is refused is refused for
what is public already (`SchemaRefused`, `ModelRefused`), and whatever breaks all the same is told as `UNTOLD`. That it
broke is still one bit about the records; that it does not hang on a single one of them is assumed, not proven.
"""

from typing import Final

UNTOLD: Final = "The task could not be done here; the worker's own log says why."
"""All that the service hears of work that broke under privacy of records."""


class _Told(Exception):
    """The message goes to the service. `where` stays here, in the log: a file and a line, but no value either.

    `records` is how many records are concerned. Jobs that differ by a category or a share would read records out of
    such numbers, one by one: they stay in the log, unless the policy lets exact statistics leave.
    """

    def __init__(self, reason: str, *, where: str = "", records: int | None = None) -> None:
        super().__init__(reason)
        self._where = where
        self.records = records

    @property
    def where(self) -> str:
        """For the log of this worker."""
        return "; ".join(filter(None, (self._where, self._count())))

    def told(self, counts: bool) -> str:
        """What the service hears; with the number of records only if `counts`."""
        return f"{self} ({self._count()})" if counts and self.records is not None else str(self)

    def _count(self) -> str:
        return "" if self.records is None else f"records: {self.records}"


class DataRefused(_Told):
    """The data cannot serve what is asked: that will not change within the round."""


class SchemaRefused(DataRefused):
    """The same, whatever the records hold: columns, their kinds or the declared number of records do not fit."""


class ModelRefused(_Told):
    """The model cannot be built or trained here, whatever the records hold."""


class WorkBroken(_Told):
    """It was begun and went wrong."""
