"""What the tests of exports share; see `tests/one_process.py`."""

from tests.one_process import one_process

__all__ = ["one_process"]
