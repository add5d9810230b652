import math

import pytest
from datasets import Dataset
from PIL import Image

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.rows import make_bad_row
from vreflection_training.data.data_report import DataReport, format_report, padding_share, report_data
from vreflection_training.data.histogram import round_edges, text_counts, text_histogram
from vreflection_training.data.inspection import inspect_row


RULE = {"max_length": None, "max_samples": 4, "long_length": 4096, "lookahead": 256}


def make_row(number, images, box=(0.1, 0.2, 0.3, 0.4), words=1, dataset="docvqa"):
    reflection = [{"type": "reflection", "box": list(box), "image_index": 0}] if box else []
    question = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What? " * words}]
    answer = [*reflection, {"type": "text", "text": "A"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"r{number}", "dataset": dataset, "images": images, "messages": messages}


@pytest.fixture
def rows(tmp_path):
    """Twelve rows: 8 good ones, one of them without a reflection; of 13 pictures, 2 are missing and one is cut off."""
    good, cut, gone = (str(tmp_path / name) for name in ("good.jpg", "cut.jpg", "gone.jpg"))
    Image.effect_noise((84, 56), 90).save(good)
    Image.effect_noise((84, 56), 90).save(cut)
    with open(cut, "r+b") as file:
        file.truncate(700)
    listed = [make_row(number, [good], words=10 * number) for number in range(6)]
    listed += [make_row(6, [good, cut]), make_row(7, [good], box=None, dataset="gqa")]
    listed += [make_row(8, [gone]), make_row(9, [good, gone]), make_row(10, [good], box=(0.5, 0, 0.2, 1))]
    return listed + [make_bad_row("r11", "gqa", "`bboxs` is missing.")]


@pytest.mark.parametrize("streaming", [False, True])
def test_everything_is_counted_and_no_bad_row_stops_it(processor, rows, streaming):
    dataset = Dataset.from_list([{"error": None, **row} for row in rows])
    report = report_data(dataset.to_iterable_dataset() if streaming else dataset, processor, RULE)
    assert (report.rows, report.images, report.missing) == (12, 13, 2)
    assert report.datasets == {"docvqa": 10, "gqa": 2}
    assert report.bad == {"missing picture": 2, "box": 1, "format": 1}
    assert [problem.split(":")[0] for problem in report.named] == [
        "Sample r8",
        "Sample r9",
        "Sample r10",
        "Sample r11",
    ]
    assert report.without_reflection == 1
    assert report.lengths == [inspect_row(row, processor).tokens for row in rows[:8]]
    text = format_report(report)
    for line in (
        "rows 12",
        "docvqa 10",
        "images found 11",
        "images missing 2",
        "bad rows 4 (33.33 %)",
        "missing picture 2",
    ):
        assert line in " ".join(text.split()), line
    assert "- Sample r9: " in text


def test_decoding_finds_what_a_header_hides(processor, rows):
    report = report_data(Dataset.from_list(rows[:8]), processor, RULE, decode=True)
    assert report.bad == {"picture": 1}
    assert "cut.jpg: damaged or unreadable" in report.named[0]
    assert "read in full" in format_report(report)


def test_samples_longer_than_the_limit_are_bad_rows(processor, rows):
    lengths = [inspect_row(row, processor).tokens for row in rows[:6]]
    limit = sorted(lengths)[3]
    rule = {**RULE, "max_length": limit, "long_length": min(lengths)}
    report = report_data(Dataset.from_list(rows[:6]), processor, rule)
    assert report.bad_rows == report.bad["too long"] == 2
    assert sorted(report.lengths) == sorted(lengths)[:4]
    assert report.named[0].startswith(f"Sample r4 has {lengths[4]} tokens, above `max_length`")
    text = " ".join(format_report(report).split())
    assert f"long samples 3 (75.00 %), above {min(lengths)} tokens" in text
    assert f"longer than max_length 2, above {limit} tokens" in text


@pytest.mark.parametrize("streaming", [False, True])
def test_pack_fill_and_padding_add_up(processor, rows, streaming):
    good = [dict(rows[number % 6], id=str(number)) for number in range(40)]
    rule = {**RULE, "max_length": 300, "max_samples": 3}
    dataset = Dataset.from_list(good)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    report = report_data(dataset, processor, rule, packed=True, batch_size=3)
    total = sum(inspect_row(row, processor).tokens for row in good)
    assert sum(report.packs) == total == sum(report.lengths)
    assert max(report.packs) <= 300
    assert math.ceil(40 / 3) <= len(report.packs) < 40
    assert report.pack_fill == total / (300 * len(report.packs))
    batches = [report.lengths[start : start + 3] for start in range(0, 40, 3)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert report.padding == pytest.approx((padded - total) / padded)
    assert report.pack_padding < report.padding
    text = format_report(report)
    assert f"{len(report.packs)}, of {40 / len(report.packs):.2f} samples" in text
    assert f"{100 * report.pack_fill:.1f} % full" in text


def test_the_packs_are_those_that_training_makes(processor, rows):
    from vreflection_training.data.packing import pack_dataset

    dataset = Dataset.from_list([dict(rows[number % 6], id=str(number)) for number in range(40)])
    rule = {**RULE, "max_length": 300}
    packs, _ = pack_dataset(dataset, processor, rule, seed=3)
    report = report_data(dataset, processor, rule, packed=True, seed=3)
    lengths = [inspect_row(row, processor).tokens for row in dataset]
    assert report.packs == [sum(lengths[number] for number in pack) for pack in packs.packs]


def test_plain_fine_tuning_measures_without_reflections(processor):
    dataset = glyphsearch_dataset("train", 5)
    kept, dropped = (report_data(dataset, processor, RULE, reflect=reflect) for reflect in (True, False))
    assert [length - 10 for length in kept.lengths] == dropped.lengths
    assert "without reflection" in format_report(kept)
    assert "without reflection" not in format_report(dropped)


def test_lengths_of_paths_are_counted_where_there_are_any(processor, rows):
    plain = report_data(Dataset.from_list(rows[:8]), processor, RULE)
    assert plain.path_lengths == [1] * 7 and "path" not in format_report(plain)
    several = [{"type": "reflection", "boxes": [[0.1, 0.2, 0.3, 0.4]] * count} for count in (3, 2, 3, 9)]
    listed = [make_row(f"p{number}", rows[0]["images"]) for number in range(4)]
    for row, part in zip(listed, several):
        row["messages"][1]["content"].insert(1, part)
    report = report_data(Dataset.from_list(listed), processor, RULE)
    assert report.bad == {"path too long": 1}
    assert "Reflection 1 has 9 boxes, but only 8 latent steps" in report.named[0]
    assert report.path_lengths == [1, 3, 1, 2, 1, 3]
    text = format_report(report)
    assert "reflections 6 with a path 3 (50.00 %) boxes of each mean 1.83, most 3" in " ".join(text.split())
    assert text_counts(report.path_lengths) == [f"1  {'█' * 40}  3", f"2  {'█' * 13:<40}  1", f"3  {'█' * 27:<40}  2"]
    assert "\n".join(text_counts(report.path_lengths)) in text
    assert "path" not in format_report(report_data(Dataset.from_list(listed), processor, RULE, reflect=False))


def test_padding_is_none_where_lengths_are_equal():
    assert padding_share([5] * 7, 3) == 0
    assert padding_share([1, 3], 2) == pytest.approx(2 / 6)
    assert padding_share([], 2) == 0


def test_only_ten_bad_rows_are_named(processor):
    dataset = Dataset.from_list([make_bad_row(str(number), "a", "broken") for number in range(14)])
    report = report_data(dataset, processor, RULE)
    assert report.bad_rows == 14 and len(report.named) == 10
    assert format_report(report).endswith("and 4 more.")
    assert "tokens" not in format_report(report)


@pytest.mark.parametrize("longest", [0, 1, 15, 16, 99, 100, 799, 800, 16_384, 123_456])
def test_bins_hold_every_length_once(longest):
    edges = round_edges(longest, 20)
    width = edges[1] - edges[0]
    assert set(edges[1:] - edges[:-1]) == {width} and edges[0] == 0 and longest < edges[-1]
    assert str(width).rstrip("0") in ("1", "2", "5")
    assert width == 1 or longest >= 20 * width / 2.5 - 1  # not needlessly wide
    lengths = [0, longest // 3, longest // 2, longest]
    lines = text_histogram(lengths)
    assert len(lines) == len(edges) - 1 <= 20
    expected = [sum(low <= length < high for length in lengths) for low, high in zip(edges, edges[1:])]
    assert [int(line.split()[-1]) for line in lines] == expected and expected[-1] > 0
    assert all(("█" in line) == (count > 0) for line, count in zip(lines, expected))


def test_the_histogram_is_a_picture(tmp_path):
    rule = {**RULE, "max_length": 16384}
    report = DataReport(rule, lengths=[300, 400, 400, 5000])
    report.save_histogram(tmp_path / "lengths.png")
    picture = Image.open(tmp_path / "lengths.png").convert("RGB")
    assert picture.size == (1280, 640)
    assert len(picture.getcolors(1 << 20)) > 20
