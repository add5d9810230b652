"""`vreflection space`: the demo page on this machine, or as a folder for the Hub."""

import argparse
from pathlib import Path

from vreflection_hub_card.embedded import EMBEDDED_NAME, is_embedded
from vreflection_hub_card.errors import InputError

from .arguments import positive, quiet_transformers, writing


HOST = "127.0.0.1"


def add_parser(commands) -> None:
    """Adds `vreflection space`."""
    parser = commands.add_parser(
        "space",
        help="open a page to ask about pictures and see where each latent step looks",
        description="Starts the demo page on this machine, for this machine only. It sends nothing anywhere.",
    )
    parser.add_argument(
        "--model", help=f"a folder, a Hub id, or the embedded checkpoint, {EMBEDDED_NAME} (the default)"
    )
    parser.add_argument("--port", type=positive, help="default: the first free one from 7860 on")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write a folder to upload as a Space of the Hub instead"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection space`."""
    if options.export is not None:
        if options.model or options.port or options.device:
            raise InputError("--export only writes a folder; on the Space the variable MODEL names the checkpoint")
        from vreflection_hub_card.space.export import export_space

        with writing(options.export):
            export_space(options.export)
        print(f"Written to {options.export}; hf upload YOU/NAME {options.export} --repo-type space")
        return
    quiet_transformers()
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint

    try:
        from vreflection_hub_card.space.page import build_page, launch_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError('the page needs gradio: pip install "vreflection[space]"') from error
    folder = checkpoint_folder(options.model or EMBEDDED_NAME)
    page = build_page(*load_checkpoint(folder, options.device), embedded=is_embedded(folder))
    try:
        address = launch_page(page, server_name=HOST, server_port=options.port)
    except (OSError, OverflowError) as error:
        where = f"port {options.port}" if options.port else "all ports from 7860 on"
        raise InputError(f"{where} can't be used, perhaps it is taken; --port names another") from error
    print(f"{address}   (Ctrl+C ends it)", flush=True)
    page.block_thread()
