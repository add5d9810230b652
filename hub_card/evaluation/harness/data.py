"""Loading a benchmark's rows: from the Hub at the pinned revision, or from a local folder."""

from collections import Counter
from pathlib import Path

from datasets import Dataset, Image, concatenate_datasets, load_dataset
from huggingface_hub import snapshot_download

from ...errors import InputError
from ..benchmarks import Benchmark


# Data sets whose pictures lie beside the rows: the file of the rows, and where a row's picture is.
PICTURE_FILES = {
    "mmvp": ("csv", "Questions.csv", lambda row: f"MMVP Images/{row['Index']}.jpg"),
    "vstar": ("json", "test_questions.jsonl", lambda row: row["image"]),
}


def load_benchmark(benchmark: Benchmark, folder: str | None = None) -> Dataset:
    """Loads all rows of a benchmark, its subsets one after another, with their pictures still encoded.

    `folder` holds files `[SUBSET/]SPLIT*.parquet`; without it the rows come from the Hub, or from its cache. Raises an
    `InputError` for a folder without these files, or for rows that are made; for a Hub that can't be reached.
    """
    if benchmark.rows is not None:
        if folder is not None:
            raise InputError(f"{folder}: {benchmark.name} is not loaded from files")
        return Dataset.from_list(benchmark.rows())
    if folder is not None:
        parts = [load_folder(Path(folder) / subset, benchmark) for subset in subset_names(benchmark)]
    else:
        try:
            parts = download_rows(benchmark)
        except OSError as error:
            raise InputError(f"{benchmark.name}: {benchmark.dataset} can't be downloaded ({error})") from error
    if benchmark.pictures is not None:
        *parts, pictures = parts
        return join_pictures(keep_encoded(concatenate_datasets(parts)), keep_encoded(pictures))
    return keep_encoded(concatenate_datasets(parts))


def keep_encoded(rows: Dataset) -> Dataset:
    """The same rows, with pictures left encoded."""
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def join_pictures(rows: Dataset, pictures: Dataset) -> Dataset:
    """Rows that get their `image` by `imageId` when they are read, since many share a picture; `None` without one."""
    places = {name: place for place, name in enumerate(pictures["id"])}

    def add_images(batch: dict[str, list]) -> dict[str, list]:
        found = [places.get(name) for name in batch["imageId"]]
        return batch | {"image": [None if place is None else pictures[place]["image"] for place in found]}

    return rows.with_transform(add_images)


def subset_names(benchmark: Benchmark) -> list[str]:
    """The subsets of a benchmark, and last that of its pictures if they are rows of their own."""
    return [*benchmark.counts, *([] if benchmark.pictures is None else [benchmark.pictures])]


def download_rows(benchmark: Benchmark) -> list[Dataset]:
    """Loads the subsets from the Hub, see `subset_names`."""
    name, split, revision = benchmark.dataset, benchmark.split, benchmark.revision
    if benchmark.name in PICTURE_FILES:
        root = snapshot_download(name, repo_type="dataset", revision=revision)
        return [load_beside_pictures(benchmark, Path(root))]
    configs = [subset or benchmark.config for subset in subset_names(benchmark)]
    return [load_dataset(name, config, split=split, revision=revision) for config in configs]


def load_folder(folder: Path, benchmark: Benchmark) -> Dataset:
    """Loads the parquet files of a split."""
    files = sorted(str(path) for path in folder.glob(f"{benchmark.split}*.parquet"))
    if not files:
        raise InputError(f"{folder}: no files {benchmark.split}*.parquet, which would hold rows of {benchmark.name}")
    return load_dataset("parquet", data_files=files, split="train")


def load_beside_pictures(benchmark: Benchmark, root: Path) -> Dataset:
    """Loads a copy of a data set of loose files, and puts the pictures' paths into the rows."""
    builder, file, picture = PICTURE_FILES[benchmark.name]
    rows = load_dataset(builder, data_files=str(root / file), split="train")
    if "lndex" in rows.column_names:  # so MMVP's file calls it, with a small L
        rows = rows.rename_column("lndex", "Index")
    return rows.map(lambda row: {"image": str(root / picture(row))})


def check_rows(benchmark: Benchmark, rows: Dataset) -> None:
    """Checks before anything is asked that no item is missing or there twice, and has its pictures: else an `InputError`."""
    items = [(item.id, item.groups) for item in map(benchmark.item, rows)]  # without their pictures
    subset = next(iter(benchmark.counts))  # of items that don't say theirs: the only one
    found = Counter(groups.get("subset", subset) for _, groups in items)
    for subset, count in benchmark.counts.items():
        if found[subset] != count:
            where = f"{benchmark.name} {subset}".strip()
            raise InputError(
                f"{where}: {found[subset]} items instead of {count}; load {benchmark.dataset}, split {benchmark.split}, "
                f"revision {benchmark.revision}, completely"
            )
    if double := [name for name, count in Counter(name for name, _ in items).items() if count > 1]:
        raise InputError(f"{benchmark.name}: {len(double)} ids stand for several items, {double[0]} first")
