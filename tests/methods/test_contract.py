"""What every method promises, checked for whatever the registry holds: a new method gets these tests for free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bimos.methods
from bimos import BimosError
from bimos.methods import InputStatistics, MethodConfig, TrainableLinear, available_methods, method_config
from bimos.methods.ste import SharedSigns
from bimos.models import convertible_linears, load_model
from bimos.packing.checkpoint import save_packed
from bimos.packing.format import pack_signs, unpack_signs
from bimos.packing.linear import PackedLinear
from bimos.packing.pack import pack_model
from bimos.packing.sizes import BODY, size_report
from bimos.training.student import binarize

# Besides the defaults, which are tested for every method.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "binarymos": [
        {"num_experts": 1},
        {"num_experts": 3},
        {"num_experts": 1, "planes": 2},
        {"num_experts": 2, "planes": 2},
        {"num_experts": 2, "group_size": 16},
        {"num_experts": 2, "planes": 2, "group_size": 16},
        {"num_experts": 2, "iterations": 0, "distinct_experts": False, "latent_magnitude": None},
    ],
    "billm": [{"block_size": 16}],
    "dbllm": [{"group_size": 16}, {"group_size": None, "iterations": 0, "compensation": 0, "relative_latents": False}],
    "gptq2": [{"group_size": 16}, {"group_size": 8, "order": "activation"}],
    "onebit": [{"iterations": 0, "latent_magnitude": None}],
    "pbllm": [{"salient": 0.25}],
    "rtn2": [{"group_size": 16}],
    "sign": [{"group_size": 8}],
}
SHAPES = [(8, 1), (24, 5), (40, 33), (64, 48)]  # in, out: in is a multiple of 8, out of nothing
CASES = [
    pytest.param(name, options, id=f"{name}-{i}") for name in available_methods() for i, options in enumerate([{}, *OPTIONS.get(name, [])])
]

over_methods = pytest.mark.parametrize(("name", "options"), CASES)
over_shapes = pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
over_biases = pytest.mark.parametrize("bias", [False, True])


def started(config: MethodConfig, n_in: int, n_out: int, bias: bool, seed: int = 0) -> TrainableLinear:
    """As at the start of training, on random weights and inputs."""
    torch.manual_seed(seed)
    sample = torch.randn(64, n_in)
    statistics = InputStatistics(sample.square().mean(0), sample)
    return config.layer.from_linear(nn.Linear(n_in, n_out, bias=bias), config, statistics, torch.Generator().manual_seed(seed))


def trained(config: MethodConfig, n_in: int, n_out: int, bias: bool, seed: int = 0) -> TrainableLinear:
    """As after training: every parameter has moved, some latents changed sign, some left (-1, 1)."""
    layer = started(config, n_in, n_out, bias, seed)
    latents = {id(p) for p in layer.roles()["latent"]}
    with torch.no_grad():
        for parameter in layer.parameters():
            size = parameter.abs().mean() + 1e-3
            parameter.add_(torch.randn_like(parameter) * size / 4)
            if id(parameter) in latents:
                parameter.flatten()[::3].neg_()
                parameter.flatten()[::5].mul_(1.5 / size)
    return layer


def round_scales(layer: TrainableLinear) -> None:
    """To the precision in which the packed layer stores them."""
    latents = {id(p) for p in layer.roles()["latent"]}
    with torch.no_grad():
        for parameter in layer.parameters():
            if id(parameter) not in latents:
                parameter.copy_(parameter.half().float())


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = max(expected.abs().max().item(), 0.05)  # a single result may be what is left where larger numbers cancel
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


@over_methods
@over_shapes
@over_biases
def test_trainable_forward_equals_packed_forward(name: str, options: dict[str, Any], n_in: int, n_out: int, bias: bool) -> None:
    layer = trained(method_config(name, options), n_in, n_out, bias)
    round_scales(layer)
    packed = PackedLinear.from_tensors(layer.pack(), layer.group_size)
    x = torch.randn(2, 7, n_in)
    with torch.no_grad():
        assert_near(layer(x), packed(x), 2e-6)
        assert_near(layer(x[0, 0]), packed(x[0, 0]), 2e-6)


@over_methods
def test_forward_in_bfloat16_is_near_that_in_float32(name: str, options: dict[str, Any]) -> None:
    layer = trained(method_config(name, options), 64, 48, True)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)
        plain = layer(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = layer(x)
    for actual in (plain, under_autocast):
        assert actual.dtype == torch.bfloat16
        assert_near(actual.float(), expected, 0.05)


@over_methods
@over_shapes
@over_biases
def test_pack_gives_the_promised_layout(name: str, options: dict[str, Any], n_in: int, n_out: int, bias: bool) -> None:
    config = method_config(name, options)
    layout = config.packed_layout(n_in, n_out, bias)
    layer = trained(config, n_in, n_out, bias)
    tensors = layer.pack()
    expected = {key: tuple(stored) for key, stored in layout.items()}
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == expected
    assert {key: (tuple(t.shape), t.dtype) for key, t in PackedLinear.empty(layout, layer.group_size).tensors().items()} == expected
    assert ("bias" in tensors) == bias
    assert not any(t.requires_grad for t in tensors.values())


@over_methods
def test_packing_is_exact(name: str, options: dict[str, Any]) -> None:
    layer = trained(method_config(name, options), 40, 33, True)
    tensors = layer.pack()
    signs = unpack_signs(tensors["weight"], torch.float32)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(pack_signs(signs), tensors["weight"])
    latents = layer.roles()["latent"]
    if len(latents) == len(signs) == 1:  # one plane: the rule of section 1 of the design
        assert torch.equal(signs[0], torch.where(latents[0] >= 0, 1.0, -1.0))
    again = layer.pack()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


@over_methods
@over_shapes
@over_biases
def test_bits_counted_are_bytes_on_disk(name: str, options: dict[str, Any], n_in: int, n_out: int, bias: bool, tmp_path: Path) -> None:
    config = method_config(name, options)
    path = tmp_path / "layer.safetensors"
    save_file(trained(config, n_in, n_out, bias).pack(), path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert 8 * (len(content) - header) == sum(stored.bits for stored in config.packed_layout(n_in, n_out, bias).values())


@over_methods
@over_biases
def test_roles_name_every_parameter_once(name: str, options: dict[str, Any], bias: bool) -> None:
    layer = started(method_config(name, options), 24, 16, bias)
    named = [id(parameter) for parameters in layer.roles().values() for parameter in parameters]
    assert sorted(named) == sorted(id(parameter) for parameter in layer.parameters())
    assert set(layer.roles()) <= {"latent", "scale", "router", "bias"}
    assert layer.roles()["latent"]


@over_methods
@over_biases
def test_gradients_reach_every_parameter(name: str, options: dict[str, Any], bias: bool) -> None:
    layer = trained(method_config(name, options), 24, 16, bias)
    x = torch.randn(9, 24, requires_grad=True)
    layer(x).square().sum().backward()
    for key, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all(), key
        assert tensor.grad.any(dim=-1).all(), key  # in every row of it


@over_methods
def test_planes_say_how_they_are_multiplied(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bimos.methods.ste.tables_pay", lambda latent, _: latent.dim() == 2)
    layer = started(method_config(name, options), 64, 48, False)
    planes = layer.sign_planes()
    with SharedSigns([plane._replace(as_values=False) for plane in planes], torch.float32):
        shared = [plane.latent.shared_signs[plane.plane] for plane in planes]  # type: ignore[attr-defined]
        layer(torch.randn(3, 64)).sum().backward()
        for plane, signs in zip(planes, shared, strict=True):
            assert signs._is_written == (plane.as_values or plane.latent.dim() != 2)


@over_methods
def test_start_without_samples(name: str, options: dict[str, Any]) -> None:
    config = method_config(name, options)
    linear = nn.Linear(24, 16)
    before = {key: tensor.clone() for key, tensor in linear.state_dict().items()}
    layer = config.layer.from_linear(linear, config, InputStatistics.uninformed(24), torch.Generator().manual_seed(0))
    x = torch.randn(256, 24)
    error = (layer(x) - linear(x)).square().mean() / linear(x).square().mean()
    assert error < 0.6  # of signs and rank-one scales on random weights: about 1 - 2/pi at most
    assert all(torch.equal(tensor, before[key]) for key, tensor in linear.state_dict().items())


@over_methods
def test_start_depends_on_the_seed_alone(name: str, options: dict[str, Any]) -> None:
    config = method_config(name, options)
    one, two = (started(config, 40, 33, True, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


@over_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_start_from_16_bits(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    config = method_config(name, options)
    linear = nn.Linear(24, 16).to(dtype)
    layer = config.layer.from_linear(linear, config, InputStatistics.uninformed(24), torch.Generator().manual_seed(0))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}


@over_methods
@pytest.mark.parametrize("n_in", [4, 12, 63])
def test_inputs_that_do_not_fill_bytes_are_refused(name: str, options: dict[str, Any], n_in: int) -> None:
    config = method_config(name, options)
    with pytest.raises(BimosError, match=f"in_features={n_in}.*multiple of 8"):
        config.packed_layout(n_in, 8, False)
    with pytest.raises(BimosError, match=f"in_features={n_in}.*multiple of 8"):
        config.layer.from_linear(nn.Linear(n_in, 8), config, InputStatistics.uninformed(n_in), torch.Generator())


@over_methods
def test_a_saved_model_gives_the_same_logits(name: str, options: dict[str, Any], teacher_directory: Path, tmp_path: Path) -> None:
    student = load_model(teacher_directory, torch.float32)
    config = method_config(name, options)
    names = list(convertible_linears(student))
    binarize(student, names, config, {}, torch.Generator().manual_seed(0))
    planned = size_report(load_model(teacher_directory), layout=config.layout_of, converted=names)
    packed = pack_model(student, method=name, options=config.to_dict())
    save_packed(packed, None, tmp_path / "model")
    ids = torch.arange(48).reshape(2, 24)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, packed(ids).logits)
    sizes = size_report(tmp_path / "model")
    assert sizes["total_bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert sizes["body_bits_per_weight"] == planned["body_bits_per_weight"]
    bits = sum(stored.bits for n in names for stored in config.packed_layout(*shape_of(teacher_directory, n)).values())
    assert bits == 8 * sum(row["bytes"] for row in sizes["components"] if row["name"] in (*BODY, "biases"))
    assert method_config(name, json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["options"]) == config


def shape_of(directory: Path, name: str) -> tuple[int, int, bool]:
    linear = load_model(directory).get_submodule(name)
    return linear.in_features, linear.out_features, linear.bias is not None  # type: ignore[return-value]


@over_methods
def test_options_survive_json(name: str, options: dict[str, Any]) -> None:
    config = method_config(name, options)
    assert method_config(name, json.loads(json.dumps(config.to_dict()))) == config


THIRD_PARTY = """
import dataclasses
from typing import ClassVar

