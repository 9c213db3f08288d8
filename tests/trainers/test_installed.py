"""PEFT and Lightning Fabric, installed into a folder of their own; the other files of this folder run with them.

Neither is part of the development environment: transformers and accelerate change what they do where PEFT can be
imported. By hand:

    pip install --target DIR peft==0.21.2 lightning-fabric==2.6.6
    PYTHONPATH=DIR pytest tests/trainers
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without what they depend on and the environment has: a second torch must not be found before the first.
PACKAGES = ("peft==0.21.2", "lightning-fabric==2.6.6", "lightning-utilities==0.15.3")
FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="PEFT is there: the other files run by it")
def test_with_both_installed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *PACKAGES]
    subprocess.run(install, check=True, timeout=1200)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "passed" in run.stdout
    assert "is not installed" not in run.stdout
