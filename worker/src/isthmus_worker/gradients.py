"""Each record's own gradient, by the hooks of Opacus' GradSampleModule; and which models have none.

A model is refused where a record's gradient could depend on other records, or where something would leave the worker
that no noise covers. It is tried out on made-up records before it sees a real one, so that a refusal tells nothing.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isthmus_worker.refusals import ModelRefused

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> the loss of each record."""

MOST_RECORDS: Final = 16
"""At once: more need more memory and are no faster."""
MOST_BYTES: Final = 1 << 26
"""Of the gradients of the records that are worked on at once; one record's may be larger."""

_RECURRENT: Final[Mapping[type[nn.Module], type[nn.Module]]] = {nn.GRU: DPGRU, nn.LSTM: DPLSTM, nn.RNN: DPRNN}
_TAKEN: Final = frozenset(GradSampleModule.GRAD_SAMPLERS) - {nn.EmbeddingBag}
_INSTEAD: Final[Mapping[str, str]] = {
    "MultiheadAttention": "opacus.layers.DPMultiheadAttention",
    "EmbeddingBag": "Embedding and a mean over its rows",
    "GRUCell": "GRU",
    "LSTMCell": "LSTM",
    "RNNCell": "RNN",
    "Bilinear": "Linear over the outer product",
    "PReLU": "LeakyReLU",
    "ConvTranspose1d": "Upsample and Conv1d",
    "ConvTranspose2d": "Upsample and Conv2d",
    "ConvTranspose3d": "Upsample and Conv3d",
}
_FLAT: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NEAR: Final = 1e-3
"""How far float32 sums of the same gradients may differ, beside the sum of their lengths."""


