"""The data of a run: any number of sources, in several formats, as one data set."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from vreflection_hub_card import rows as row_format
from vreflection_hub_card.errors import InputError, first_line, refuse_special
from vreflection_hub_card.glyphsearch import glyphsearch_curriculum, glyphsearch_dataset
from vreflection_hub_card.rows import FEATURES, is_given, normalise_row

from .conversation_boxes import BOX_UNITS
from .conversations import FORMS, conversation_row, unread_columns
from .gqa import check_options, gqa_rows, read_scene_graphs
from .image_folders import ImageFolders
from .images import place_image
from .json_files import read_json_rows, read_rows
from .released import read_meta, released_rows
from .visual_cot import visual_cot_rows


logger = logging.get_logger(__name__)


def form_rows(form: str, path: str, folders: ImageFolders, boxes: str | None = None) -> Iterator[dict[str, Any]]:
    """Reads a file of rows in the project's own format, or in another trainer's form."""

    def fill(row: dict[str, Any], item: dict[str, Any]):
        row.update(_form_row(item, row["id"], row["dataset"], folders.root, form, boxes))

    return read_rows(path, Path(path).stem, fill)


def _form_row(
    item: dict[str, Any], row_id: str, dataset: str, folder: str | None, form: str, boxes: str | None
) -> dict[str, Any]:
    if form in FORMS:
        return conversation_row(item, row_id, dataset, folder, form, boxes)
    return _place_images(normalise_row(item, row_id, dataset), folder)


GLYPHSEARCH = {"glyphsearch": glyphsearch_dataset, "glyphsearch_curriculum": glyphsearch_curriculum}
# Rows that may also come from wherever `datasets` reads them, and not only from JSON.
ROW_FORMATS = ("messages", *FORMS)
READERS = {
    **{form: partial(form_rows, form) for form in ROW_FORMATS},
    "visual_cot": visual_cot_rows,
    "gqa": gqa_rows,
    "released": released_rows,
}
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SOURCE_FORMATS = (*READERS, "released_meta", *GLYPHSEARCH)
ROWS_PEEKED = 50  # of a source, to name the columns that nothing reads


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
            - `format`: `"messages"` (the default), `"llava"`, `"ms_swift"`, `"llama_factory"`, `"visual_cot"`, `"gqa"`,
              `"released"`, `"released_meta"`, `"glyphsearch"` or `"glyphsearch_curriculum"`;
            - `path`: for `"messages"` and other trainers' forms a Hub id, a local folder, or a `.parquet`, `.json` or
              `.jsonl` file, which may be `.gz`; for `"visual_cot"` a file of the release or the folder with its `*_cot_train.jsonl`; for
              `"gqa"` a file of questions or a folder with several, `*questions*.json`; for `"released"` the authors'
              formatted JSON, for `"released_meta"` their list of such files; for GlyphSearch nothing;
            - `image_folder`: where relative paths of pictures begin, by default at the file's folder; `"released_meta"`
              has its own;
            - `weight`: its share of the mixture, relative to the others';
            - `paths`: for `"visual_cot"`, whether the boxes of a question become the path of one reflection instead of a
              reflection each (`False`, if left out);
            - `boxes`: for other trainers' forms, in what their rows give boxes: `"pixels"`, `"thousandths"` or `"fractions"`,
              see [`conversation_row`](conversations.py);
            - `scene_graphs`, `balanced`, `answers`, `num_latent_tokens`: for `"gqa"`, the file of the scene graphs, and the
              options of [`gqa_rows`](gqa.py);
            - for `"messages"` and other trainers' forms arguments of `datasets.load_dataset`, such as `split` (`"train"`, if
              left out), `name` or `data_files`; for GlyphSearch those of its functions.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows as they are used. Otherwise they are read
            once, into the cache of `datasets`, and again when a file has changed, or a folder with
            pictures; a picture that was overwritten by one of another size needs another name. Pictures that
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
    refuse_special(parsed.path)
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
    if "boxes" in options and (parsed.format not in FORMS or options["boxes"] not in BOX_UNITS):
        raise ValueError(
            f"{where}: `boxes` is for {', '.join(map(repr, FORMS))} and one of {', '.join(map(repr, BOX_UNITS))}, got "
            f"{options['boxes']!r} for {parsed.format!r}."
        )
    if parsed.format not in ROW_FORMATS or _is_json(parsed.path):
        if parsed.format != "gqa" and (unknown := [name for name in options if name not in ("paths", "boxes")]):
            raise ValueError(f"{where}: a file read as {parsed.format!r} takes no {', '.join(map(repr, unknown))}.")
        if not os.path.exists(parsed.path):
            raise FileNotFoundError(f"{where}: there is no file {parsed.path}.")
    return parsed


def _load(source: Source, streaming: bool) -> Dataset | IterableDataset:
    """Loads a source with the columns of `FEATURES`; whatever a library raises, the message names the source."""
    try:
        return _load_source(source, streaming)
    except Exception as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        where = source.path or source.format
        if isinstance(reason, (ValueError, OSError)) and where in str(reason):
            raise reason from error
        raise InputError(f"{where}: can't be read as rows ({first_line(reason)})") from error


def _load_source(source: Source, streaming: bool) -> Dataset | IterableDataset:
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
    if source.format in ROW_FORMATS:
        if not _is_json(source.path):
            return _load_stored(source, folder, streaming)
        _name_unread(source, islice(read_json_rows(path), ROWS_PEEKED))
    pattern = "*questions*.json" if source.format == "gqa" else "*_cot_train.jsonl"
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"There are no files {pattern} in {path}.")
    return _load_files(source.format, files, folder, streaming, source.options)


def _name_unread(source: Source, rows: Iterable[Any]):
    """Logs the columns of a source's first rows that hold something and that nothing reads."""
    found = {column: None for row in rows if isinstance(row, dict) for column in row if is_given(row[column])}
    if unread := unread_columns(found, source.format):
        logger.warning(f"{source.path}: columns that nothing reads: {', '.join(unread)}.")


