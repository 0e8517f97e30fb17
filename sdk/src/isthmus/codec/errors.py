"""The refusals of the codec. Each carries the problem code under which the service answers it."""

from typing import ClassVar

from isthmus.wire.problems import ProblemCode


class CodecError(ValueError):
    """Bytes that are not what they should be. The message is a sentence that may be shown to whoever sent them."""

    code: ClassVar[ProblemCode] = ProblemCode.NOT_SAFETENSORS


class NotSafetensors(CodecError):
    """The bytes are not well-formed safetensors, or go beyond our limits."""

    code = ProblemCode.NOT_SAFETENSORS


class TensorsMismatch(CodecError):
    """Well-formed, but the tensors are not those of the manifest: another name, element type or shape."""

    code = ProblemCode.TENSORS_MISMATCH


class NonFinite(CodecError):
    """A tensor of floats holds NaN or an infinity."""

    code = ProblemCode.NON_FINITE


class LengthMismatch(CodecError):
    """The bytes are fewer or more than was declared."""

    code = ProblemCode.LENGTH_MISMATCH


def shown(name: str, limit: int = 80) -> str:
    """A tensor's name as error messages show it: quoted, escaped, and cut if it is long."""
    return ascii(name if len(name) <= limit else name[:limit] + "…")
