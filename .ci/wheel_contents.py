"""Checks that the wheel and the sdist in a folder hold every file of the three packages that git tracks, and nothing else."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


PACKAGES = {
    "modeling_vreflection": "modeling_vreflection",
    "hub_card": "vreflection_hub_card",
    "training": "vreflection_training",
}
# In the repository for readers, not for the program.
NOT_INSTALLED = ("hub_card/example.png", "hub_card/results/")
BESIDE_THEM = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}


def main(folder: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=True).stdout.split()
    wanted = {path for path in tracked if not path.startswith(NOT_INSTALLED)}
    installed = {"/".join([PACKAGES[path.split("/")[0]], *path.split("/")[1:]]) for path in wanted}
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        compare(wheel, {name for name in archive.namelist() if ".dist-info/" not in name}, installed)
    with tarfile.open(sdist) as archive:
        files = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    compare(sdist, {name for name in files - BESIDE_THEM if ".egg-info/" not in name}, wanted)


def compare(archive: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        sys.exit(f"{archive}: missing {sorted(wanted - found)}, too many {sorted(found - wanted)}")
    print(f"{archive}: {len(found)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
