"""What torch builds is what the plan says, and arrays survive the way there and back."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus.torch import (
    Arrays,
    ArraysMisfit,
    UnsupportedTensor,
    build,
    build_holding,
    draw_initial,
    load_arrays,
    manifest_of_module,
    to_arrays,
)
from isthmus.wire.manifest import AggregationRule, DType
from isthmus.wire.models import LayerMisfit, ModelSpec, NotDeclarative

SEED = "5eed" * 16


def declared(*layers: Any) -> ModelSpec:
    return ModelSpec.model_validate({"layers": layers})


def records(*shape: int, count: int = 3) -> torch.Tensor:
    """Numbers that serve as measurements and, cut to integers, as words of an embedding with at least 4 rows."""
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1)) * 4


def layer_of(module: nn.Module, position: int = 0) -> Any:
    assert isinstance(module, nn.Sequential)
    return module[position]


def conv(channels: int, outputs: int, stride: int = 1) -> list[Any]:
    convolution = {"in": channels, "out": outputs, "kernel": 3, "stride": stride, "padding": 1, "bias": False}
    return [{"conv2d": convolution}, {"batch_norm": {"features": outputs}}]


LENET: list[Any] = [
    {"conv2d": {"in": 3, "out": 6, "kernel": 5}}, "relu", {"max_pool": {"kernel": 2}},
    {"conv2d": {"in": 6, "out": 16, "kernel": 5}}, "relu", {"max_pool": {"kernel": 2}},
    "flatten",
    {"linear": {"in": 400, "out": 120}}, "relu", {"linear": {"in": 120, "out": 84}}, "relu",
    {"linear": {"in": 84, "out": 10}},
]  # fmt: skip

RESNET: list[Any] = [
    *conv(3, 8), "relu",
    {"residual": {"layers": [*conv(8, 8), "relu", *conv(8, 8)]}}, "relu",
    {"residual": {
        "layers": [*conv(8, 16, 2), "relu", *conv(16, 16)],
        "shortcut": [
            {"conv2d": {"in": 8, "out": 16, "kernel": 1, "stride": 2, "bias": False}}, {"batch_norm": {"features": 16}},
        ],
    }}, "relu",
    {"adaptive_avg_pool": {"output": 1}}, "flatten", {"linear": {"in": 16, "out": 10}},
]  # fmt: skip

TEXT: list[Any] = [
    {"embedding": {"num": 50, "dim": 8, "padding_idx": 0}},
    {"dropout": {"p": 0.1}},
    {"gru": {"in": 8, "hidden": 12, "layers": 2, "bidirectional": True}},
    {"linear": {"in": 24, "out": 4}},
]

WAVES: list[Any] = [
    {"conv1d": {"in": 6, "out": 16, "kernel": 5, "padding": "same"}},
    {"group_norm": {"groups": 4, "features": 16}}, "gelu", {"max_pool": {"kernel": 2}},
    {"conv1d": {"in": 16, "out": 32, "kernel": 3, "dilation": 2}}, {"batch_norm": {"features": 32}}, "relu",
    {"avg_pool": {"kernel": 3, "stride": 2, "padding": 1}},
    {"permute": {"order": [1, 0]}}, {"layer_norm": {"features": 32}}, {"lstm": {"in": 32, "hidden": 8, "take": "all"}},
    "flatten", {"linear": {"in": 184, "out": 5}},
]  # fmt: skip

MODELS: list[tuple[list[Any], tuple[int, ...]]] = [
    ([{"linear": {"in": 4, "out": 2}}], (4,)),
    ([{"linear": {"in": 4, "out": 2, "bias": False}}], (3, 4)),
    ([{"embedding": {"num": 10, "dim": 3}}], (5,)),
    ([{"embedding": {"num": 10, "dim": 3, "padding_idx": 2}}], (5, 2)),
    ([{"dropout": {"p": 0.5}}], (4,)),
    ([{"conv1d": {"in": 4, "out": 6, "kernel": 3, "stride": 2, "padding": 1, "groups": 2}}], (4, 9)),
    (
        [{"conv2d": {"in": 4, "out": 6, "kernel": [1, 3], "stride": [2, 1], "padding": [0, 2], "bias": False}}],
        (4, 5, 6),
    ),
    ([{"conv2d": {"in": 2, "out": 2, "kernel": [3, 5], "padding": "same", "dilation": 2}}], (2, 7, 6)),
    ([{"max_pool": {"kernel": 2}}], (2, 7)),
    ([{"max_pool": {"kernel": [2, 3], "stride": 2, "padding": [1, 0]}}], (2, 7, 8)),
    ([{"avg_pool": {"kernel": 3, "stride": 1, "padding": 1}}], (2, 7)),
    ([{"avg_pool": {"kernel": 3}}], (2, 7, 8)),
    ([{"adaptive_avg_pool": {"output": 3}}], (2, 7)),
    ([{"adaptive_avg_pool": {"output": 3}}], (2, 7, 8)),
    ([{"adaptive_avg_pool": {"output": [9, 1]}}], (2, 7, 8)),
    ([{"batch_norm": {"features": 4}}], (4,)),
    ([{"batch_norm": {"features": 4}}], (4, 5)),
    ([{"batch_norm": {"features": 4}}], (4, 5, 6)),
    ([{"layer_norm": {"features": 4}}], (5, 4)),
    ([{"layer_norm": {"shape": [5, 4]}}], (5, 4)),
    ([{"group_norm": {"groups": 2, "features": 4}}], (4, 5)),
    ([{"gru": {"in": 4, "hidden": 5}}], (6, 4)),
    ([{"lstm": {"in": 4, "hidden": 5, "layers": 2, "bidirectional": True}}], (6, 4)),
    ([{"lstm": {"in": 4, "hidden": 5, "bidirectional": True, "take": "all"}}], (6, 4)),
    ([{"rnn": {"in": 4, "hidden": 5, "layers": 3, "take": "all"}}], (6, 4)),
    (["flatten"], (2, 3, 4)),
    ([{"reshape": {"shape": [2, 3, 4]}}], (24,)),
    ([{"permute": {"order": [2, 0, 1]}}], (2, 3, 4)),
    *(([name], (4,)) for name in ("relu", "gelu", "tanh", "sigmoid", "silu", "leaky_relu", "elu")),
    ([{"leaky_relu": {"slope": 0.2}}], (4,)),
    ([{"elu": {"alpha": 0.5}}], (4,)),
    ([{"residual": {"layers": [{"linear": {"in": 4, "out": 4}}, "relu"]}}], (4,)),
    (
        [{"residual": {"layers": [{"linear": {"in": 4, "out": 2}}], "shortcut": [{"linear": {"in": 4, "out": 2}}]}}],
        (4,),
    ),
    (LENET, (3, 32, 32)),
    (RESNET, (3, 32, 32)),
    (TEXT, (20,)),
    (WAVES, (6, 100)),
]

each_model = pytest.mark.parametrize(("layers", "input_shape"), MODELS, ids=lambda value: str(value)[:60])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


# --- The plan and torch agree ---


@each_model
def test_torch_builds_what_was_planned(layers: list[Any], input_shape: tuple[int, ...]) -> None:
    spec = declared(*layers)
    plan = spec.plan(input_shape)
    module = build(spec)

    assert manifest_of_module(module) == plan.manifest
    assert tuple(module(records(*input_shape)).shape) == (3, *plan.output_shape)
    module.eval()
    assert tuple(module(records(*input_shape, count=1)).shape) == (1, *plan.output_shape)


@each_model
def test_every_parameter_of_a_built_model_learns(layers: list[Any], input_shape: tuple[int, ...]) -> None:
    module = build(declared(*layers))
    outputs = module(records(*input_shape))
    if outputs.requires_grad:
        outputs.square().sum().backward()

    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in module.parameters()
    )


@each_model
def test_a_built_model_can_be_copied_pickled_and_shown(layers: list[Any], input_shape: tuple[int, ...]) -> None:
    module = build(declared(*layers)).eval()
    expected = module(records(*input_shape))

    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(records(*input_shape)), expected)
    assert repr(module)


def torch_shape(spec: ModelSpec, input_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(build(spec)(records(*input_shape, count=1)).shape[1:])
    except RuntimeError:
        return None


def planned_shape(spec: ModelSpec, input_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return spec.plan(input_shape).output_shape
    except LayerMisfit:
        return None


def pairs(least: int, most: int) -> st.SearchStrategy[int | tuple[int, int]]:
    side = st.integers(least, most)
    return st.one_of(side, st.tuples(side, side))


# torch remarks that an even window under `same` costs a padded copy.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(data=st.data(), axes=st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_any_convolution_gives_the_shape_that_was_planned_or_fits_neither(data: st.DataObject, axes: int) -> None:
    number = st.integers if axes == 1 else pairs
    same = data.draw(st.booleans(), label="same")
    groups = data.draw(st.integers(1, 2), label="groups")
    options = {
        "in": 2 * groups,
        "out": groups,
        "groups": groups,
        "kernel": data.draw(number(1, 5), label="kernel"),
        "dilation": data.draw(number(1, 3), label="dilation"),
        "padding": "same" if same else data.draw(number(0, 4), label="padding"),
        "stride": 1 if same else data.draw(number(1, 4), label="stride"),
    }
    channels = data.draw(st.sampled_from([2 * groups, 2 * groups, 1]), label="channels")
    input_shape = (channels, *(data.draw(st.integers(1, 12), label="side") for _ in range(axes)))
    spec = declared({f"conv{axes}d": options})

    assert planned_shape(spec, input_shape) == torch_shape(spec, input_shape)


@given(
    data=st.data(), kind=st.sampled_from(["max_pool", "avg_pool", "adaptive_avg_pool"]), axes=st.sampled_from([1, 2])
)
@settings(max_examples=150, deadline=None)
def test_any_pooling_gives_the_shape_that_was_planned_or_fits_neither(
    data: st.DataObject, kind: str, axes: int
) -> None:
    number = st.integers if axes == 1 else pairs
    options: dict[str, Any]
    if kind == "adaptive_avg_pool":
        options = {"output": data.draw(number(1, 9), label="output")}
    else:
        options = {
            "kernel": data.draw(number(1, 5), label="kernel"),
            "stride": data.draw(st.one_of(st.none(), number(1, 4)), label="stride"),
            "padding": data.draw(number(0, 3), label="padding"),
        }
    input_shape = (2, *(data.draw(st.integers(1, 12), label="side") for _ in range(axes)))
    spec = declared({kind: options})

    assert planned_shape(spec, input_shape) == torch_shape(spec, input_shape)


# --- What our modules compute ---


@pytest.mark.parametrize(
    ("shape", "usual"), [((4,), nn.BatchNorm1d), ((4, 5), nn.BatchNorm1d), ((4, 5, 6), nn.BatchNorm2d)]
)
def test_batch_norm_computes_what_torchs_own_does(shape: tuple[int, ...], usual: Any) -> None:
    ours, theirs = build(declared({"batch_norm": {"features": 4}})), usual(4)

    torch.testing.assert_close(ours(records(*shape)), theirs(records(*shape)))
    torch.testing.assert_close(layer_of(ours).inner.running_var, theirs.running_var)


def test_the_last_state_is_taken_from_each_directions_own_end() -> None:
    module = build(declared({"gru": {"in": 3, "hidden": 4, "layers": 2, "bidirectional": True}}))
    steps, _ = layer_of(module).inner(records(6, 3))

    torch.testing.assert_close(module(records(6, 3)), torch.cat([steps[:, -1, :4], steps[:, 0, 4:]], dim=1))


def test_an_embedding_reads_whole_numbers_that_arrive_as_floats() -> None:
    module = build(declared({"embedding": {"num": 5, "dim": 2}}))

    torch.testing.assert_close(module(torch.tensor([[0.0, 4.0]])), layer_of(module).inner(torch.tensor([[0, 4]])))


def test_layers_with_parameters_are_torchs_own_classes() -> None:
    for layers, _ in MODELS:
        for module in build(declared(*layers)).modules():
            if list(module.parameters(recurse=False)):
                assert type(module).__module__.startswith("torch.nn.modules.")


def test_a_model_is_built_in_float32_whatever_the_default_is() -> None:
    spec = declared(*WAVES)
    with default_dtype(torch.float64):
        module = build(spec)

        assert torch.get_default_dtype() is torch.float64
    assert manifest_of_module(module) == spec.plan((6, 100)).manifest


def test_an_entry_point_is_not_built_here() -> None:
    spec = ModelSpec(entry_point="my_package:build")

    with pytest.raises(NotDeclarative):
        build(spec)
    with pytest.raises(NotDeclarative):
        draw_initial(spec, SEED)


# --- Initial tensors ---


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others() -> None:
    spec = declared(*RESNET)
    first, again, other = draw_initial(spec, SEED), draw_initial(spec, SEED.upper()), draw_initial(spec, "00")

    assert {name: array.tobytes() for name, array in first.items()} == {
        n: array.tobytes() for n, array in again.items()
    }
    assert not np.array_equal(first["0.weight"], other["0.weight"])
    assert {name: (array.dtype, array.shape) for name, array in first.items()} == {
        name: (np.dtype(np.int64 if tensor.dtype is DType.I64 else np.float32), tensor.shape)
        for name, tensor in spec.plan((3, 32, 32)).manifest.tensors.items()
    }


def test_drawing_leaves_the_callers_generator_alone_and_is_not_moved_by_it() -> None:
    spec = declared(*LENET)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_initial(spec, SEED)
    assert torch.equal(torch.get_rng_state(), before)

    torch.manual_seed(2)
    with default_dtype(torch.float64):
        again = draw_initial(spec, SEED)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_callers_generator_is_left_alone_even_if_the_model_is_refused() -> None:
    before = torch.get_rng_state()
    with pytest.raises(NotDeclarative):
        draw_initial(ModelSpec(entry_point="my_package:build"), SEED)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", ["", "abc", "xy", "-1"])
def test_a_seed_that_is_not_hexadecimal_is_refused(seed: str) -> None:
    with pytest.raises(ValueError, match=r"seed is empty|fromhex"):
        draw_initial(declared("relu"), seed)


# --- Arrays ---


@pytest.mark.parametrize(("layers", "input_shape"), [(LENET, (3, 32, 32)), (RESNET, (3, 32, 32)), (TEXT, (20,))])
def test_arrays_come_back_as_they_went_in(layers: list[Any], input_shape: tuple[int, ...]) -> None:
    spec = declared(*layers)
    arrays = draw_initial(spec, SEED)
    module = build(spec)
    load_arrays(module, arrays)
    back = to_arrays(module)

    assert back.keys() == arrays.keys()
    for name, array in back.items():
        assert array.dtype == arrays[name].dtype
        assert array.shape == arrays[name].shape
        assert array.tobytes() == arrays[name].tobytes()


class Everything(nn.Module):
    """A buffer of every dtype that travels, an empty tensor and one that is not in C order."""

    def __init__(self) -> None:
        super().__init__()
        floats = (torch.float64, torch.float32, torch.float16)
        signed = (torch.int64, torch.int32, torch.int16, torch.int8)
        unsigned = (torch.uint64, torch.uint32, torch.uint16, torch.uint8)
        for dtype in (*floats, *signed, *unsigned, torch.bool):
            self.register_buffer(str(dtype).removeprefix("torch."), torch.tensor([0, 1, 1]).to(dtype))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("of_the_moment", torch.zeros(2), persistent=False)


@pytest.mark.parametrize(("layers", "input_shape"), MODELS)
@pytest.mark.parametrize("large_bytes", [0, 1 << 40])
def test_a_model_that_is_built_with_its_arrays_holds_them_all_however_large_it_is(
    layers: list[Any], input_shape: tuple[int, ...], large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.torch.LARGE_BYTES", large_bytes)
    spec = declared(*layers)
    usual = build(spec)
    arrays = to_arrays(usual)
    before = torch.get_rng_state()

    module = build_holding(spec, arrays)

    if not large_bytes:
        assert torch.equal(torch.get_rng_state(), before)
    assert module.state_dict().keys() == usual.state_dict().keys()
    for (name, tensor), other in zip(module.state_dict().items(), usual.state_dict().values(), strict=True):
        assert (tensor.device, tensor.dtype) == (other.device, other.dtype), name
        assert torch.equal(tensor, other), name
    frozen = [parameter.requires_grad for parameter in usual.parameters()]
    assert [parameter.requires_grad for parameter in module.parameters()] == frozen
    inputs = records(*input_shape)
    assert torch.equal(module.eval()(inputs), usual.eval()(inputs))


@pytest.mark.parametrize("large_bytes", [0, 1 << 40])
def test_a_model_is_not_built_with_arrays_that_leave_some_of_it_out(
    large_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.torch.LARGE_BYTES", large_bytes)
    spec = declared(*LENET)
    arrays = to_arrays(build(spec))
    arrays.popitem()

    with pytest.raises(ArraysMisfit):
        build_holding(spec, arrays)


def test_every_dtype_travels() -> None:
    module = Everything()
    arrays = to_arrays(module)
    manifest = manifest_of_module(module)

    assert {manifest.tensors[name].dtype for name in arrays} == set(DType)
    assert arrays["scalar"].shape == ()
    assert "of_the_moment" not in arrays
    assert all(array.flags.c_contiguous for array in arrays.values())
    emptied = {name: np.zeros_like(array) for name, array in arrays.items()}
    load_arrays(module, emptied)
    assert all(not array.any() for array in to_arrays(module).values())
    load_arrays(module, arrays)
    assert all(np.array_equal(array, arrays[name]) for name, array in to_arrays(module).items())


def test_arrays_share_no_memory_with_the_module() -> None:
    module = build(declared({"linear": {"in": 2, "out": 2}}))
    arrays = to_arrays(module)
    kept = {name: array.copy() for name, array in arrays.items()}
    with torch.no_grad():
        layer_of(module).weight.zero_()
    assert np.array_equal(arrays["0.weight"], kept["0.weight"])

    load_arrays(module, arrays)
    with torch.no_grad():
        layer_of(module).weight.zero_()
        layer_of(module).bias.zero_()
    assert all(np.array_equal(array, kept[name]) for name, array in arrays.items())


def test_a_state_dict_serves_as_well_as_its_module() -> None:
    module = build(declared(*TEXT))
    arrays = to_arrays(module.state_dict())

    assert list(arrays) == list(to_arrays(module))


def test_read_only_and_turned_arrays_are_loaded() -> None:
    module = build(declared({"linear": {"in": 3, "out": 2, "bias": False}}))
    turned = np.arange(6, dtype=np.float32).reshape(3, 2).T[::-1]
    turned.flags.writeable = False
    load_arrays(module, {"0.weight": turned})

    assert np.array_equal(to_arrays(module)["0.weight"], turned)


def good_arrays() -> Arrays:
    return {"0.weight": np.ones((2, 3), np.float32), "0.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.weight": np.ones(2, np.float32)}, "the module has no tensor '1.weight'"),
        ({"0.bias": None}, "there is no array for '0.bias'"),
        ({"0.bias": np.ones((2, 1), np.float32)}, r"'0.bias' is float32 of shape \[2\], not float32 of \[2, 1\]"),
        ({"0.bias": np.ones(2, np.float64)}, r"'0.bias' is float32 of shape \[2\], not float64 of \[2\]"),
        ({"0.bias": np.ones(2, ">f4")}, r"'0.bias' is float32 of shape \[2\], not >f4 of \[2\]"),
        ({"0.bias": np.float32(1)}, r"'0.bias' is float32 of shape \[2\], not float32 of \[\]"),
    ],
)
def test_arrays_that_do_not_fit_change_nothing(changes: dict[str, Any], message: str) -> None:
    module = build(declared({"linear": {"in": 3, "out": 2}}))
    before = to_arrays(module)
    arrays = {name: array for name, array in {**good_arrays(), **changes}.items() if array is not None}

    with pytest.raises(ArraysMisfit, match=message):
        load_arrays(module, arrays)

    assert all(np.array_equal(array, before[name]) for name, array in to_arrays(module).items())


def test_without_strict_some_tensors_may_be_left_as_they_are_but_none_invented() -> None:
    module = build(declared({"linear": {"in": 3, "out": 2}}))
    before = to_arrays(module)
    load_arrays(module, {"0.weight": good_arrays()["0.weight"]}, strict=False)

    assert np.array_equal(to_arrays(module)["0.weight"], good_arrays()["0.weight"])
    assert np.array_equal(to_arrays(module)["0.bias"], before["0.bias"])
    with pytest.raises(ArraysMisfit, match="the module has no tensor"):
        load_arrays(module, {"2.weight": np.ones(2, np.float32)}, strict=False)


# --- Modules of organizations ---


class Tied(nn.Module):
    """One matrix reads words and writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.guess = nn.Linear(3, 5, bias=False)
        self.guess.weight = self.words.weight


