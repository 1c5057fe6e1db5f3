"""Registration where something that `modeling_utils` imports has imported bimos; with a stand-in for transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REGISTRATION = Path(__file__).parents[2] / "src" / "bimos" / "packing" / "registration.py"
FILES = {
    "transformers/__init__.py": "",
    "transformers/modeling_utils.py": "import plugin, transformers.later\nWHOLE = True\n",
    "transformers/later.py": "",
    "transformers/after.py": "",
    "registers.py": "import transformers.modeling_utils as trigger\nassert trigger.WHOLE\nprint('registered')\n",
    "plugin.py": (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('registration', {str(REGISTRATION)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module._REGISTERS = 'registers'\n"
        "module.register()\n"
    ),
}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import transformers.modeling_utils\nprint('whole')\nimport transformers.after", ["whole", "registered"]),
        ("import transformers.modeling_utils, registers, transformers.after", ["registered"]),  # not twice
        ("import transformers.modeling_utils\ntry:\n    import absent\nexcept ImportError:\n    print('absent')\nimport transformers.after",
         ["absent", "registered"]),
        ("import plugin, transformers.after\nprint('before')\nimport transformers.modeling_utils", ["before", "registered"]),
    ],
)  # fmt: skip
def test_it_waits_until_the_trigger_is_whole(tmp_path: Path, code: str, expected: list[str]) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    command = [sys.executable, "-S", "-c", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert run.stdout.split() == expected, run.stdout + run.stderr
