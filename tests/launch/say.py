"""Started by a launcher on each rank: writes down what it was told. `FOLDER` is its only argument but the launcher's own."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from largeformer.parallel.environment import discover

if __name__ == "__main__":
    told = asdict(discover(os.environ)) | {"wandb": {name: text for name, text in os.environ.items() if name.startswith("WANDB_")}}
    Path(sys.argv[-1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
