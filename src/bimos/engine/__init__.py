"""The engine: packed models of the Llama family decoded in C++ (`csrc/engine/`), without Python between layers.

    engine = Engine.from_pretrained("smollm2-1bit")
    print(engine.generate("The lighthouse"))
    for piece in engine.chat([{"role": "user", "content": "Hello!"}]):
        print(piece, end="", flush=True)

Llama, SmolLM, Mistral, Qwen2 and Qwen3; what it does not cover `refusal` says, and `transformers` runs. Everything is float32 but keys
and values (bfloat16, or int8 where asked for) and the tables of the products (16 bits), whatever the checkpoint's dtype.
"""

from bimos.engine.engine import Engine
from bimos.engine.fit import check_options, is_engine_model, load, refusal, refuse_bits
from bimos.engine.weights import windows

__all__ = ["Engine", "check_options", "is_engine_model", "load", "refusal", "refuse_bits", "windows"]
