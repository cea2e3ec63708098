"""Which checkpoints stay: the newest, every so many steps, the best. And never the last valid one goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.checkpoint.commit import committed, step_of
from largeformer.checkpoint.manifest import Digest, write_manifest
from largeformer.checkpoint.retention import Policy, drop_old
from tests.checkpoint.folders import save

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0, 50: 2.75}

# policy -> what is kept
POLICIES: dict[str, tuple[Policy, list[int]]] = {
    "the newest": (Policy(1), [50]),
    "the two newest": (Policy(2), [40, 50]),
    "more than there are": (Policy(9), [10, 20, 30, 40, 50]),
    "every twentieth step": (Policy(1, keep_every=20), [20, 40, 50]),
    "the best, of equals the newer": (Policy(1, keep_best=1), [40, 50]),
    "the three best": (Policy(1, keep_best=3), [20, 30, 40, 50]),
    "the largest is best": (Policy(1, keep_best=1, mode="max"), [10, 50]),
    "by a metric that is not there": (Policy(1, keep_best=2, metric="val_bits_per_byte"), [50]),
    "all together": (Policy(1, keep_every=30, keep_best=1), [30, 40, 50]),
}


@pytest.mark.parametrize(("policy", "kept"), POLICIES.values(), ids=POLICIES)
def test_policy(tmp_path: Path, policy: Policy, kept: list[int]) -> None:
    for step, loss in LOSSES.items():
        save(tmp_path, step, val_loss=loss)
    (tmp_path / "step_00000007.tmp").mkdir()
    dropped = drop_old(tmp_path, policy)
    assert [step_of(path) for path in committed(tmp_path)] == kept
    assert {path.name for path in dropped} == {f"step_{step:08d}.dropped" for step in LOSSES if step not in kept}
    assert (tmp_path / "step_00000007.tmp").exists()


def test_a_validation_of_another_step_is_not_this_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 10, val_loss=3.0)
    save(tmp_path, 20)
    state = tmp_path / "step_00000020" / "state.json"
    state.write_text(state.read_text().replace("{}", '{"step": 19, "val_loss": 1.0}'))
    write_manifest(tmp_path / "step_00000020", {"state.json": Digest.of(state.read_bytes())})
    save(tmp_path, 30)
    drop_old(tmp_path, Policy(1, keep_best=1))
    assert [step_of(path) for path in committed(tmp_path)] == [10, 30]


def test_a_damaged_newer_one_does_not_push_out_the_last_valid_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        (tmp_path / f"step_{step:08d}" / "weights" / "rank_00000.safetensors").write_bytes(b"short")
    assert drop_old(tmp_path, Policy(1)) == []
    assert [step_of(path) for path in committed(tmp_path)] == [10, 20, 30]
