"""The backends that a run or a profile asks for, written as in D2VKERN_BACKEND: "triton,attention=eager"."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

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
            if default is not None:
                raise d2vkern.BackendError(f"backends {request!r}: two for all ops, {default!r} and {stem!r}")
            default = stem
    return d2vkern.use_backend(default, **per_op)


def check_backends(request: str | None) -> None:
    """Raise BackendError for a request with names that are not known; None asks for nothing."""
    with use_backends(request or AUTO):
        pass


@contextmanager
def use_backends_of(recorded: str, asked: str | None) -> Iterator[None]:
    """Of a command on a run: those that it was asked for, else those that the run was trained on.

    BackendError says which where this machine has not got the run's.
    """
    try:
        with use_backends(recorded if asked is None else asked):
            yield
    except d2vkern.BackendError as error:
        if asked is not None or recorded in ("", AUTO):
            raise
        raise d2vkern.BackendError(
            f"{error}\nthe run was trained with train.backend {recorded!r}; --backend chooses others, or auto"
        ) from error