def test_tied_weights_travel_once_under_their_first_name() -> None:
    module = Tied()

    assert list(to_arrays(module)) == [name for name, _ in module.named_parameters()] == ["words.weight"]
    assert manifest_of_module(module).names() == ["words.weight"]
    load_arrays(module, {"words.weight": np.ones((5, 3), np.float32)})
    assert bool((module.guess.weight == 1).all())


def test_frozen_parameters_and_integers_are_kept_and_floats_averaged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layer_of(module).weight.requires_grad_(False)
    rules = {name: tensor.rule for name, tensor in manifest_of_module(module).tensors.items()}

    assert {name for name, rule in rules.items() if rule is AggregationRule.KEEP} == {
        "0.weight",
        "1.num_batches_tracked",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_a_dtype_that_numpy_cannot_average_is_refused_by_name(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("phases", torch.zeros(2, dtype=dtype))

    for refused in (lambda: to_arrays(module), lambda: manifest_of_module(module), lambda: load_arrays(module, {})):
        with pytest.raises(UnsupportedTensor, match=rf"'phases' is {str(dtype).removeprefix('torch.')}: convert it"):
            refused()


def test_a_sparse_tensor_is_refused_by_name() -> None:
    module = nn.Module()
    edges = torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (3, 3), check_invariants=True)
    module.register_buffer("graph", edges)

    with pytest.raises(UnsupportedTensor, match="'graph' is sparse_coo"):
        to_arrays(module)


def test_state_that_is_no_tensor_is_refused_by_name() -> None:
    class Remembers(nn.Module):
        def get_extra_state(self) -> Any:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(UnsupportedTensor, match="'_extra_state' is no tensor"):
        to_arrays(Remembers())
