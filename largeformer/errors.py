"""The one error that means "the user can mend this": the command line prints its problems and exits with code 2."""

from __future__ import annotations

from collections.abc import Sequence


class BadInputError(ValueError):
    """Bad input, found before work starts. Each problem is one sentence that names the value and the fix."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
