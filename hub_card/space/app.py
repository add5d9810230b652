"""The main file of a Space on the Hub, beside the two packages: `python app.py`.

The Space's variable `MODEL` names the checkpoint, a Hub id; without it the embedded one is shown.
"""

import os


if "SPACE_ID" in os.environ:
    import spaces  # noqa: F401  ZeroGPU wants to come before torch

from vreflection_hub_card.embedded import EMBEDDED_NAME, is_embedded
from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint
from vreflection_hub_card.space.page import build_page, launch_page


def main() -> None:
    """Loads the checkpoint and serves the page, where and on the port that the Space says."""
    folder = checkpoint_folder(os.environ.get("MODEL", EMBEDDED_NAME))
    page = build_page(*load_checkpoint(folder), embedded=is_embedded(folder))
    launch_page(page)
    page.block_thread()


if __name__ == "__main__":
    main()
