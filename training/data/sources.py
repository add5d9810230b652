"""The data of a run: any number of sources, in several formats, as one data set."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from vreflection_hub_card.glyphsearch import glyphsearch_curriculum, glyphsearch_dataset
from vreflection_hub_card.rows import FEATURES, normalise_row

from .gqa import check_options, gqa_rows, read_scene_graphs
from .image_folders import ImageFolders
from .images import is_url
from .json_files import read_rows
from .released import read_meta, released_rows
from .visual_cot import visual_cot_rows


def message_rows(path: str, folders: ImageFolders) -> Iterator[dict[str, Any]]:
    """Reads a file of rows in the project's own format."""

    def fill(row: dict[str, Any], item: dict[str, Any]):
        row.update(_place_images(normalise_row(item, row["id"], row["dataset"]), folders.root))

    return read_rows(path, Path(path).stem, fill)


GLYPHSEARCH = {"glyphsearch": glyphsearch_dataset, "glyphsearch_curriculum": glyphsearch_curriculum}
READERS = {"messages": message_rows, "visual_cot": visual_cot_rows, "gqa": gqa_rows, "released": released_rows}
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SOURCE_FORMATS = (*READERS, "released_meta", *GLYPHSEARCH)


@dataclass
class Source:
    """One entry of `load_rows`' list, checked."""

    format: str
    path: str | None
    image_folder: str | None
    options: dict[str, Any]


def load_rows(
    sources: list[dict[str, Any]], *, streaming: bool = False, seed: int = 0, shuffle_buffer: int | None = None
) -> Dataset | IterableDataset:
    """Loads sources in any format as one data set of rows with `id`, `dataset`, `images` and `messages`.

    Pictures stay files (`{"path": ..., "bytes": ...}`) until they are needed. A row that its reader can't understand comes
    with what is wrong in `error`.

    ```python
    load_rows(
        [
            {"path": "Visual-CoT/metadata", "format": "visual_cot", "image_folder": "Visual-CoT/cot_image_data", "weight": 3},
            {"path": "someone/other-questions", "split": "train[:1000]", "weight": 1},
        ]
    )
    ```

    Args:
        sources (`list[dict]`): For each source
            - `format`: `"messages"` (the default), `"visual_cot"`, `"gqa"`, `"released"`, `"released_meta"`,
              `"glyphsearch"` or `"glyphsearch_curriculum"`;
            - `path`: for `"messages"` a Hub id, a local folder, or a `.parquet`, `.json` or `.jsonl` file; for
              `"visual_cot"` a file of the release or the folder with its `*_cot_train.jsonl`; for `"gqa"` a file of
              questions or a folder with several, `*questions*.json`; for `"released"` the authors' formatted JSON, for
              `"released_meta"` their list of such files; for GlyphSearch nothing;
            - `image_folder`: where relative paths of pictures begin, by default at the file's folder; `"released_meta"`
              has its own;
            - `weight`: its share of the mixture, relative to the others';
            - `paths`: for `"visual_cot"`, whether the boxes of a question become the path of one reflection instead of a
              reflection each (`False`, if left out);
            - `scene_graphs`, `balanced`, `answers`, `num_latent_tokens`: for `"gqa"`, the file of the scene graphs, and the
              options of [`gqa_rows`](gqa.py);
            - for `"messages"` arguments of `datasets.load_dataset`, such as `split` (`"train"`, if left out), `name` or
              `data_files`; for GlyphSearch those of its functions.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows as they are used. Otherwise they are read
            once, into the cache of `datasets`, and again when a file or a folder with pictures has changed. Pictures that
            a data set holds itself are copied there, too.
        seed (`int`, *optional*, defaults to 0): Seed of the mixture, and of the order of a stream.
        shuffle_buffer (`int`, *optional*): Rows of a stream among which the next one is drawn. Left out: in order.

    Returns:
        `Dataset` or `IterableDataset`: The sources one after the other; with weights, mixed until each has been read
        at least once. A single GlyphSearch source is drawn as it is read; mixed with others, its scenes are drawn beforehand.

    Raises:
        ValueError: A source that can't be understood; weights for some sources only.
        OSError: A file or folder that isn't there.
    """
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"Name at least one source of data, as a list of dicts, got {sources!r}.")
    parsed = [_parse(source, number) for number, source in enumerate(sources)]
    weights = [source.get("weight") for source in sources]
    weighted = any(weight is not None for weight in weights)
    for number, weight in enumerate(weights if weighted else ()):
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ValueError(
                f"Source {number} has `weight` {weight!r}. Give every source a weight above 0, or none of them one."
            )
    if len(parsed) == 1 and parsed[0].format in GLYPHSEARCH and not streaming:
        return GLYPHSEARCH[parsed[0].format](**parsed[0].options)
    loaded = [_load(source, streaming) for source in parsed]
    if weighted and len(loaded) > 1:
        shares = [weight / sum(weights) for weight in weights]
        rows = interleave_datasets(loaded, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        rows = _concatenate(loaded)
    if streaming and shuffle_buffer is not None:
        return rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    return rows


def _concatenate(datasets: list[Dataset] | list[IterableDataset]) -> Dataset | IterableDataset:
    return datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets)


