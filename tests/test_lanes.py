"""Half batches side by side: the same loss and gradients as the whole batch, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bimos.config import DistillConfig
from bimos.lanes import Lanes
from bimos.methods import method_config
from bimos.methods.planes import SignPlane
from bimos.methods.ste import SharedSigns, sign_ste
from bimos.models import convertible_linears
from bimos.training.distillation import Distillation
from bimos.training.student import binarize

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    """Whatever the machine has."""
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A teacher, and a student whose every parameter is trained."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2)).requires_grad_(False).eval()
    student = copy.deepcopy(teacher)
    binarize(student, list(convertible_linears(student)), method_config("binarymos"), {}, torch.Generator().manual_seed(0))
    return teacher, student


def test_in_turn_is_the_same_on_all_cores() -> None:
    _, student = pair()
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    seen: list[int] = []

    def loss_of(ids: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        loss: Tensor = student(input_ids=ids, labels=ids).loss
        return loss

    found = []
    for in_turn in (False, True):
        with Lanes(4, CPU, in_turn) as lanes:
            assert lanes.count == 2 and lanes.side_by_side == (1 if in_turn else 2)
            found.append((lanes.backward(loss_of, {"ids": ids}), gradients(student)))
            student.zero_grad()
    assert seen == [2, 2, 4, 4]  # of four
    torch.testing.assert_close(found[1], found[0])
    assert Lanes(1, CPU, in_turn=True).count == 1


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
@pytest.mark.parametrize("options", [{}, {"hidden_weight": 10.0}, {"relative_weight": 1.0}])
@pytest.mark.parametrize("shared", [False, True])
def test_two_lanes_give_the_gradient_of_the_whole(rows: int, options: dict[str, float], shared: bool) -> None:
    teacher, student = pair()
    distillation = Distillation(student, teacher, DistillConfig(**options), None)
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(0, 64, (rows, 16), generator=generator), "window": torch.arange(rows)}
    expected = distillation(**batch)["loss"]
    (expected * 0.5).backward()
    whole = gradients(student)
    student.zero_grad()
    latents = [parameter for name, parameter in student.named_parameters() if name.endswith("proj.weight")]
    assert len(latents) == 14
    with Lanes(rows, CPU) as lanes:
        assert lanes.count == 2
        for _ in range(2):  # the second time on top of the first
            if shared:
                with SharedSigns(map(SignPlane, latents), torch.float32):
                    loss = lanes.backward(lambda **part: distillation(**part)["loss"], batch, 0.25)
            else:
                loss = lanes.backward(lambda **part: distillation(**part)["loss"], batch, 0.25)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and not loss.requires_grad
    found = gradients(student)
    assert found.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_threads_are_as_before_and_errors_come_through() -> None:
    def fail(**_: Tensor) -> Tensor:
        raise KeyError("inside")

    with Lanes(4, CPU) as lanes:
        seen: list[int] = []

        def note(rows: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return rows.sum() * torch.ones(1, requires_grad=True).sum()

        lanes.backward(note, {"rows": torch.ones(4)})
        assert seen == [2, 2]
        assert torch.get_num_threads() == 4
        with pytest.raises(KeyError, match="inside"):
            lanes.backward(fail, {"rows": torch.ones(4)})
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(("threads", "rows", "device"), [(1, 4, "cpu"), (4, 1, "cpu"), (4, 4, "meta")])
def test_one_lane_where_two_would_not_help(threads: int, rows: int, device: str) -> None:
    torch.set_num_threads(threads)
    with Lanes(rows, torch.device(device)) as lanes:
        assert lanes.count == 1
        x = torch.ones(rows, requires_grad=True)
        assert lanes.backward(lambda x: x.square().mean(), {"x": x}).item() == 1.0
        assert torch.equal(x.grad, torch.full((rows,), 2.0 / rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_signs_are_the_straight_through_sign(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = nn.Parameter(torch.randn(24, 40, generator=generator))
    with torch.no_grad():
        latent[0, :4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    x = torch.randn(2, 5, 40, generator=generator).to(dtype)

    def passes() -> Tensor:
        for part in x:
            signs = sign_ste(latent, part)
            assert signs.dtype == dtype and signs.abs().eq(1).all()
            (part @ signs.T).square().sum().backward()
        assert latent.grad is not None
        grad, latent.grad = latent.grad.clone(), None
        return grad

    expected = passes()
    shared = SharedSigns([SignPlane(latent)], dtype)
    for value in (1.0, 0.5):  # signs follow the latents
        with torch.no_grad():
            latent.mul_(value)
        with shared:
            latent.grad = torch.ones_like(latent)
            for part in x:
                (part @ sign_ste(latent, part).T).square().sum().backward()
        assert not hasattr(latent, "shared_signs")
        assert latent.grad is not None
        inside = (latent.detach().abs() < 1).float()
        reference = expected if value == 1.0 else passes_again(latent, x)
        torch.testing.assert_close(latent.grad - 1, reference * inside, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        latent.grad = None


def passes_again(latent: nn.Parameter, x: Tensor) -> Tensor:
    """The gradient where every sign lets it through."""
    signs = torch.where(latent.detach() >= 0, 1.0, -1.0).to(x.dtype).requires_grad_()
    for part in x:
        (part @ signs.T).square().sum().backward()
    assert signs.grad is not None
    return signs.grad.float()


def test_frozen_latents_share_signs_without_gradients() -> None:
    latent = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    with SharedSigns([SignPlane(latent)], torch.float32):
        assert not sign_ste(latent, torch.ones(1, 8)).requires_grad
    assert latent.grad is None and not hasattr(latent, "shared_signs")
