"What the tests ask of a refusal: its type, its argument, and that it names what it is about."

from contextlib import contextmanager

import pytest


@contextmanager
def refused(error: type = ValueError, *named: str, argument: str | None = None):
    """The block must raise `error`; its message names each of `named` (a module, a file, a model type: things, no
    wording), and it is about `argument`."""
    with pytest.raises(error) as caught:
        yield caught
    missing = [name for name in named if name not in str(caught.value)]
    assert not missing, f"{missing} not named in: {caught.value}"
    assert argument is None or getattr(caught.value, "argument", None) == argument, repr(caught.value)
