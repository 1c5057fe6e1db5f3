"""What this machine, this installation and its kernels are: the first thing to look at, and to paste into an issue."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from bimos import __version__
from bimos.datafolder import data_directory
from bimos.errors import BimosError
from bimos.evaluation.versions import available_cores, cpu_model
from bimos.kernels import gpu, int8_linear, native, packed_linear, reference
from bimos.packing.format import pack_signs

OPTIONAL = {
    "lm_eval": "zero-shot tasks: pip install 'bimos[eval]'",
    "matplotlib": "pictures of bimos compare and inspect: pip install 'bimos[eval]'",
    "tensorboard": "training curves: pip install 'bimos[logging]'",
    "trackio": "training curves: pip install trackio",
    "torchao": "moments in 8 bits, latents in bfloat16: pip install 'bimos[lean]'",
    "hqq": "a row of bimos compare: pip install 'bimos[peers]'",
    "auto-round": "a row of bimos compare: pip install 'bimos[peers]'",
}
# Instruction sets that fast kernels for signs can use, as /proc/cpuinfo names them.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def diagnose() -> dict[str, Any]:
    """Everything that `bimos doctor` shows, JSON-ready.

    `problems` are lines about what must be mended, `missing` names optional packages that are absent and what they are for.
    """
    packages, problems = _requirements()
    optional = {name: _version(name) for name in OPTIONAL}
    kernels, kernel_problems = _kernels()
    memory = psutil.virtual_memory()
    try:
        data, data_problems = data_directory(), list[str]()
    except BimosError as error:
        data, data_problems = None, [str(error)]
    return {
        "bimos": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": available_cores(), "features": _cpu_features()},
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available},
        "disk": {"folder": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "torch": {
            "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        "kernels": kernels,
        "evaluation_data": str(data) if data else None,
        "packages": packages | {name: version for name, version in optional.items() if version},
        "missing": {name: use for name, use in OPTIONAL.items() if optional[name] is None},
        "problems": problems + kernel_problems + data_problems,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> tuple[dict[str, str | None], list[str]]:
    """Installed versions of what bimos itself declares that it needs, and which of them are absent or too old."""
    packages: dict[str, str | None] = {}
    problems = []
    try:
        declared = metadata.requires("bimos") or []
    except metadata.PackageNotFoundError:
        return {"torch": torch.__version__}, ["bimos runs from a folder and is not installed: pip install -e ."]
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = packages[requirement.name] = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} does not do: pip install '{requirement}'")
    return packages, problems


def _cpu_features() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}
    return [name for name in CPU_FEATURES if name in flags]


def _kernels() -> tuple[dict[str, str], list[str]]:
    """Which implementation each op takes on each device here, and those that do not give the reference's result."""
    devices = ["CPU", *(["CUDA"] if torch.cuda.is_available() else [])]
    kinds = {"CPU": ("C++", native.isa()), "CUDA": ("Triton", _version("triton"))}
    used = {}
    for op in ("packed_linear", "int8_linear"):
        for device in devices:
            problem, (kind, version) = "", kinds[device]
            if device == "CPU":
                problem = native.problem
            else:
                try:
                    problem = gpu.problem(torch.device("cuda", torch.cuda.current_device()))
                except torch.OutOfMemoryError:
                    problem = "no memory left on the GPU to try them"
            own = torch._C._dispatch_has_kernel_for_dispatch_key(f"bimos::{op}", device) and not problem
            why = f" ({kind} kernels: {problem})" if problem else ""
            used[f"{op} on {device}"] = f"{kind}, {version}" if own else f"reference in plain torch{why}"
    generator = torch.Generator().manual_seed(0)
    x, weight, router = (torch.randn(n, 128, generator=generator) for n in (3, 64, 2))
    scale_in, scale_out = (torch.rand(1, 2, n, generator=generator).half() for n in (128, 64))
    arguments = (x, pack_signs(weight)[None], scale_in, scale_out, router.half())
    expected = reference.packed_linear(*arguments)
    problems = []
    for device in devices:
        moved: Any = [tensor.to(device.lower()) for tensor in arguments]
        error = (packed_linear(*moved).cpu() - expected).abs().max().item()
        if not error < 1e-2:
            problems.append(f"packed_linear on {device} is off by {error:.2g}: please report this with the output of bimos doctor")
        head: Any = [x, torch.arange(-128, 128, dtype=torch.int8).view(2, 128), torch.tensor([[0.01], [0.02]]).half()]
        there = int8_linear(*(tensor.to(device.lower()) for tensor in head)).cpu()
        error = (there - reference.int8_linear(*head)).abs().max().item()
        if not error < 0.1:  # of sums of some tens: the CPU's kernels round inputs to 8 bits or more
            problems.append(f"int8_linear on {device} is off by {error:.2g}: please report this with the output of bimos doctor")
    return used, problems
