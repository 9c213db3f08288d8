"""PEFT, Lightning Fabric and TRL, installed into a folder of their own; the other files of this folder run with them.

None is part of the development environment: transformers and accelerate change what they do where PEFT can be
imported. By hand:

    pip install --no-deps --target DIR PACKAGES
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
PACKAGES = (
    *("peft==0.21.2", "lightning-fabric==2.6.6", "lightning-utilities==0.15.3", "trl==1.16.0"),
    # What datasets needs (TRL needs it).
    *("datasets==5.2.0", "pyarrow<22", "pandas", "dill==0.4.1", "multiprocess", "xxhash"),
    *("python-dateutil", "six", "pytz", "tzdata"),
)
FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="PEFT is there: the other files run by it")
def test_with_all_installed(tmp_path: Path) -> None:
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
