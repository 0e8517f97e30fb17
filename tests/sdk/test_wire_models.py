"""Declared models: how they are written, what is refused, and the arithmetic of their shapes, without torch."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from isthmus.wire.base import digest_of
from isthmus.wire.layers import MAX_SIDE
from isthmus.wire.manifest import AggregationRule, DType
from isthmus.wire.models import MAX_LAYERS, LayerMisfit, ModelKind, ModelSpec, NotDeclarative

HEART = [{"linear": {"in": 18, "out": 16}}, "relu", {"linear": {"in": 16, "out": 2}}]

EVERY_LAYER: list[Any] = [
    {"linear": {"in": 4, "out": 2, "bias": False}},
    {"embedding": {"num": 10, "dim": 3, "padding_idx": 0}},
    {"dropout": {"p": 0.5}},
    {"conv1d": {"in": 4, "out": 8, "kernel": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}},
    {"conv1d": {"in": 4, "out": 8, "kernel": 3, "padding": "same"}},
    {"conv2d": {"in": 4, "out": 8, "kernel": [3, 5], "stride": 2, "padding": [1, 2]}},
    {"conv2d": {"in": 4, "out": 8, "kernel": 3, "padding": "same"}},
    {"max_pool": {"kernel": 2}},
    {"avg_pool": {"kernel": [2, 3], "stride": [1, 2], "padding": 1}},
    {"adaptive_avg_pool": {"output": 1}},
    {"batch_norm": {"features": 4}},
    {"layer_norm": {"shape": [4, 5]}},
    {"group_norm": {"groups": 2, "features": 4}},
    {"gru": {"in": 4, "hidden": 8}},
    {"lstm": {"in": 4, "hidden": 8, "layers": 2, "take": "all"}},
    {"rnn": {"in": 4, "hidden": 8, "bidirectional": True}},
    "flatten",
    {"reshape": {"shape": [3, 4]}},
    {"permute": {"order": [1, 0]}},
    *("relu", "gelu", "tanh", "sigmoid", "silu", "leaky_relu", "elu"),
    {"leaky_relu": {"slope": 0.2}},
    {"elu": {"alpha": 0.5}},
    {"residual": {"layers": ["relu", {"linear": {"in": 4, "out": 2}}], "shortcut": [{"linear": {"in": 4, "out": 2}}]}},
    {"residual": {"layers": ["relu"]}},
]


def declared(*layers: Any) -> ModelSpec:
    return ModelSpec.model_validate({"layers": layers})


def shapes(spec: ModelSpec, *input_shape: int) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in spec.plan(input_shape).manifest.tensors.items()}


# --- How a model is written ---


@pytest.mark.parametrize("layer", EVERY_LAYER, ids=str)
def test_what_is_dumped_is_read_as_the_same_model(layer: Any) -> None:
    spec = declared(layer)

    assert ModelSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert json.loads(spec.model_dump_json()) == spec.model_dump(mode="json")


def test_the_dump_is_the_long_form_with_every_default() -> None:
    assert declared(*HEART).model_dump(mode="json") == {
        "layers": [
            {"kind": "linear", "in": 18, "out": 16, "bias": True},
            {"kind": "relu"},
            {"kind": "linear", "in": 16, "out": 2, "bias": True},
        ],
        "entry_point": None,
        "options": {},
    }


def test_the_digest_of_a_heart_model_never_changes() -> None:
    assert digest_of(declared(*HEART)) == "a7eb54e784d6b119942e7b240af73cbaa06a5df0fb8f6600eeb725d2d5ab5335"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("relu", {"relu": None}),
        ("relu", {"relu": {}}),
        ("relu", {"kind": "relu"}),
        ({"linear": {"in": 4, "out": 2}}, {"kind": "linear", "inputs": 4, "outputs": 2, "bias": True}),
        ({"conv2d": {"in": 1, "out": 1, "kernel": 3}}, {"conv2d": {"in": 1, "out": 1, "kernel": [3, 3], "stride": 1}}),
        ({"layer_norm": {"features": 4}}, {"layer_norm": {"shape": [4]}}),
        ({"layer_norm": {"shape": 4}}, {"layer_norm": {"shape": [4]}}),
        ({"dropout": {"p": 0}}, {"dropout": {"p": 0.0}}),
    ],
)
def test_two_ways_to_write_one_layer_have_one_digest(one: Any, other: Any) -> None:
    assert declared(one) == declared(other)
    assert digest_of(declared(one)) == digest_of(declared(other))


def test_an_entry_point_takes_scalar_options_and_keeps_their_types() -> None:
    options = {"hidden": 16, "dropout": 0.5, "bias": True, "head": "linear", "whole": 2.0, "none": None}
    spec = ModelSpec.model_validate({"entry_point": "my_package.models:build", "options": options})

    assert spec.kind is ModelKind.ENTRY_POINT
    assert {name: type(value) for name, value in spec.options.items()} == {n: type(v) for n, v in options.items()}
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


# --- What is refused ---


@pytest.mark.parametrize(
    "layer",
    [
        "no_such_layer",
        "linear",
        7,
        ["relu"],
        {},
        {"linear": 3},
        {"relu": {}, "tanh": {}},
        {"relu": {"kind": "tanh"}},
        {"relu": {"inplace": True}},
        {"linear": {"in": 4}},
        {"linear": {"in": 0, "out": 2}},
        {"linear": {"in": -4, "out": 2}},
        {"linear": {"in": 4.0, "out": 2}},
        {"linear": {"in": "4", "out": 2}},
        {"linear": {"in": True, "out": 2}},
        {"linear": {"in": 4, "out": 2, "bias": 1}},
        {"linear": {"in": 4, "inputs": 5, "out": 2}},
        {"linear": {"in": 4, "out": MAX_SIDE + 1}},
        {"embedding": {"num": 4, "dim": 2, "padding_idx": 4}},
        {"embedding": {"num": 4, "dim": 2, "padding_idx": -1}},
        {"conv1d": {"in": 4, "out": 6, "kernel": 3, "groups": 4}},
        {"conv1d": {"in": 4, "out": 6, "kernel": [3, 3]}},
        {"conv1d": {"in": 4, "out": 6, "kernel": 3, "padding": "valid"}},
        {"conv1d": {"in": 4, "out": 6, "kernel": 3, "padding": "same", "stride": 2}},
        {"conv2d": {"in": 4, "out": 6, "kernel": [3]}},
        {"conv2d": {"in": 4, "out": 6, "kernel": [3, 3, 3]}},
        {"conv2d": {"in": 4, "out": 6, "kernel": True}},
        {"conv2d": {"in": 4, "out": 6, "kernel": 3, "padding": -1}},
        {"conv2d": {"in": 4, "out": 6, "kernel": 3, "padding": "same", "stride": [1, 2]}},
        {"max_pool": {"kernel": 0}},
        {"avg_pool": {"kernel": 2, "stride": 0}},
        {"adaptive_avg_pool": {"output": [1, 2, 3]}},
        {"dropout": {"p": 1.0}},
        {"dropout": {"p": float("nan")}},
        {"group_norm": {"groups": 3, "features": 4}},
        {"layer_norm": {"shape": []}},
        {"layer_norm": {"shape": [1] * 9}},
        {"layer_norm": {"shape": [4], "features": 4}},
        {"gru": {"in": 4, "hidden": 4, "layers": 17}},
        {"gru": {"in": 4, "hidden": 4, "take": "first"}},
        {"reshape": {"shape": [-1]}},
        {"permute": {"order": [0, 0]}},
        {"permute": {"order": [1, 2]}},
        {"elu": {"alpha": float("inf")}},
        {"residual": {"layers": []}},
        {"residual": {"layers": ["relu"], "shortcut": []}},
        {"residual": {"layers": ["no_such_layer"]}},
    ],
    ids=str,
)
def test_a_malformed_layer_is_refused(layer: Any) -> None:
    with pytest.raises(ValidationError):
        declared(layer)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"layers": []},
        {"layers": ["relu"], "entry_point": "package:build"},
        {"layers": ["relu"], "options": {"hidden": 16}},
        {"layers": ["relu"], "loss": "cross_entropy"},
        {"entry_point": "package"},
        {"entry_point": "package:"},
        {"entry_point": "package.module.function"},
        {"entry_point": "package:build()"},
        {"entry_point": "package:build\n"},
        {"entry_point": ".package:build"},
        {"entry_point": "../package:build"},
        {"entry_point": "package:build", "options": {"shape": [1, 2]}},
        {"entry_point": "package:build", "options": {"lr": float("nan")}},
        {"entry_point": "package:build", "options": {"not a name": 1}},
        {"entry_point": "package:build", "options": {"seed": 2**64}},
    ],
    ids=str,
)
def test_a_malformed_model_is_refused(model: Any) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(model)


def test_a_refusal_says_how_a_layer_is_written() -> None:
    with pytest.raises(ValidationError, match=r"a layer is a bare name \(relu\) or one name with its options"):
        declared({"linear": 3})


@pytest.mark.parametrize("depth", [9, 200, 300, 3_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    layers: list[Any] = ["relu"]
    for _ in range(8):
        layers = [{"residual": {"layers": layers}}]
    assert declared(*layers).plan((3,)).output_shape == (3,)

    for _ in range(depth - 8):
        layers = [{"residual": {"layers": layers}}]
    with pytest.raises(ValidationError):
        declared(*layers)


def test_too_many_layers_are_refused_wherever_they_stand() -> None:
    assert declared(*["relu"] * MAX_LAYERS).plan((1,)).output_shape == (1,)
    with pytest.raises(ValidationError):
        declared(*["relu"] * (MAX_LAYERS + 1))
    with pytest.raises(ValidationError, match="at most 1000 layers"):
        declared(*[{"residual": {"layers": ["relu"]}}] * 501)


def test_a_model_beyond_all_bounds_is_refused_before_it_is_planned() -> None:
    half = {"linear": {"in": 2**24, "out": 64, "bias": False}}
    declared(half, half)
    with pytest.raises(ValidationError, match="at most 2147483648 elements"):
        declared(half, half, {"linear": {"in": 1, "out": 1}})
    with pytest.raises(ValidationError, match="20000 tensors"):
        declared(*[{"gru": {"in": 1, "hidden": 1, "layers": 16, "bidirectional": True}}] * 200)


# --- Tensors and shapes ---


def test_a_plan_names_tensors_as_torch_does() -> None:
    plan = declared(*HEART).plan((18,))

    assert shapes(declared(*HEART), 18) == {"0.weight": (16, 18), "0.bias": (16,), "2.weight": (2, 16), "2.bias": (2,)}
    assert plan.output_shape == (2,)
    assert {(tensor.dtype, tensor.rule) for tensor in plan.manifest.tensors.values()} == {
        (DType.F32, AggregationRule.MEAN)
    }


def test_running_statistics_are_averaged_and_the_count_of_batches_is_kept() -> None:
    tensors = declared({"batch_norm": {"features": 4}}).plan((4,)).manifest.tensors

    assert tensors["0.inner.running_mean"].rule is AggregationRule.MEAN
    assert tensors["0.inner.running_var"].rule is AggregationRule.MEAN
    counted = tensors["0.inner.num_batches_tracked"]
    assert (counted.dtype, counted.shape, counted.rule) == (DType.I64, (), AggregationRule.KEEP)


def test_a_residual_names_its_two_paths() -> None:
    spec = declared(
        "relu",
        {
            "residual": {
                "layers": [{"linear": {"in": 4, "out": 2}}],
                "shortcut": [{"linear": {"in": 4, "out": 2, "bias": False}}],
            }
        },
    )

    assert shapes(spec, 4) == {"1.body.0.weight": (2, 4), "1.body.0.bias": (2,), "1.shortcut.0.weight": (2, 4)}


def test_a_bidirectional_network_doubles_what_it_gives() -> None:
    spec = declared({"lstm": {"in": 3, "hidden": 5, "layers": 2, "bidirectional": True}})

    assert spec.plan((7, 3)).output_shape == (10,)
    assert shapes(spec, 7, 3)["0.inner.weight_ih_l1_reverse"] == (20, 10)


LENET: list[Any] = [
    {"conv2d": {"in": 3, "out": 6, "kernel": 5}},
    "relu",
    {"max_pool": {"kernel": 2}},
    {"conv2d": {"in": 6, "out": 16, "kernel": 5}},
    "relu",
    {"max_pool": {"kernel": 2}},
    "flatten",
    {"linear": {"in": 400, "out": 120}},
    "relu",
    {"linear": {"in": 120, "out": 84}},
    "relu",
    {"linear": {"in": 84, "out": 10}},
]


def test_lenet_has_62006_parameters_on_colour_images() -> None:
    plan = declared(*LENET).plan((3, 32, 32))

    assert plan.output_shape == (10,)
    assert sum(tensor.elements for tensor in plan.manifest.tensors.values()) == 62_006


@pytest.mark.parametrize(
    ("layers", "input_shape", "message"),
    [
        (
            ["relu", "relu", {"linear": {"in": 16, "out": 2}}],
            (18,),
            "layer 2 (linear) takes 16 inputs but gets 18",
        ),
        (
            [{"linear": {"in": 400, "out": 2}}],
            (16, 5, 5),
            "layer 0 (linear) takes 400 inputs but gets 5 (the last side of [16, 5, 5]: flatten first?)",
        ),
        (
            [{"conv2d": {"in": 1, "out": 2, "kernel": 3}}],
            (28, 28),
            "layer 0 (conv2d) takes records of (channels, height, width) but gets [28, 28]",
        ),
        (
            [{"conv2d": {"in": 1, "out": 2, "kernel": 3}}],
            (3, 28, 28),
            "layer 0 (conv2d) takes 1 channels but gets 3 (the first side of [3, 28, 28])",
        ),
        (
            [{"conv1d": {"in": 1, "out": 2, "kernel": 5, "dilation": 2, "padding": 1}}],
            (1, 6),
            "layer 0 (conv1d) has a window of 9 but gets a side of 6 padded by 1",
        ),
        ([{"max_pool": {"kernel": 3}}], (1, 2), "layer 0 (max_pool) has a window of 3 but gets a side of 2"),
        (
            [{"avg_pool": {"kernel": 2}}],
            (9,),
            "layer 0 (avg_pool) takes records of (channels, length) or (channels, height, width) but gets 9",
        ),
        (
            [{"max_pool": {"kernel": [2, 2]}}],
            (3, 9),
            "layer 0 (max_pool) takes records of (channels, height, width) but gets [3, 9]",
        ),
        (
            [{"max_pool": {"kernel": 3, "padding": 2}}],
            (3, 9),
            "layer 0 (max_pool) is padded by 2, more than half its kernel of 3",
        ),
        ([{"batch_norm": {"features": 4}}], (5,), "layer 0 (batch_norm) takes 4 channels but gets 5"),
        ([{"layer_norm": {"shape": [4, 5]}}], (5,), "layer 0 (layer_norm) normalizes over [4, 5] but gets 5"),
        (
            [{"group_norm": {"groups": 2, "features": 4}}],
            (2, 4),
            "layer 0 (group_norm) takes 4 channels but gets 2 (the first side of [2, 4])",
        ),
        (
            [{"gru": {"in": 6, "hidden": 4}}],
            (6, 100),
            "layer 0 (gru) takes 6 features a step but gets 100 (the last side of [6, 100])",
        ),
        ([{"gru": {"in": 6, "hidden": 4}}], (6,), "layer 0 (gru) takes records of (steps, features) but gets 6"),
        ([{"reshape": {"shape": [3, 4]}}], (13,), "layer 0 (reshape) gives [3, 4], 12 values, but gets 13"),
        ([{"permute": {"order": [1, 0]}}], (3, 4, 5), "layer 0 (permute) orders 2 axes but gets [3, 4, 5]"),
        (
            [{"residual": {"layers": [{"linear": {"in": 4, "out": 2}}]}}],
            (4,),
            "layer 0 (residual) adds equal shapes, but its layers give 2 and its input has 4",
        ),
        (
            [{"residual": {"layers": ["relu"], "shortcut": [{"linear": {"in": 4, "out": 2}}]}}],
            (4,),
            "layer 0 (residual) adds equal shapes, but its layers give 4 and its shortcut gives 2",
        ),
        (
            ["relu", {"residual": {"layers": ["relu", {"linear": {"in": 3, "out": 4}}]}}],
            (4,),
            "layer 1.body.1 (linear) takes 3 inputs but gets 4",
        ),
        (
            [{"linear": {"in": 4, "out": 4}}, {"embedding": {"num": 9, "dim": 2}}],
            (4,),
            "layer 1 (embedding) takes the record itself: only flatten, permute, reshape may stand before it",
        ),
        (
            [{"embedding": {"num": 2, "dim": 2**24}}, "relu"],
            (1_000,),
            "layer 0 (embedding) gives 16777216000 values a record; at most 2147483648 are allowed",
        ),
        (
            [{"conv2d": {"in": 1, "out": 1, "kernel": 1, "padding": 2**24}}],
            (1, 1, 1),
            "layer 0 (conv2d) gives 1125899973951489 values",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_named_with_what_it_gets_and_wants(
    layers: list[Any], input_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LayerMisfit) as refusal:
        declared(*layers).plan(input_shape)

    assert str(refusal.value).startswith(message)


def test_an_embedding_may_stand_behind_layers_that_only_move_values() -> None:
    spec = declared({"reshape": {"shape": [2, 6]}}, {"permute": {"order": [1, 0]}}, {"embedding": {"num": 9, "dim": 4}})

    assert spec.plan((12,)).output_shape == (6, 2, 4)


@pytest.mark.parametrize("input_shape", [(), (0,), (-1, 3), (1,) * 9, (2**20, 2**20)])
def test_a_shape_that_no_record_has_is_refused(input_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not the shape of a record"):
        declared("relu").plan(input_shape)


def test_an_entry_point_has_no_plan() -> None:
    spec = ModelSpec(entry_point="my_package:build")

    with pytest.raises(NotDeclarative, match="its tensors are those of the initial model that was uploaded"):
        spec.plan((18,))


def test_batch_norm_is_found_however_deep_it_stands() -> None:
    assert not declared(*LENET).mixes_records
    assert declared({"residual": {"layers": ["relu"], "shortcut": [{"batch_norm": {"features": 4}}]}}).mixes_records


def test_planning_a_model_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys\n"
        "from isthmus.wire.models import ModelSpec\n"
        "ModelSpec.model_validate({'layers': [{'linear': {'in': 18, 'out': 2}}]}).plan((18,))\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
    )

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
