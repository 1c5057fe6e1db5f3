"""`import bimos` is instant, and transformers knows the format whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING


def test_bimos_first(packed: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    code = (
        "import sys, bimos\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert run.stdout.strip() == "PackedLinear", run.stderr


def test_transformers_first() -> None:
    import bimos

    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bimos"].__name__ == "BimosConfig"
    assert AUTO_QUANTIZER_MAPPING["bimos"].__name__ == "BimosQuantizer"
    assert bimos.BinaryMoSConfig(num_experts=2).num_experts == 2
    assert "binarymos" in bimos.available_methods()
    bimos.quantize = ModuleType("bimos.quantize")  # what importing the submodule does
    assert "quantize" not in vars(bimos)
    assert not hasattr(bimos, "nonsense") and not hasattr(bimos, "NonsenseConfig")


def test_bimos_while_transformers_loads(packed: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    packed("llama").save_pretrained(tmp_path)
    code = (
        "import importlib.util, sys\n"
        "class During:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'transformers.quantizers.auto':\n"
        "            sys.meta_path.remove(self)\n"
        "            assert 'transformers.modeling_utils' in sys.modules\n"
        "            import bimos\n"
        "            return importlib.util.find_spec(name)\n"
        "sys.meta_path.insert(0, During())\n"
        "import transformers.modeling_utils\n"
        "assert 'bimos' in sys.modules and 'bimos.packing.hf' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert run.stdout.strip() == "PackedLinear", run.stderr


def test_no_benchmark_is_taken_for_a_package() -> None:
    """A script's folder comes first on the path: transformers imports what has the name of a package that it knows."""
    folder = Path(__file__).parents[2] / "benchmarks"
    code = (
        f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
        "import transformers.modeling_utils\n"
        f"print([name for name, module in sys.modules.items() if (getattr(module, '__file__', None) or '').startswith({str(folder)!r})])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
