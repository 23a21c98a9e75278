"""Eager PyTorch implementation of every op: the definition the other backends are tested against."""
