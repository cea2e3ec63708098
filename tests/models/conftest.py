"""What the tests of models share; see `tests/one_process.py`."""

from tests.one_process import one_process

__all__ = ["one_process"]
