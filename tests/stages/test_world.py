"""What a stage finds in the world that it enters."""

import socket

import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode

from largeformer.launching.local import rank_environ
from largeformer.parallel import cpu_products
from largeformer.parallel.cpu_products import Bf16ProductsInFp32
from largeformer.stages.common.world import enter_world
from tests.commands import run_command
from tests.recipes import tiny_recipe


@pytest.mark.parametrize(
    "precision, has, converts",
    [
        pytest.param("bf16", False, True, id="bf16 on a CPU without it"),
        pytest.param("bf16", True, False, id="bf16 on a CPU with it"),
        pytest.param("fp32", False, False, id="fp32"),
    ],
)
def test_products_of_bf16_are_converted_where_the_cpu_needs_it(monkeypatch, precision, has, converts):
    monkeypatch.setattr(cpu_products, "has_bf16", lambda: has)
    with enter_world(tiny_recipe(train={"precision": precision}), training=False):
        assert isinstance(_get_current_dispatch_mode(), Bf16ProductsInFp32) is converts
    assert _get_current_dispatch_mode() is None


def test_a_port_that_another_run_has_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["pretrain", "-c", "launch/recipes/quickstart.yaml", f"run.output_dir={tmp_path / 'run'}"]
        (done,) = run_command(*command, environ=rank_environ({}, 0, 2, port), timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{port}: that port is taken" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "pretrain").exists()
