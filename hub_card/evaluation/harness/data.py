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


def load_benchmark(benchmark: Benchmark, folder: str | Path | None = None) -> Dataset:
    """Loads all rows of a benchmark, its subsets one after another.

    Args:
        benchmark (`Benchmark`): The benchmark.
        folder (`str` or `Path`, *optional*): A local folder with the files `SPLIT*.parquet`, in folders named like the
            subsets where there are any. Without it the rows come from the Hub, or from its cache.

    Raises:
        InputError: A folder without these files, or for rows that are made; a Hub that can't be reached.
    """
    if benchmark.rows is not None:
        if folder is not None:
            raise InputError(f"{folder}: {benchmark.name} is not loaded from files")
        return Dataset.from_list(benchmark.rows())
    if folder is not None:
        parts = [load_folder(Path(folder) / subset, benchmark) for subset in benchmark.counts]
    else:
        try:
            parts = download_rows(benchmark)
        except OSError as error:
            raise InputError(f"{benchmark.name}: {benchmark.dataset} can't be downloaded ({error})") from error
    rows = concatenate_datasets(parts)
    # Pictures stay encoded until they are asked about.
    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def download_rows(benchmark: Benchmark) -> list[Dataset]:
    """Loads the subsets from the Hub."""
    if benchmark.name in PICTURE_FILES:
        root = snapshot_download(benchmark.dataset, repo_type="dataset", revision=benchmark.revision)
        return [load_beside_pictures(benchmark, Path(root))]
    return [
        load_dataset(benchmark.dataset, subset or benchmark.config, split=benchmark.split, revision=benchmark.revision)
        for subset in benchmark.counts
    ]


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
    paths = [str(root / picture(row)) for row in rows]
    return rows.remove_columns([name for name in rows.column_names if name == "image"]).add_column("image", paths)


def check_rows(benchmark: Benchmark, rows: Dataset) -> None:
    """Checks before anything is asked that no item is missing or there twice, and that each has its pictures.

    Raises:
        InputError: Another number of items, two with the same id, or a missing picture, by the item's id.
    """
    items = [(item.id, item.groups.get("subset", "")) for item in map(benchmark.item, rows)]
    found = Counter(subset for _, subset in items)
    for subset in benchmark.counts:
        benchmark.check_count(found[subset], subset)
    if double := [name for name, count in Counter(name for name, _ in items).items() if count > 1]:
        raise InputError(f"{benchmark.name}: {len(double)} ids stand for several items, {double[0]} first")
