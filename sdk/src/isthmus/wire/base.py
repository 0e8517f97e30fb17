"""What every body of the contract has in common: requests are closed, responses are open, numbers are finite."""

import base64
import binascii
import hashlib
import json
import re
from typing import Annotated, Any, Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 as 64 lower-case hexadecimal digits."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$")]
"""A name as used in addresses: 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or digit."""

Label = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")
]
"""A line of text for people."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=4000, pattern=r"^[^\x00]*$")]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """What a client sends. An unknown field is a mistake and is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Response(BaseModel):
    """What the service answers. An unknown field is a newer service's and is skipped."""

    model_config = ConfigDict(extra="ignore", frozen=True, from_attributes=True)


Item = TypeVar("Item")


class Page(Response, Generic[Item]):
    """One page of a list. Give `next_cursor` as `cursor` to read on; None means that this was the last page."""

    items: list[Item]
    next_cursor: str | None


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for a JSON value: keys sorted, no white space, UTF-8, no NaN.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON has no words for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: BaseModel | dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a body, in hexadecimal: what job specs and policies are named by."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(canonical_json(plain)).hexdigest()


_REPR_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:;[^,]*)?(?=,|$)")


def format_repr_digest(digest: str) -> str:
    """A hexadecimal SHA-256 as the value of a `Repr-Digest` header. Source: RFC 9530, section 3."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"


def parse_repr_digest(value: str) -> str:
    """The hexadecimal SHA-256 in a `Repr-Digest` header.

    Raises:
        ValueError: the header names no well-formed sha-256 digest.
    """
    found = _REPR_DIGEST.search(value)
    if found is None:
        raise ValueError("Repr-Digest must carry sha-256=:<base64 of 32 bytes>:")
    try:
        return base64.b64decode(found.group(1), validate=True).hex()
    except binascii.Error as error:
        raise ValueError("Repr-Digest is not valid base64") from error
