"""largeformer with one fault in it: `FAULTS='RANK MODULE FUNCTION CALL ACTION;...' python -m tests.faulty pretrain -c ...`.

At call number CALL (from 1) of FUNCTION in MODULE, on RANK, ACTION happens, and then the call itself. So a fault comes at the same place
each time, and no test has to guess how long something takes. Actions: names of signals, joined by +, which the rank sends to itself, or
after `parent:` to its launcher; `pause:S`, for S seconds; `sleep`, for ever; `hang`, for ever and without giving up the interpreter's
lock; `fail`. `spike:A-B` multiplies what the function returns, at every call whose batch holds samples from A to B. FUNCTION `import`
stands for the import of MODULE.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.abc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def main() -> int:
    from largeformer import __main__ as program
    from largeformer.training.signals import StopSignals

    install = StopSignals.install
    faults = [fault.split() for fault in os.environ.get("FAULTS", "").split(";") if fault]

    def install_and_break() -> StopSignals:
        handler = install()
        for rank, module, function, call, action in faults:
            if int(rank) == int(os.environ.get("RANK", "0")):
                _break(module, function, int(call), action)
        return handler

    StopSignals.install = install_and_break  # type: ignore[method-assign]
    return program.main()


def _break(module: str, name: str, call: int, action: str) -> None:
    if name == "import":
        sys.meta_path.insert(0, _AtImport(module, action))
        return
    holder: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, name, _Broken(getattr(holder, name), call, action).wrapped())


class _Broken:
    def __init__(self, original: Callable[..., Any], call: int, action: str) -> None:
        self._original, self._call, self._action, self._calls = original, call, action, 0

    def wrapped(self) -> Callable[..., Any]:
        def broken(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            if self._action.startswith("spike:"):
                return self._original(*args, **kwargs) * (50.0 if self._spikes(args) else 1.0)
            if self._calls == self._call:
                act(self._action)
            return self._original(*args, **kwargs)

        return broken

    def _spikes(self, args: Any) -> bool:
        first, last = map(int, self._action.removeprefix("spike:").split("-"))
        return any(first <= sample <= last for arg in args for sample in getattr(arg, "sample_ids", ()))


class _AtImport(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, action: str) -> None:
        self._module, self._action = module, action

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == self._module:
            sys.meta_path.remove(self)
            act(self._action)


def act(action: str) -> None:
    if action == "sleep":
        threading.Event().wait()
    elif action == "hang":
        ctypes.PyDLL(None).pause()
    elif action.startswith("pause:"):
        time.sleep(float(action.removeprefix("pause:")))
    elif action == "fail":
        raise RuntimeError("a fault of the test's making")
    else:
        target = os.getppid() if action.startswith("parent:") else os.getpid()
        for name in action.removeprefix("parent:").split("+"):
            os.kill(target, signal.Signals[name])


if __name__ == "__main__":
    sys.exit(main())
