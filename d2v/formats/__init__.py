"""Models as files: opening every kind, and writing them for d2v, the original and transformers."""
