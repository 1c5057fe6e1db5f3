"""Turning a teacher into a binarized student: data, initialisation, block reconstruction, distillation."""
