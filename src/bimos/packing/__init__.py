"""Packed models: bits, the modules that hold them, checkpoints. Knows no method and no trainer."""
