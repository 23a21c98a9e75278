"""Public functions of the ops: argument checks, docstrings, choice of backend. One file per stem."""
