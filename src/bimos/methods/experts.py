"""How scales start: tuned by gradient steps where a layer's inputs are known, experts apart from each other; else from clusters of tokens.

Experts that are alike stay alike: their gradients are, too, and AdamW takes out what little differs. A few steps on the linear's own
error, at rates that end-to-end training could not bear, give each of them something to do before that begins (docs/decisions.md).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from bimos.kernels import native
from bimos.methods.base import InputStatistics, TrainableLinear
from bimos.methods.ste import SharedSigns

RATE = 0.03  # of the mean size of a scale, a step
VECTORS = 512  # of the sample, a step
SPREAD = 0.02  # of scales at first: alike, they would have no use for a router, nor it a gradient
UNDECIDED = 0.3  # standard deviation of the router's logits at first


def tune_scales(layer: TrainableLinear, weight: Tensor, statistics: InputStatistics, steps: int, generator: torch.Generator) -> None:
    """Train scales and router, in place, on how far the layer's output is from that of `weight [out, in]`. Signs stay.

    Input vectors count as they do in the fit of the signs: where a few are hundreds of times larger, they must not decide alone.

    Args:
        layer: its experts, if there are several, all alike; the values of its router do not matter.
    """
    sample, device = statistics.sample, statistics.sample.device
    dtype = native.fast_dtype(torch.bfloat16, device)
    narrow = sample.to(dtype)
    answers = F.linear(narrow, weight.to(dtype), None if layer.bias is None else layer.bias.detach().to(dtype))
    importance = torch.ones(len(sample), device=device) if statistics.importance is None else statistics.importance
    importance = importance / (importance * answers.float().square().sum(-1)).mean().clamp_min(1e-30)
    size = sample.norm(dim=-1).median().clamp_min(1e-6).item()  # of a vector that is none of the few huge ones
    roles = layer.roles()
    scales, latents = roles["scale"], roles["latent"]
    with torch.no_grad():
        for router in roles["router"]:
            router.copy_(torch.randn(router.shape, generator=generator) * (UNDECIDED / size))
        for scale in layer.experts():
            scale.mul_((1 + SPREAD * torch.randn(scale.shape, generator=generator)).to(device))
    groups = [{"params": [scale], "lr": RATE * scale.abs().mean().item()} for scale in scales]
    groups += [{"params": [router], "lr": 10 * RATE / size} for router in roles["router"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    for latent in latents:
        latent.requires_grad_(False)
    with torch.enable_grad(), SharedSigns(layer.sign_planes(), dtype):
        for _ in range(steps):
            rows = torch.randint(len(sample), (min(len(sample), VECTORS),), generator=generator).to(device)
            optimizer.zero_grad()
            error = (layer(narrow[rows]).float() - answers[rows]).square().sum(-1)
            (error * importance[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    layer.zero_grad(set_to_none=True)
    for latent in latents:
        latent.requires_grad_(True)


@dataclasses.dataclass(frozen=True)
class Clusters:
    labels: Tensor  # [n]
    router: Tensor  # [e, in], whose softmax prefers a token's cluster


def cluster(sample: Tensor, experts: int, generator: torch.Generator) -> Clusters:
    """Spherical k-means over input vectors `[n, in]`; None of the clusters comes back empty."""
    points = F.normalize(sample, dim=-1)
    centres = points[torch.randperm(len(points), generator=generator)[:experts]]
    for _ in range(10):
        labels = (points @ centres.T).argmax(-1)
        for expert in range(experts):
            members = points[labels == expert]
            if len(members) == 0:  # start again from the point that fits worst
                members = points[(points @ centres.T).amax(-1).argmin()][None]
            centres[expert] = F.normalize(members.mean(0), dim=0)
    labels = (points @ centres.T).argmax(-1)
    for expert in range(experts):
        if not (labels == expert).any():
            shared = labels.bincount(minlength=experts)[labels] > 1  # taking one of these leaves no other cluster empty
            labels[(points @ centres[expert]).masked_fill(~shared, -torch.inf).argmax()] = expert
    # No bias term exists, so what all centres share is taken out; the spread makes gates soft at the start.
    router = centres - centres.mean(0)
    spread = (sample @ router.T).std().clamp_min(1e-6)
    return Clusters(labels, router / spread)
