"""Finds the pictures of Visual CoT, in the folders of its own archive or of the data sets that it is made of."""

import os
from contextlib import suppress
from pathlib import Path


# Folders of each data set below the image folder, in the order in which they are searched.
FOLDERS = {
    "coco": ("coco", "coco/train2017", "coco/train2014"),
    "cub": ("cub", "cub/CUB_200_2011/images"),
    "docvqa": ("docvqa",),
    "dude": ("dude", "dude/viscot/dude", "dude/DUDE_train-val-test_binaries/images/train"),
    "flickr30k": ("flickr30k", "flickr30k/flickr30k-images", "flickr30k/images"),
    "gqa": ("gqa", "gqa/images"),
    "infographicsvqa": ("infographicsvqa",),
    "openimages": ("openimages", *(f"openimages/train_{part}" for part in range(6))),
    "sroie": ("sroie", "sroie/viscot/sroie"),
    "textcap": ("textcap", "textvqa", "textvqa/train_images"),
    "textvqa": ("textvqa", "textvqa/train_images"),
    "v7w": ("v7w", "v7w/images", "visual7w", "visual7w/images"),
    "vsr": ("vsr", "vsr/images"),
}
ALIASES = {"visual7w": "v7w", "infovqa": "infographicsvqa", "textcaps": "textcap"}
# What the archive, or a file's paths, put before the data set's folder.
ROOTS = ("", "cot_image_data", "cot", "viscot")


class ImageFolders:
    """Finds the pictures of Visual CoT under one folder; raises a NotADirectoryError if there is none.

    It holds the data sets' folders (or `cot_image_data`, as the archive is packed), or the pictures of a single data set.
    """

    def __init__(self, root: str | Path):
        self.root = os.path.abspath(root)
        if not os.path.isdir(self.root):
            raise NotADirectoryError(f"`image_folder`: there is no folder {self.root}.")
        candidates = {
            name: [os.path.join(self.root, above, folder) for folder in folders for above in ROOTS]
            for name, folders in FOLDERS.items()
        }
        self.folders = {name: [path for path in paths if os.path.isdir(path)] for name, paths in candidates.items()}

    def stamp(self) -> tuple:
        """Changes when a file or a folder is added below the root, or taken away."""
        found = {}
        for top in (self.root, *(path for paths in self.folders.values() for path in paths)):
            for folder, *_ in () if top in found else os.walk(top):  # a data set's folder may be a link
                with suppress(FileNotFoundError):  # taken away meanwhile
                    found[folder] = os.stat(folder).st_mtime_ns
        return tuple(sorted(found.items()))

    def find(self, image: str, dataset: str | None = None) -> str:
        """The path of a picture; where there is none, the path that it should have.

        A file gives it as absolute, below the root (`cot/cub/...`, `viscot/docvqa/...`), or below its data set's folder.
        """
        as_written = os.path.join(self.root, image)
        if os.path.isabs(image) or os.path.exists(as_written):
            return as_written
        parts = image.split("/")
        if parts[0] in ROOTS and len(parts) > 1:
            parts = parts[1:]
        first = ALIASES.get(parts[0], parts[0])
        if first in FOLDERS and len(parts) > 1:
            dataset, parts = first, parts[1:]
        below, name = "/".join(parts), parts[-1]
        folders = self.folders.get(ALIASES.get(dataset, dataset), [])
        for path in dict.fromkeys(os.path.join(folder, end) for end in (below, name) for folder in folders):
            if os.path.exists(path):
                return path
        return os.path.join(folders[0], below) if folders else as_written
