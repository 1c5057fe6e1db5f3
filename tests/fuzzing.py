"""Fuzz target: damaged checkpoints for both loaders. Whatever is in the files: a model, or a BimosError of one line.

    make fuzz FUZZ_SECONDS=300                atheris (the extra `fuzz`), guided by coverage of bimos
    python tests/fuzzing.py random 500        the same mutations at random, without atheris

The damage is that of `mutations.py`; most of it has checksums that are right, so that the loaders get past them.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutations import Checkpoint, Choices, mutate

if TYPE_CHECKING:
    from torch import Tensor


def make_seeds(directory: Path) -> list[Path]:
    """Checkpoints that are good, one an architecture."""
    import torch
    import transformers

    from bimos.packing.pack import pack_model
    from tiny_models import CONFIGS, Trained

    seeds = []
    for kind, bits in (("llama", 8), ("mistral", 16), ("qwen2", 8), ("qwen3", 16)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **CONFIGS[kind]))
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                model.set_submodule(name, Trained(module, 1, 2, None, ()))
        seeds.append(directory / kind)
        pack_model(model, method="any", options={}, embedding_bits=bits).save_pretrained(seeds[-1])
    return seeds


def load_both(directory: Path, ordinary: bool = True) -> int:
    """How many of the loaders gave a model. Raises AssertionError: one failed with something else than an error of one line."""
    import torch

    from bimos import BimosError
    from bimos.engine import Engine, load
    from bimos.models import load_model

    def quick() -> Tensor:
        engine = Engine(load(directory) if ordinary else _mapped(directory), threads=1)
        logits: Tensor = engine.logits([0] * min(3, engine.config.max_position_embeddings))
        return logits

    def usual() -> Tensor | None:
        model = load_model(directory, torch.float32)
        try:
            with torch.no_grad():
                return model(torch.tensor([[0] * min(3, model.config.max_position_embeddings)])).logits[0]
        except (RuntimeError, IndexError, TypeError, ValueError, ArithmeticError):  # what transformers itself cannot run
            return None

    found: list[Tensor | None] = []
    for way in (quick, usual) if ordinary else (quick,):
        try:
            found.append(way())
        except BimosError as error:
            assert str(error) and "\n" not in str(error), repr(error)
    if len(found) == 2 and all(logits is not None and bool(logits.isfinite().all()) for logits in found):
        one, other = found
        assert one is not None and other is not None
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-3, f"two models of one checkpoint: {(one - other).norm()} of {other.norm()}"
    return len(found)


def _mapped(directory: Path) -> Any:
    from bimos import BimosError
    from bimos.packing import mapped

    try:
        return mapped.load(directory)
    except mapped.Unknown as error:
        raise BimosError(str(error)) from None


def one(data: bytes, seeds: list[Path], aside: Path, ordinary: bool = True) -> int:
    """Build the checkpoint that `data` means and load it."""
    choices = Choices(data)
    checkpoint = Checkpoint(choices.of(seeds))
    mutate(checkpoint, choices)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    checkpoint.write(aside)
    return load_both(aside, ordinary)


def main(arguments: list[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        if arguments[:1] == ["random"]:
            seeds, chance, good = make_seeds(folder), random.Random(int(arguments[2]) if len(arguments) > 2 else 0), 0
            for number in range(int(arguments[1])):
                data = chance.randbytes(80)
                try:
                    good += one(data, seeds, folder / "aside", ordinary=len(arguments) < 4)
                except BaseException:
                    print(f"number {number}: {data.hex()}", file=sys.stderr)
                    raise
            print(f"{arguments[1]} checkpoints, {good} times a model")
            return
        import atheris
        import transformers

        transformers.utils.logging.disable_progress_bar()
        with atheris.instrument_imports(include=["bimos"]):
            import bimos.engine
            import bimos.models  # noqa: F401
        seeds = make_seeds(folder)

        def target(data: bytes) -> None:
            one(data, seeds, folder / "aside")

        atheris.Setup([sys.argv[0], *arguments], target)
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
