"""The backends that a run or a profile asks for, written as in D2VKERN_BACKEND: "triton,attention=eager"."""

from contextlib import AbstractContextManager

import d2vkern

AUTO = "auto"


def use_backends(request: str) -> AbstractContextManager[None]:
    """`d2vkern.use_backend` of a request; "auto" and "" ask for nothing.

    Raises BackendError (a ValueError) for ops and backends that are not known.
    """
    default, per_op = None, {}
    for part in request.split(","):
        stem, equals, name = (word.strip() for word in part.partition("="))
        if equals:
            per_op[stem] = name
        elif stem not in ("", AUTO):
            default = stem
    return d2vkern.use_backend(default, **per_op)