from bimos.methods import register
from bimos.methods.sign import SignConfig


@register
@dataclasses.dataclass(frozen=True)
class EightConfig(SignConfig):
    name: ClassVar[str] = "eight"
    group_size: int | None = 8
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution on the import path that declares the entry point."""
    (tmp_path / "methods_of_others.py").write_text(THIRD_PARTY)
    about = tmp_path / "methods_of_others-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: methods-of-others\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bimos.methods]\neight = methods_of_others\n")
    monkeypatch.syspath_prepend(tmp_path)
    bimos.methods._discover.cache_clear()
    yield
    bimos.methods._REGISTRY.pop("eight", None)
    bimos.methods._discover.cache_clear()


@pytest.mark.usefixtures("third_party")
def test_methods_of_other_packages_are_found() -> None:
    assert "eight" in available_methods()
    config = method_config("eight", {"group_size": 4})
    assert trained(config, 24, 5, False).pack()["scale_group"].shape == (1, 5, 6)


def test_unknown_methods_and_options_are_refused() -> None:
    with pytest.raises(BimosError, match=r"unknown method 'sine'; known methods: .*binarymos, .*onebit, .*sign"):
        method_config("sine")
    with pytest.raises(BimosError, match=r"method 'binarymos' has no option 'experts'.*num_experts"):
        method_config("binarymos", {"experts": 3})


@pytest.mark.parametrize(
    ("name", "options", "fragment"),
    [
        ("binarymos", {"num_experts": 0}, "num_experts=0"),
        ("binarymos", {"num_experts": "four"}, "num_experts='four'"),
        ("binarymos", {"num_experts": 2.5}, "num_experts=2.5"),
        ("binarymos", {"distinct_experts": "perhaps"}, "distinct_experts='perhaps'"),
        ("binarymos", {"latent_magnitude": "small"}, "latent_magnitude='small'"),
        ("binarymos", {"latent_magnitude": 0.0}, "latent_magnitude=0.0"),
        ("binarymos", {"iterations": -1}, "iterations=-1"),
        ("onebit", {"num_experts": 2}, "num_experts=2"),
        ("onebit", {"planes": 2}, "planes=2"),
        ("binarymos", {"planes": 3}, "planes=3"),
        ("sign", {"group_size": 0}, "group_size=0"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(name: str, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(BimosError, match=fragment) as caught:
        method_config(name, options)
    assert "\n" not in str(caught.value)


def test_numbers_as_yaml_1_1_reads_them() -> None:
    """`--set options.latent_magnitude=1e-1` arrives as a string."""
    assert method_config("binarymos", {"latent_magnitude": "1e-1"}).latent_magnitude == 0.1  # type: ignore[attr-defined]


def test_groups_must_divide_the_inputs() -> None:
    with pytest.raises(BimosError, match="group_size=16 does not divide in_features=24"):
        method_config("sign", {"group_size": 16}).packed_layout(24, 8, False)
