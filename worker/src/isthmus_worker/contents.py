"""What stands for a dataset's content, so that the same records keep their budget under any name. Runs in the child."""

from isthmus_worker.data import CsvSource, readable, stamp_of
from isthmus_worker.files import digest_of_file
from isthmus_worker.likeness import sketch_of
from isthmus_worker.messages import Content
from isthmus_worker.settings import CsvSettings, NpzSettings, SourceSettings


def content_of(settings: SourceSettings, known: str | None) -> Content | None:
    """What stands for the content of a file; None where there is no file, or where it has not changed since.

    Args:
        settings: where the records come from.
        known: the stamp of the file when its content was taken last, if it was.

    Raises:
        DataRefused: the file cannot be read.

    A CSV file is read once more than describing it takes, and an edited copy of it is known again by its records. Of
    an archive of arrays only the very file is. What an organization's own function reads is known by the function.
    """
    if not isinstance(settings, CsvSettings | NpzSettings):
        return None
    stamp = stamp_of(settings.path)
    if stamp == known:
        return None
    with readable(settings.path):
        digest, _size = digest_of_file(settings.path)
    sketch = sketch_of(CsvSource(settings).load([]).fingerprints) if isinstance(settings, CsvSettings) else None
    return Content(stamp=stamp, digest=digest, sketch=sketch)
