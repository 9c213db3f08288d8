"""The config of a model on the Hugging Face Hub, from the cache or from the network."""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from llcompile.errors import SpecError

_HUB = "https://huggingface.co"
_PART = r"[A-Za-z0-9][\w.-]*"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_id(spec: str) -> bool:
    """Whether SPEC looks like org/name, and is no path of which a part exists."""
    return re.fullmatch(f"{_PART}/{_PART}", spec) is not None and not Path(spec).parent.exists()


def config(name: str, transformers: Any) -> Any:
    """The config of `org/name`; its weights are not loaded, and no code of its repository is run.

    Raises:
        SpecError: there is no such model, no network, or a config that transformers does not know.
    """
    offline = _unreachable()
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=bool(offline))
    except Exception as error:  # of huggingface_hub, of the network, or of the config
        if offline:
            raise SpecError(
                f"{name} is not in the cache of the Hub, and {offline}. Download its config.json elsewhere, and name "
                "that file"
            ) from error
        raise SpecError(f"no config from the Hub for {name}: {str(error).strip().splitlines()[0]}") from error


def _unreachable() -> str:
    """Why the Hub cannot be asked, or "": found in a moment, where its client would try for half a minute."""
    asked = next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)
    if asked:
        return f"{asked} is set"
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or _HUB)
    if urllib.request.getproxies():  # which look names up themselves
        return ""
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError as error:
        return f"there is no network ({address.hostname}: {error.strerror or error})"
    return ""
