"""What is in the tree is in the wheel, and importing the client stays light."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_of_the_tree_is_listed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join(init.parent.relative_to(root).parts)
        for root in (ROOT / "client", ROOT / "daemons")
        for init in root.rglob("__init__.py")
    }
    assert listed == found


def test_importing_seamark_loads_neither_torch_nor_zmq() -> None:
    code = "import seamark, sys; print(sorted({'torch', 'zmq', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_does_not_import_the_daemons() -> None:
    sources = (ROOT / "client").rglob("*.py")
    imports = re.compile(r"^\s*(from|import) seamarkd\b", re.MULTILINE)
    assert [path for path in sources if imports.search(path.read_text())] == []