def _parse(source: dict[str, Any], number: int) -> Source:
    where = f"Source {number}"
    if not isinstance(source, dict):
        raise ValueError(f"{where} must be a dict, got {source!r}.")
    options = {key: value for key, value in source.items() if key not in ("format", "path", "image_folder", "weight")}
    parsed = Source(source.get("format", "messages"), source.get("path"), source.get("image_folder"), options)
    if parsed.format not in SOURCE_FORMATS:
        raise ValueError(f"{where}: `format` must be one of {', '.join(SOURCE_FORMATS)}, got {parsed.format!r}.")
    if not isinstance(options.get("paths", False), bool):
        raise ValueError(f"{where}: `paths` must be true or false, got {options['paths']!r}.")
    if parsed.format in GLYPHSEARCH:
        if parsed.path is not None or parsed.image_folder is not None:
            raise ValueError(f"{where}: {parsed.format} generates its pictures: leave `path` and `image_folder` out.")
        try:
            inspect.signature(GLYPHSEARCH[parsed.format]).bind(**options)
        except TypeError as error:  # an argument that is missing, or that isn't one
            raise ValueError(f"{where}, {parsed.format}: {error}.") from error
        return parsed
    if not isinstance(parsed.path, str):
        raise ValueError(f"{where} needs `path`, got {parsed.path!r}.")
    if parsed.format == "released_meta" and parsed.image_folder is not None:
        raise ValueError(f"{where}: a meta file names its own image folders: leave `image_folder` out.")
    if parsed.image_folder is not None and not os.path.isdir(parsed.image_folder):
        raise NotADirectoryError(f"{where}: there is no `image_folder` {parsed.image_folder}.")
    if "paths" in options and parsed.format != "visual_cot":
        raise ValueError(
            f"{where}: `paths` is for 'visual_cot' and 'glyphsearch', not for {parsed.format!r}, whose rows say it themselves."
        )
    if parsed.format == "gqa":
        try:
            inspect.signature(check_options).bind(**options)
            check_options(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}, gqa: {error}") from error
    if parsed.format != "messages" or _is_json(parsed.path):
        if parsed.format != "gqa" and (unknown := [name for name in options if name != "paths"]):
            raise ValueError(f"{where}: a file read as {parsed.format!r} takes no {', '.join(map(repr, unknown))}.")
        if not os.path.exists(parsed.path):
            raise FileNotFoundError(f"{where}: there is no file {parsed.path}.")
    return parsed


def _load(source: Source, streaming: bool) -> Dataset | IterableDataset:
    """Loads a source with the columns of `FEATURES`."""
    if source.format in GLYPHSEARCH:
        return _generate(_scene_rows, streaming, (), name=source.format, options=source.options)
    if source.format == "released_meta":
        entries = read_meta(source.path)
        return _concatenate(
            [_load_files("released", [entry["data_path"]], entry["image_folder"], streaming, {}) for entry in entries]
        )
    path = Path(source.path)
    folder = source.image_folder
    if folder is None and path.exists():
        folder = path if path.is_dir() else path.parent
    folder = folder and os.path.abspath(folder)  # what is stored must be found from any working folder
    if source.format == "messages" and not _is_json(source.path):
        return _load_messages(source, folder, streaming)
    pattern = "*questions*.json" if source.format == "gqa" else "*_cot_train.jsonl"
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"There are no files {pattern} in {path}.")
    return _load_files(source.format, files, folder, streaming, source.options)


