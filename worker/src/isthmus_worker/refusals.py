"""Why a task cannot be done, in words that may be sent to the service: they name columns and counts, never a value."""


class _Told(Exception):
    """The message goes to the service. `where` stays here, in the log: a file and a line, but no value either."""

    def __init__(self, reason: str, *, where: str = "") -> None:
        super().__init__(reason)
        self.where = where


class DataRefused(_Told):
    """The data cannot serve what is asked: that will not change within the round."""


class ModelRefused(_Told):
    """The model cannot be built here."""


class WorkBroken(_Told):
    """It was begun and went wrong."""
