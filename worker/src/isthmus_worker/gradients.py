"""Each record's own gradient, by the hooks of Opacus' GradSampleModule; and which models have none.

A model is refused where a record's gradient could depend on other records, or where something would leave the worker
that no noise covers. It is tried out on made-up records before it sees a real one, so that a refusal tells nothing.
"""

import math
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from isthmus_worker.refusals import ModelRefused, WorkBroken

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> the loss of each record."""

MOST_RECORDS: Final = 128
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
_BITS: Final = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_FEWEST: Final = 8
_FURTHEST: Final = 8
"""So many places at most records stand apart."""
_GRAIN: Final = 4
"""Numbers of records that are worked on at once are multiples of this, and of twice as much where there are more than
`_MANY` places: finer ones would leave fewer places empty, but each is tried out."""
_MANY: Final = 64
_KNOWN: Final[dict[Hashable, tuple[int, list[int]]]] = {}
"""By the kind of model: what this process has found out already. A question of shapes, not of weights."""
_MOST_KNOWN: Final = 64
_NEAR: Final = 1e-3
"""How far float32 sums of the same gradients may differ, beside the sum of their lengths."""


def records_at_once(elements: int, expected_batch: float) -> int:
    """How many records are worked on at a time, by public numbers alone.

    Args:
        elements: of the parameters that are trained.
        expected_batch: records of a step on average.
    """
    fit = max(1, MOST_BYTES // (4 * max(1, elements)))
    most_steps = expected_batch + 3.0 * math.sqrt(expected_batch)  # have no more
    usual = 2 * _GRAIN * math.ceil(most_steps / (2 * _GRAIN))
    return min(MOST_RECORDS, fit, usual)


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
    Places that no record takes are filled with zeros, and what comes of them is left out. Smaller numbers are used only
    where `try_out` has found that they give the same gradients, bit by bit; and where a record's place makes such a
    difference, only every second place is taken, or every fourth or eighth.

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
        self._hooked: Any = GradSampleModule(model, loss_reduction="sum", strict=True)
        self._parts: dict[nn.Parameter, Tensor] = {}
        """What the present batch has given so far."""
        self._places = 0
        """Of the present batch."""
        self._hooked.GRAD_SAMPLERS = {kind: self._keeping(each) for kind, each in self._hooked.GRAD_SAMPLERS.items()}
        self._inputs = torch.zeros(at_once, *record_shape)
        self._apart, self._sizes = 1, [at_once]
        self._handles: list[RemovableHandle] = []
        self._guards = [
            layer.register_forward_pre_hook(_refuse_packed) for layer in model.modules() if isinstance(layer, DPRNNBase)
        ]

    @property
    def at_once(self) -> int:
        """How many records are worked on at a time, at most."""
        return self._sizes[-1] // self._apart

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
            WorkBroken: a parameter has no gradient for each record, though it had for made-up ones.
        """
        records = len(inputs)
        size = next(size for size in self._sizes if size >= records * self._apart)
        taken = slice(0, records * self._apart, self._apart)
        filled, wanted = self._inputs[:size], targets.new_zeros((size, *targets.shape[1:]))
        if size > records:
            filled.zero_()
        filled[taken] = inputs
        wanted[taken] = targets
        try:
            losses = self._backward(filled, wanted)
            found = [self._taken(name, parameter, size)[taken] for name, parameter in self._trained.items()]
        except ModelRefused as refusal:
            raise WorkBroken(str(refusal)) from None
        return found, float(losses[taken].sum())

    def try_out(self, targets: Tensor) -> None:
        """Run made-up records through the model, and find out how many may be worked on at once, and in which places.

        Args:
            targets: [0, ...], of the kind that the loss takes.

        Raises:
            ModelRefused: a record's outputs depend on other records, the model changes its own tensors, or the records'
                gradients do not add up to the batch's.
        """
        made_up, wanted = self._made_up(), targets.new_zeros((len(self._inputs), *targets.shape[1:]))
        few = slice(_FEWEST)
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        before = {name: tensor.detach().clone() for name, tensor in held.items()}
        try:
            self._require_apart(made_up[few])
            self._require_whole(made_up[few], wanted[few])
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise ModelRefused(f"Unit record: single records cannot be followed through the model: {said}") from None
        for name, tensor in held.items():
            if not torch.equal(tensor.detach().nan_to_num(), before[name].nan_to_num()):
                raise ModelRefused(f"Unit record: the model changes its tensor {name!r} as it is applied.")
        self._handles = _leave_out_batch_gradients(self._model)
        self._apart, self._sizes = self._known(made_up, wanted)

    def _made_up(self) -> Tensor:
        """Seeded, so that the answer is always the same. Embeddings take whole numbers: 0 and 1 are some to most."""
        chance = torch.Generator().manual_seed(1)
        if any(isinstance(layer, nn.Embedding) for layer in self._model.modules()):
            return torch.randint(0, 2, self._inputs.shape, generator=chance).to(self._inputs.dtype)
        return torch.randn(self._inputs.shape, generator=chance)

    def _require_apart(self, made_up: Tensor) -> None:
        """Refuse a model that makes something else of the first record if the others are others."""
        others = made_up.roll(1, dims=0).flip(0)
        others[0] = made_up[0]
        outputs = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for records in (made_up, others):
                torch.manual_seed(1)
                outputs.append(self._model(records.clone())[0].nan_to_num())
        if not torch.equal(*outputs):
            raise ModelRefused("Unit record: what the model makes of a record depends on the other records of a batch.")

    def _require_whole(self, made_up: Tensor, wanted: Tensor) -> None:
        """Refuse a model whose gradient is not the sum of what the hooks find for each record."""
        self._backward(made_up, wanted)
        for name, parameter in self._trained.items():
            whole = np.zeros(parameter.numel()) if parameter.grad is None else _flat(parameter.grad)
            parts = self._taken(name, parameter, len(made_up))
            left = parts.sum(axis=0, dtype=np.float64) - whole
            lengths = np.sqrt(np.einsum("ij,ij->i", parts, parts)).sum() + _length(whole)
            if _length(left) > _NEAR * lengths:  # NaN is not more
                raise ModelRefused(f"Unit record: the records' gradients of {name!r} do not add up to the batch's.")

    def _exchangeable(self, made_up: Tensor, wanted: Tensor) -> tuple[int, list[int]]:
        """What gives a record the same gradient, to a bit, wherever it stands.

        Returns:
            How far apart records have to stand; and the numbers of places that may stand in for one another, ascending.
            One record at a time, if nothing else does.
        """
        most = len(made_up)

        def gradients_of(records: Tensor) -> list[NDArray[Any]]:
            self._backward(records, wanted[: len(records)])
            return [self._taken(name, parameter, len(records)) for name, parameter in self._trained.items()]

        with _without_dropout(self._model):
            whole = gradients_of(made_up)
            apart = 1
            while not _same_bits(whole, gradients_of(made_up.roll(-apart, dims=0)), slice(apart, None)):
                apart *= 2
                if apart > min(_FURTHEST, most // 2):
                    return 1, [1]
            step = _GRAIN if most <= _MANY else 2 * _GRAIN
            sizes = [
                size
                for size in range(step, most, step)
                if (most - size) % apart == 0  # else the first place would stand in for one that differs
                and _same_bits(whole, gradients_of(made_up[-size:]), slice(-size, None))
            ]
        return apart, [*sizes, most]

    def _known(self, made_up: Tensor, wanted: Tensor) -> tuple[int, list[int]]:
        kinds = tuple(type(layer) for layer in self._model.modules())
        key = (kinds, repr(self._model), made_up.shape, wanted.shape, wanted.dtype, torch.get_num_threads())
        if key not in _KNOWN:
            while len(_KNOWN) >= _MOST_KNOWN:
                del _KNOWN[next(iter(_KNOWN))]
            _KNOWN[key] = self._exchangeable(made_up, wanted)
        return _KNOWN[key]

    def portions(self, records: int) -> list[int]:
        """In what numbers so many records are best worked on, one after the other."""
        times = -(-records // self.at_once)
        return [records // times + (place < records % times) for place in range(times)]

    def keep_still(self) -> None:
        """Take out of the parameters' gradients what belongs to rows that are not trained (`padding_idx`)."""
        for parameter, row in self._still:
            if parameter.grad is not None:
                parameter.grad[row] = 0.0

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The records' losses; their gradients lie in `_parts`."""
        self._parts.clear()  # of a batch that broke
        self._places = len(inputs)
        with warnings.catch_warnings():
            # The records themselves need no gradient; torch thinks that its hooks might be meant for them.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            losses = self._loss(self._model(inputs.clone()), targets)  # a model may work in place
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        return losses.detach()

    def _keeping(self, sampler: Callable[..., dict[nn.Parameter, Tensor]]) -> Callable[..., dict[nn.Parameter, Tensor]]:
        """The same function of Opacus for a kind of layer, whose gradients stay with us.

        Opacus would copy them into a new tensor of zeros, a sixth of the whole time; it gets one number a record.
        """

        def sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
            found = sampler(layer, activations, backprops)
            for parameter, part in found.items():
                if len(part) != self._places:  # added, a shorter one could be spread over records that it is not of
                    raise ModelRefused(
                        f"Unit record: a {type(layer).__name__} is not applied to all records at a time."
                    )
                if parameter in self._parts:  # a layer that is applied more than once
                    self._parts[parameter] = self._parts[parameter] + part
                else:  # a bias may have been given what torch goes on with
                    self._parts[parameter] = part.clone() if _same_memory(part, backprops) else part
            return {parameter: part.new_zeros(len(part)) for parameter, part in found.items()}

        return sample

    def _taken(self, name: str, parameter: nn.Parameter, records: int) -> NDArray[Any]:
        held: Any = parameter  # Opacus keeps attributes of its own there
        whole, held.grad_sample = held.grad_sample, None
        found = self._parts.pop(parameter, None)
        if found is not None and not isinstance(whole, Tensor):  # Opacus still waits for a use of the layer
            raise ModelRefused(f"Unit record: the layer of {name!r} is also applied where nothing comes of it.")
        if held.grad is not None and (found is None or self._handles):
            raise ModelRefused(f"Unit record: {name!r} is used outside of its layer, so no record's part is known.")
        held.grad = None
        if found is None:
            return np.zeros((records, parameter.numel()), np.float32)
        if not isinstance(found, Tensor) or found.shape != (records, *parameter.shape):
            raise ModelRefused(f"Unit record: {name!r} has no gradient of its own for each record.")
        for still, row in self._still:
            if still is parameter:
                found[:, row] = 0.0
        array: NDArray[Any] = found.reshape(records, -1).numpy()
        return array

    def __enter__(self) -> "RecordGradients":
        return self

    def __exit__(self, *_: object) -> None:
        self._hooked.cleanup()
        for handle in (*self._handles, *self._guards):
            handle.remove()
        for parent, name, layer in self._replaced:
            layer.load_state_dict(getattr(parent, name).state_dict())
            setattr(parent, name, layer)


def _leave_out_batch_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Have torch compute no gradients of whole batches, which nobody asks for: a layer's parameters count as frozen
    while it is applied. A parameter that gets a gradient all the same was used elsewhere."""

    def freeze(layer: nn.Module, _inputs: Any) -> None:
        for parameter in own[layer]:
            parameter.requires_grad_(False)

    def thaw(layer: nn.Module, _inputs: Any, output: Any) -> None:
        for parameter in own[layer]:
            parameter.requires_grad_(True)
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_(True)  # the first layer's: Opacus' hook waits for its gradient

    own = {layer: [held for held in layer.parameters(recurse=False) if held.requires_grad] for layer in model.modules()}
    layers = [layer for layer in own if type(layer) in _TAKEN and own[layer]]
    return [
        *(layer.register_forward_pre_hook(freeze, prepend=True) for layer in layers),
        *(layer.register_forward_hook(thaw, prepend=True) for layer in layers),  # before Opacus', which looks at them
    ]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def _same_bits(whole: list[NDArray[Any]], others: list[NDArray[Any]], rows: slice) -> bool:
    """Whether these rows of `whole` are the first of `others`, to the last bit."""
    return all(
        np.array_equal(one[rows].view(_BITS[one.itemsize]), other[: len(one[rows])].view(_BITS[one.itemsize]))
        for one, other in zip(whole, others, strict=True)
    )


def _refuse_packed(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Sorted by their lengths, records lose their places, and nobody puts their gradients back."""
    if isinstance(inputs[0], PackedSequence):
        raise ModelRefused("Unit record: a recurrent layer is given packed sequences; give it padded ones.")


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _length(vector: NDArray[np.float64]) -> float:
    return math.sqrt(float(np.einsum("i,i->", vector, vector)))


def _flat(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().double().reshape(-1).numpy()
    return array


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
