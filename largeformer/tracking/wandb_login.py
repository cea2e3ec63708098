"""Whether W&B would find a key, asked before work starts."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

_ALSO: Mapping[str, str] = {"api.forge.coreweave.com": "api.wandb.ai", "api.wandb.ai": "api.forge.coreweave.com"}
"""W&B's own service has two names; a key of either serves for both."""


def login_problems(mode: str) -> list[str]:
    """A sentence where `mode` is online and there is no key for the server."""
    if mode != "online":
        return []
    import wandb

    host = urlsplit(wandb.setup(wandb.Settings(silent=True)).settings.base_url).netloc
    if has_key(host):
        return []
    return [
        f"tracking.wandb.mode is online, but there is no key for {host}: set WANDB_API_KEY, type `wandb login`, or record offline "
        "(tracking.wandb.mode=offline) and send it later by `largeformer sync`"
    ]


def has_key(host: str) -> bool:
    """Whether W&B would find a key for `host` without asking: in the environment, or in the netrc file where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            known = netrc.netrc(file)
            if known.authenticators(host) or known.authenticators(_ALSO.get(host, host)):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
