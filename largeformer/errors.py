"""The errors that the command line tells in sentences: bad input, which the user can mend (exit code 2), and a result that fails (1)."""

from __future__ import annotations

from collections.abc import Sequence


class BadInputError(ValueError):
    """Bad input, found before work starts. Each problem is one sentence that names the value and the fix."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class StageFailed(RuntimeError):
    """A stage did its work, and the result is not good enough: the command line prints the problems and exits with code 1."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