def records_at_once(elements: int, expected_batch: float) -> int:
    """How many records are worked on at a time, by public numbers alone.

    Args:
        elements: of the parameters that are trained.
        expected_batch: records of a step on average; a step of fewer need not be filled up to `MOST_RECORDS`.
    """
    fit = max(1, MOST_BYTES // (4 * max(1, elements)))
    wanted = 1 << max(0, round(expected_batch) - 1).bit_length()
    return min(MOST_RECORDS, fit, wanted)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, sorted by the names of their tensors."""
    return dict(sorted((name, held) for name, held in model.named_parameters() if held.requires_grad))


def require_private(model: nn.Module, averaged: Collection[str]) -> None:
    """Refuse a model whose records' gradients cannot be told apart, or of which something would leave without noise.

    Args:
        model: declared or an entry point's.
        averaged: names of the tensors that leave.

    Raises:
        ModelRefused: a layer mixes records, or nobody knows each record's part in its gradient, or a tensor that leaves
            is no parameter. The text names it, and what to use instead.
    """
    for name, layer in model.named_modules():
        what = f"layer {name!r} ({type(layer).__name__})" if name else f"the model itself ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm):
            raise ModelRefused(f"Unit record: {what} mixes the records of a batch; use GroupNorm.")
        if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
            raise ModelRefused(f"Unit record: {what} changes its weights as it reads them; leave max_norm out.")
        if isinstance(layer, _FLAT) and layer.padding_mode != "zeros":
            raise ModelRefused(f"Unit record: {what} pads with other than zeros; use padding_mode='zeros'.")
        if isinstance(layer, nn.LSTM) and layer.proj_size:
            raise ModelRefused(f"Unit record: {what} projects its state; leave proj_size out.")
        if not any(held.requires_grad for held in layer.parameters(recurse=False)):
            continue
        if type(layer) in _TAKEN or (name and type(layer) in _RECURRENT):
            continue
        instead = _INSTEAD.get(type(layer).__name__)
        hint = f"; use {instead}" if instead else "; build it from torch's Linear, Conv, Embedding and norm layers"
        raise ModelRefused(f"Unit record: {what} has no gradient of its own for each record{hint}.")
    if strangers := sorted(set(averaged) - dict(model.named_parameters()).keys()):
        raise ModelRefused(
            f"Unit record: {strangers[0]!r} would leave without noise, since it is no parameter that is trained; keep "
            "such tensors out of the model's state (register_buffer with persistent=False)."
        )


class RecordGradients:
    """The gradients of single records of a model, a fixed number of records at a time.

    The number is always the same because the last digits of what a processor computes for one record depend on how
    many it computes at once: were it as many as the coins chose, one record more would change the gradients of others.
    Places that no record takes are filled with zeros, and what comes of them is left out.

    Use as a context: at the end the hooks are taken off, and the model's own layers are put back.
    """

    def __init__(self, model: nn.Module, loss: Loss, record_shape: tuple[int, ...], at_once: int) -> None:
        """Prepare `model`, in training mode; Opacus' own layers stand in for recurrent ones.

        Args:
            model: checked by `require_private`.
            loss: see `Loss`.
            record_shape: of one record's inputs.
            at_once: how many records are worked on at a time.
        """
        model.train()
        model.zero_grad(set_to_none=True)
        self._model, self._loss = model, loss
        self._replaced = _replace_recurrent(model)
        self._trained = trained_parameters(model)
        self._still = _padding_rows(model)
        self._hooked = GradSampleModule(model, loss_reduction="sum", strict=True)
        self._inputs = torch.zeros(at_once, *record_shape)

    @property
    def at_once(self) -> int:
        """How many records are worked on at a time."""
        return len(self._inputs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, sorted by their tensors' names."""
        return list(self._trained.values())

    def of(self, inputs: Tensor, targets: Tensor) -> tuple[list[NDArray[Any]], float]:
        """The gradients of up to `at_once` records, and the sum of their losses.

        Args:
            inputs: [records, *record_shape]. Not modified.
            targets: [records, ...]

        Returns:
            [records, elements] for each of `parameters`; the arrays are the caller's. The loss may be NaN.

        Raises:
            ModelRefused: a parameter has no gradient for each record.
        """
        records = len(inputs)
        self._inputs.zero_()
        self._inputs[:records] = inputs
        filled = targets.new_zeros((self.at_once, *targets.shape[1:]))
        filled[:records] = targets
        losses = self._backward(self._inputs, filled)
        found = [self._taken(name, parameter)[:records] for name, parameter in self._trained.items()]
        return found, float(losses[:records].sum())

    def try_out(self, targets: Tensor) -> None:
        """Run made-up records through the model, whose loss takes `targets` [0, ...].

        Raises:
            ModelRefused: a record's outputs depend on other records, the model changes its own tensors, or the records'
                gradients do not add up to the batch's.
        """
        # Embeddings take whole numbers: 0 and 1 are some to all of them. Seeded, so that the answer is always the same.
        chance = torch.Generator().manual_seed(1)
        made_up = torch.randint(0, 2, self._inputs.shape, generator=chance).to(self._inputs.dtype)
        if not any(isinstance(layer, nn.Embedding) for layer in self._model.modules()):
            made_up = torch.randn(self._inputs.shape, generator=chance)
        others = made_up.roll(1, dims=0) * 2 if len(made_up) > 2 else made_up.clone()
        others[0] = made_up[0]
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one, other = (self._first_output(records) for records in (made_up, others))
        if not torch.equal(one, other):
            raise ModelRefused("Unit record: what the model makes of a record depends on the other records of a batch.")
        self._backward(made_up, targets.new_zeros((self.at_once, *targets.shape[1:])))
        for name, tensor in held.items():
            if not torch.equal(tensor.detach().nan_to_num(), before[name].nan_to_num()):
                raise ModelRefused(f"Unit record: the model changes its tensor {name!r} as it is applied.")
        for name, parameter in self._trained.items():
            whole = torch.zeros(1) if parameter.grad is None else parameter.grad.detach().double().reshape(-1)
            parts = self._taken(name, parameter).astype(np.float64)
            apart = np.linalg.norm(parts.sum(axis=0) - whole.numpy())
            if apart > _NEAR * max(np.linalg.norm(parts, axis=1).sum(), float(whole.norm())):  # NaN is not more
                raise ModelRefused(f"Unit record: the records' gradients of {name!r} do not add up to the batch's.")

    def keep_still(self) -> None:
        """Take out of the parameters' gradients what belongs to rows that are not trained (`padding_idx`)."""
        for parameter, row in self._still:
            if parameter.grad is not None:
                parameter.grad[row] = 0.0

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The records' losses; their gradients lie with the parameters."""
        with warnings.catch_warnings():
            # The records themselves need no gradient; torch thinks that its hooks might be meant for them.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses = self._loss(self._model(inputs.clone()), targets)  # a model may work in place
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        return losses.detach()

    def _first_output(self, inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        outputs: Tensor = self._model(inputs.clone())
        return outputs[0].nan_to_num()

    def _taken(self, name: str, parameter: nn.Parameter) -> NDArray[Any]:
        held: Any = parameter  # Opacus keeps attributes of its own there
        found = held.grad_sample
        if found is None:
            if parameter.grad is not None:
                raise ModelRefused(f"Unit record: {name!r} is used outside of its layer, so no record's part is known.")
            return np.zeros((self.at_once, parameter.numel()), np.float32)
        if not isinstance(found, Tensor) or found.shape != (self.at_once, *parameter.shape):
            raise ModelRefused(f"Unit record: {name!r} has no gradient of its own for each record.")
        for still, row in self._still:
            if still is parameter:
                found[:, row] = 0.0
        held.grad_sample = held.grad = None
        array: NDArray[Any] = found.reshape(self.at_once, -1).numpy()
        return array

    def __enter__(self) -> "RecordGradients":
        return self

    def __exit__(self, *_: object) -> None:
        self._hooked.cleanup()
        for parent, name, layer in self._replaced:
            layer.load_state_dict(getattr(parent, name).state_dict())
            setattr(parent, name, layer)


def _padding_rows(model: nn.Module) -> list[tuple[Tensor, int]]:
    """The rows of embeddings that stay as they are: Opacus' hooks give them a gradient, torch does not."""
    return [
        (layer.weight, layer.padding_idx)
        for layer in model.modules()
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    ]


def _replace_recurrent(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put Opacus' layer in the place of each recurrent one; what was where."""
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) in _RECURRENT
    ]
    for parent, name, layer in found:
        setattr(parent, name, _replacement(layer))
    return found


def _replacement(layer: Any) -> nn.Module:
    options: dict[str, Any] = {"nonlinearity": layer.nonlinearity} if type(layer) is nn.RNN else {}
    made = _RECURRENT[type(layer)](
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        bidirectional=layer.bidirectional,
        **options,
    )
    made.load_state_dict(layer.state_dict())
    return made
