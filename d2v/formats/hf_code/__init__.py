"""Copied into folders for transformers, where it runs without d2v or d2vkern."""