def _load_messages(source: Source, folder: str | None, streaming: bool) -> Dataset | IterableDataset:
    """Loads messages that `datasets` reads itself."""
    options = {"split": "train", **source.options}
    if source.path.endswith(".parquet"):
        dataset = load_dataset("parquet", data_files=source.path, streaming=streaming, **options)
    elif any(os.path.exists(os.path.join(source.path, name)) for name in SAVED):
        dataset = load_saved(source.path, options["split"])
        if streaming:
            dataset = dataset.to_iterable_dataset()
    else:
        dataset = load_dataset(source.path, streaming=streaming, **options)
    if isinstance(dataset, dict) and options["split"] is None and len(dataset) == 1:
        (dataset,) = dataset.values()
    if isinstance(dataset, dict):
        raise ValueError(f"{source.path}: name one `split` of {', '.join(dataset)}, got {options['split']!r}.")
    name = os.path.basename(os.path.normpath(source.path))
    # In Arrow's format pictures are what is stored, bytes or a path, and aren't decoded and encoded again.
    rows = dataset.with_format("arrow").map(
        _normalise_table,
        batched=True,
        batch_size=100,
        with_indices=True,
        features=FEATURES,
        fn_kwargs={
            "features": _keep_encoded(dataset.features),
            "name": name,
            "folder": folder,
            "stamps": _code_stamps(),
        },
    )
    return rows.with_format(None)


def load_saved(path: str, split: str | None) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote; of several splits the named one, where there is one of this name."""
    dataset = load_from_disk(path)
    return dataset.get(split, dataset) if isinstance(dataset, dict) else dataset


def _normalise_table(
    table: pa.Table, indices: list[int], features: Features | None, name: str, folder: str | None, stamps: tuple
) -> pa.Table:
    """Rows as `datasets` stores them, brought to `FEATURES`; `stamps` tells its cache when this code changes."""
    stored = table.to_pylist()
    rows = stored if features is None else map(features.decode_example, stored)
    rows = [
        FEATURES.encode_example(_place_images(normalise_row(row, f"{name}-{index}", name), folder))
        for row, index in zip(rows, indices)
    ]
    return pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)


def _keep_encoded(feature: Any) -> Any:
    """The same features, with pictures left encoded."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: _keep_encoded(value) for key, value in feature.items()})
    if isinstance(feature, List):
        return List(_keep_encoded(feature.feature), length=feature.length)
    return feature


def _load_files(
    format: str, files: list[str | Path], folder: str, streaming: bool, options: dict[str, Any]
) -> Dataset | IterableDataset:
    """Loads what a reader makes of files; the options are the reader's."""
    folders = ImageFolders(folder)
    stamps = _stamps(files)
    if format != "messages":  # whose rows say themselves where their pictures are
        stamps += folders.stamp()
    if "scene_graphs" in options:
        options = {**options, "scene_graphs": os.path.abspath(options["scene_graphs"])}
        stamps += _stamps([options["scene_graphs"]])
    files = tuple(map(os.path.abspath, files))
    return _generate(_file_rows, streaming, stamps, format=format, files=files, folder=folders.root, options=options)


def _generate(generator: Callable, streaming: bool, stamps: tuple, **options) -> Dataset | IterableDataset:
    """A data set of what a generator yields; a stored one is known by the options, its files' stamps and this code's."""
    options["stamps"] = (*stamps, *_code_stamps())
    return (IterableDataset if streaming else Dataset).from_generator(generator, features=FEATURES, gen_kwargs=options)


def _file_rows(
    format: str, files: tuple[str, ...], folder: str, options: dict[str, Any], stamps: tuple
) -> Iterator[dict[str, Any]]:
    folders = ImageFolders(folder)
    if "scene_graphs" in options:  # once for all files of questions
        options = {**options, "scene_graphs": read_scene_graphs(options["scene_graphs"])}
    for path in files:
        yield from READERS[format](path, folders, **options)


def _scene_rows(name: str, options: dict[str, Any], stamps: tuple) -> Iterator[dict[str, Any]]:
    for row in GLYPHSEARCH[name](**options):
        yield normalise_row(row, row["id"], name)


def _place_images(row: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Makes the relative paths of a row's pictures absolute."""
    return row if folder is None else {**row, "images": [_place_image(image, folder) for image in row["images"]]}


def _place_image(image: Any, folder: str) -> Any:
    if isinstance(image, str) and not is_url(image):
        return os.path.join(folder, image)
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return {**image, "path": _place_image(image["path"], folder)}
    return image


def _is_json(path: str) -> bool:
    return path.endswith((".json", ".jsonl"))


def _stamps(files: Iterable[str | Path]) -> tuple:
    """Names and states of files: what is stored of an older state isn't used."""
    states = [(path, os.stat(path)) for path in files]
    return tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)


def _code_stamps() -> tuple:
    return _stamps(sorted(Path(__file__).parent.glob("*.py")))
