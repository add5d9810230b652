"""`vreflection publish`: a checkpoint onto the Hub."""

import argparse
from contextlib import nullcontext

from .arguments import checkpoint_path, quiet_transformers


def add_parser(commands) -> None:
    """Adds `vreflection publish`."""
    parser = commands.add_parser(
        "publish",
        help="put a checkpoint on the Hub",
        description="Checks a checkpoint and publishes it: it must load and reflect in a clean process by "
        "trust_remote_code, its card must be complete, and no file may be pickle, belong to an optimizer, or hold a local "
        "path or a token. Then one commit replaces what the repository holds, is loaded from the Hub, and is tagged.",
    )
    parser.add_argument("checkpoint", type=checkpoint_path, metavar="CKPT", help="the checkpoint's folder")
    parser.add_argument("repo", metavar="REPO", help="a Hub id; it is made if it doesn't exist")
    parser.add_argument("--private", action="store_true", help="make it private, if it doesn't exist")
    parser.add_argument(
        "--inference-only",
        action="store_true",
        help="leave out BCM, and DAC unless the checkpoint decodes by it; the folder stays as it is",
    )
    parser.add_argument("--revision", metavar="TAG", help="tag the commit, e.g. v1")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and list the files; needs no network and no token"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection publish`."""
    quiet_transformers()
    from huggingface_hub import HfApi
    from huggingface_hub.utils import enable_progress_bars

    from vreflection_hub_card.inference.checkpoints import checkpoint_config
    from vreflection_hub_card.publishing.upload import (
        Destination,
        check_before_publishing,
        check_names,
        find_destination,
        inference_only,
        publish,
    )

    check_names(options.repo, options.revision)
    checkpoint_config(options.checkpoint)
    api = HfApi()
    destination = Destination(options.repo)
    if not options.dry_run:  # first of all: a wrong token costs no time
        destination = find_destination(api, options.repo, options.private, options.revision)
    repo = destination.repo_id
    source = inference_only(options.checkpoint, repo) if options.inference_only else nullcontext(options.checkpoint)
    with source as folder:
        if options.dry_run:
            sizes = {name: file.size for name, file in check_before_publishing(folder).items()}
            for name, size in sizes.items():
                print(f"{size:>16,}  {name}")
            print(f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files would go to {repo}; nothing was uploaded.")
        else:
            enable_progress_bars()  # `vreflection` turns them off; an upload takes long
            publish(folder, destination, api)
            print(f"{api.endpoint}/{repo}")
