"""Whether what a finished stage has left is still there, as far as sizes tell: hashes are looked at where a checkpoint is read."""

from __future__ import annotations

from pathlib import Path

from largeformer.artifact import Artifact
from largeformer.errors import BadInputError
from largeformer.stages.common.claim import set_aside


def check_training(folder: Path, identity: str, fresh: bool) -> None:
    """A finished training of this identity whose last checkpoint is damaged counts as unfinished, and goes on from the newest whole one. On
    one process only.

    Raises BadInputError, and leaves everything, where none is whole; with `fresh` such a folder is set aside.
    """
    from largeformer.checkpoint.commit import committed
    from largeformer.checkpoint.verify import quick_problems

    done = Artifact.read(folder)
    problems = {path: quick_problems(path) for path in committed(folder / "checkpoints")}
    lost = all(problems.values())
    if lost and fresh and (problems or done is not None):
        set_aside(folder)
        return
    if done is None or done.identity != identity:
        return
    if lost:
        told = [found[0] for found in problems.values()] or [f"{folder / 'checkpoints'} holds no checkpoint"]
        raise BadInputError(
            f"{folder} has finished, but its checkpoints are damaged ({'; '.join(told)}): restore them, or pass --fresh to set the folder "
            "aside and train anew"
        )
    last = next(reversed(problems))
    if problems[last]:
        print(f"{last} is damaged ({problems[last][0]}): training goes on from the checkpoint before it", flush=True)
        done.withdraw()
