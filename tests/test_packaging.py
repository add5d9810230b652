"""What is installed is what is here."""

import re
from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = set(config["options"]["packages"].split())
    folders = {"modeling_vreflection": "", "hub_card": "vreflection_", "training": "vreflection_"}
    found = {
        prefix + ".".join(path.parent.relative_to(ROOT).parts)
        for folder, prefix in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert named == found


def test_no_package_needs_the_experiments():
    folders = ("modeling_vreflection", "hub_card", "training")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files and not [
        path for path in files if re.search(r"^\s*(from|import) experiments", path.read_text(), re.M)
    ]