def _load_stored(source: Source, folder: str | None, streaming: bool) -> Dataset | IterableDataset:
    """Loads rows that `datasets` reads itself."""
    options = {"split": "train", **source.options}
    boxes = options.pop("boxes", None)
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
    encoded = dataset.with_format("arrow")
    first = next(iter(encoded.iter(ROWS_PEEKED)), None)
    _name_unread(source, () if first is None else first.to_pylist())
    # In Arrow's format pictures are what is stored, bytes or a path, and aren't decoded and encoded again.
    rows = encoded.map(
        _normalise_table,
        batched=True,
        batch_size=100,
        with_indices=True,
        features=FEATURES,
        fn_kwargs={
            "features": _keep_encoded(dataset.features),
            "name": name,
            "folder": folder,
            "form": source.format,
            "boxes": boxes,
            "stamps": (*_code_stamps(), *(ImageFolders(folder).stamp() if folder and boxes == "pixels" else ())),
        },
    )
    return rows.with_format(None)


def load_saved(path: str, split: str | None) -> Dataset | DatasetDict:
    """What `save_to_disk` wrote; of several splits the named one, where there is one of this name."""
    dataset = load_from_disk(path)
    return dataset.get(split, dataset) if isinstance(dataset, dict) else dataset


def _normalise_table(
    table: pa.Table,
    indices: list[int],
    features: Features | None,
    name: str,
    folder: str | None,
    form: str,
    boxes: str | None,
    stamps: tuple,
) -> pa.Table:
    """Rows as `datasets` stores them, brought to `FEATURES`; `stamps` tells its cache when this code changes."""
    stored = table.to_pylist()
    rows = stored if features is None else map(features.decode_example, stored)
    rows = [
        FEATURES.encode_example(_form_row(row, f"{name}-{index}", name, folder, form, boxes))
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
    return {**row, "images": [place_image(image, folder) for image in row["images"]]}


def _is_json(path: str) -> bool:
    return path.removesuffix(".gz").endswith((".json", ".jsonl"))


def _stamps(files: Iterable[str | Path]) -> tuple:
    """Names and states of files: what is stored of an older state isn't used."""
    states = [(path, os.stat(path)) for path in files]
    return tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)


def _code_stamps() -> tuple:
    return _stamps([*sorted(Path(__file__).parent.glob("*.py")), row_format.__file__])
