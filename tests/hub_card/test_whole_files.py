"""A file is written whole or not at all."""

import json

import pytest

from vreflection_hub_card.card import save_card
from vreflection_hub_card.inference.drawing import save_figure
from vreflection_hub_card.whole_files import replacing


class Full:
    """What it writes breaks off half way, as on a full disk."""

    def write(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    save = savefig = write


@pytest.mark.parametrize("write, name", [(save_card, "README.md"), (save_figure, "map.png")])
def test_what_was_there_survives_a_full_disk(tmp_path, write, name):
    (tmp_path / name).write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write(Full(), tmp_path if write is save_card else tmp_path / name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "before"}


def test_a_link_stays_one_and_a_draft_keeps_its_suffix(tmp_path):
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    with replacing(tmp_path / "link.json") as draft:
        draft.write_text("after")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "after"
    with replacing(tmp_path / "new.json") as draft:
        assert draft.suffix == ".json" and not (tmp_path / "new.json").exists()
        draft.write_text("{}")
    assert json.loads((tmp_path / "new.json").read_text()) == {} and not draft.exists()
