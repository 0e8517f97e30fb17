"""The module of a job's model: from its layers, or from a function that the organization installed and allows."""

import importlib
from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray
from torch import nn

from isthmus.torch import build, build_holding, load_arrays
from isthmus.wire.models import ModelSpec
from isthmus_worker.refusals import ModelRefused


def loaded_module(spec: ModelSpec, allowed: Collection[str], arrays: Mapping[str, NDArray[Any]]) -> nn.Module:
    """The model as a torch module that holds `arrays`. It may move torch's generators.

    Raises:
        ModelRefused: as `module_of`.
        ArraysMisfit, UnsupportedTensor: the arrays are not those of the model.
    """
    if spec.entry_point is None:
        return build_holding(spec, arrays)
    module = module_of(spec, allowed)
    load_arrays(module, arrays)
    return module


def module_of(spec: ModelSpec, allowed: Collection[str]) -> nn.Module:
    """The model as a torch module.

    Raises:
        ModelRefused: its entry point is not allowed, not installed, or gives something else.
    """
    if spec.entry_point is None:
        return build(spec)
    if spec.entry_point not in allowed:
        raise ModelRefused(f"The entry point {spec.entry_point!r} is not allowed here.")
    package, _, name = spec.entry_point.partition(":")
    try:
        function = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError):
        raise ModelRefused(f"The entry point {spec.entry_point!r} is not installed here.") from None
    module = function(**spec.options)
    if not isinstance(module, nn.Module):
        raise ModelRefused(f"The entry point {spec.entry_point!r} gives no torch module.")
    return module
