"""AdamW over the parameters that are trained, with a learning rate for each role."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bimos.methods.base import TrainableLinear
from bimos.methods.planes import SignPlane
from bimos.training.ondisk import give_back, on_disk

LARGE = 1 << 20  # values of a parameter whose moments are worth a file


def trained_parameters(model: nn.Module, norms: bool = False) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: `latent`, `scale` (biases too), `router` and, when asked for, `norm`."""
    groups: dict[str, list[nn.Parameter]] = {"latent": [], "scale": [], "router": [], "norm": []}
    for module in model.modules():
        if isinstance(module, TrainableLinear):
            for role, parameters in module.roles().items():
                groups["scale" if role == "bias" else role] += parameters
        elif norms and "norm" in type(module).__name__.lower():
            groups["norm"] += list(module.parameters(recurse=False))
    return groups


def sign_planes(model: nn.Module) -> list[SignPlane]:
    """The planes that layers take from `sign_ste`."""
    return [plane for module in model.modules() if isinstance(module, TrainableLinear) for plane in module.sign_planes()]


@contextmanager
def experts_together(model: nn.Module, share: float) -> Iterator[None]:
    """Within it, gradients of scaling experts `[e, n]` are `mean + share (gradient - mean)`, the mean that of the layer's experts.

    AdamW divides by the size of what comes: each expert by itself, experts would move apart by noise as fast as they move together.
    """

    def hold(gradient: Tensor) -> Tensor:
        return torch.lerp(gradient.mean(0, keepdim=True), gradient, share)

    hooks: list[Any] = []
    held: set[int] = set()
    lock = threading.Lock()

    def listen(layer: TrainableLinear, _: object) -> None:  # as it runs: before, a sharded layer has other parameters
        with lock:
            for scale in layer.experts():
                if scale.requires_grad and id(scale) not in held:
                    held.add(id(scale))
                    hooks.append(scale.register_hook(hold))

    layers = [module for module in model.modules() if isinstance(module, TrainableLinear) and share < 1]
    hooks += [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def build_optimizer(model: nn.Module, rates: dict[str, float], betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the roles that `rates` names; every other parameter stops requiring gradients. Norms are taken to float32."""
    select(model, rates)
    optimizer = adamw(model, rates, betas, weight_decay)
    assert isinstance(optimizer, torch.optim.AdamW)
    return optimizer


def select(model: nn.Module, rates: dict[str, float]) -> None:
    """Let the parameters of the roles that `rates` names require gradients, and no others. Norms are taken to float32."""
    groups = trained_parameters(model, norms="norm" in rates)
    model.requires_grad_(False)
    for role in rates:
        for parameter in groups[role]:
            if role == "norm":
                parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)


def adamw(
    model: nn.Module,
    rates: dict[str, float],
    betas: tuple[float, float],
    weight_decay: float,
    eight_bits: bool = False,
    epsilon: float = 1e-8,
    by_layer: bool = False,
) -> torch.optim.Optimizer:
    """AdamW on what was selected, a group for each role: torch's, or torchao's where there are moments in 8 bits or latents in bfloat16.

    torchao rounds parameters in bfloat16 stochastically (a step is less than what their last bit means) and compiles a step for every
    shape that it meets.

    Args:
        by_layer: where layers differ in the rate of latents that their options give, `rates` has that of the fastest, and others less.
        eight_bits: moments of parameters with at least 4096 values, a multiple of 256, in 8 bits (2110.02861).
    """
    groups = trained_parameters(model, norms="norm" in rates)
    chosen: list[dict[str, Any]] = []
    for role, rate in rates.items():
        parts = _latents_by_share(model) if role == "latent" and by_layer else {1.0: groups[role]}
        for share, parameters in parts.items():
            if parameters:
                own = {"lr": share * rate, "base_lr": share * rate, "weight_decay": weight_decay if role == "latent" else 0.0}
                chosen.append({"params": parameters, "role": role, **own})
    if not eight_bits and all(p.dtype == torch.float32 for group in chosen for p in group["params"]):
        return torch.optim.AdamW(chosen, betas=betas, eps=epsilon, fused=True)
    torchao: Any = import_module("torchao.optim")
    kind = torchao.AdamW8bit if eight_bits else torchao._AdamW
    optimizer: torch.optim.Optimizer = kind(chosen, betas=betas, eps=epsilon, bf16_stochastic_round=True)
    return optimizer


def _latents_by_share(model: nn.Module) -> dict[float, list[nn.Parameter]]:
    """Latents by the rate of their layers' options, as shares of the highest."""
    layers = [module for module in model.modules() if isinstance(module, TrainableLinear)]
    most = max((layer.config.lr_latent() for layer in layers), default=1.0)
    shares: dict[float, list[nn.Parameter]] = {}
    for layer in layers:
        shares.setdefault(layer.config.lr_latent() / most, []).extend(layer.roles()["latent"])
    return shares


def narrow_latents(model: nn.Module) -> None:
    """Latents in bfloat16, in place: for an optimizer that rounds stochastically."""
    for latent in trained_parameters(model)["latent"]:
        latent.data = latent.data.bfloat16()


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def moments_to_disk(optimizer: torch.optim.AdamW, directory: Path) -> None:
    """Let the moments of large parameters, which are the half of what training holds, lie in files in `directory` from the start."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel() >= LARGE:
                moments = {name: on_disk(tuple(parameter.shape), parameter.dtype, directory) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


def step_in_turn(optimizer: torch.optim.AdamW) -> None:
    """A step, one parameter after the other: the moments of one are in memory at a time. Gradients are gone when it is done."""
    gradients = [(parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    while gradients:
        parameter, gradient = gradients.pop()
        if gradient is None:
            continue
        parameter.grad, gradient = gradient, None
        optimizer.step()
        parameter.grad = None
        for name in ("exp_avg", "exp_avg_sq"):
            give_back(optimizer.state[parameter][name])
