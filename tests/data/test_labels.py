"""Labels from tables and folders, and their numbers as classes."""

import json

import numpy as np
import pytest
from PIL import Image

from pfgm.data import ImageDataModule, image_sources, labels
from tests.helpers import contents, write_set


def test_whole_numbers_keep_their_values_and_names_are_numbered_in_order():
    assert labels.number_classes([3, 1, 1])[0].tolist() == [3, 1, 1]
    assert labels.number_classes(["10.0", "2.0"])[0].tolist() == [10, 2]
    assert labels.number_classes(["2000", "1999", "2001"])[0].tolist() == [1, 0, 2], "years are names"
    assert labels.number_classes(["10", "9", "-1"])[0].tolist() == [2, 1, 0]
    assert labels.number_classes(["1", "01"])[0].tolist() == [1, 0]
    assert labels.number_classes([2**70, 5])[0].tolist() == [1, 0]
    assert labels.number_classes([13, 0])[0].tolist() == [13, 0]
    assert labels.number_classes(["v1.0", "v1", "v1.0"])[0].tolist() == [1, 0, 1], "names stay as they are"
    assert labels.number_classes([14, 0])[0].tolist() == [1, 0]


def stored(names, **tables):
    """Labels of the images `names`; `tables` holds the content of a dataset.json for each folder."""
    texts = {f"{folder}/dataset.json".removeprefix("./"): json.dumps(table).encode() for folder, table in tables.items()}
    return labels.stored_labels([*names, *texts], names, texts.__getitem__, "x")


def test_the_outermost_table_counts_and_its_names_are_relative_to_it():
    names = ["top/a/0.png", "top/b/1.png"]
    outer, inner = {"labels": [["a/0.png", 4], ["b/1.png", 2]]}, {"labels": [["0.png", 7]]}
    assert stored(names, **{"top/a": inner, "top": outer}) == [4, 2]
    assert stored(names, **{".": {"labels": None}}) is None, "though there are folders"


def test_folders_below_those_in_common_are_classes():
    assert stored(["top/a/0.png", "top/b/1.png"]) == ["a", "b"]
    assert stored(["a/x/0.png", "b/y/1.png"]) == ["a", "b"], "the first level"
    assert stored(["a/0.png", "a/1.png"]) == ["a", "a"], "one class"
    assert stored(["a/0.png", "1.png"]) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"labels": [["a/0.png", 4], ["a/0.png", 5]]}, r"x/dataset.json: two labels for a/0.png, 4 and 5\. Keep one"),
        ({"labels": [["a/0.png", True]]}, "labels must be whole numbers"),
        ({"labels": [["a/0.png", "cat"]]}, "labels must be whole numbers"),
        ({"labels": [["0.png", 1]]}, "no label for 1 of 1 images, such as a/0.png"),
        ({"labels": [["a/0.png"]]}, "not in EDM's format"),
        ([1, 2], "not in EDM's format"),
    ],
)
def test_faults_in_a_table_of_edm_are_named(table, message):
    with pytest.raises(ValueError, match=message):
        stored(["a/0.png"], **{".": table})


def test_a_csv_file_may_have_a_header_quotes_and_a_byte_order_mark(tmp_path):
    table = tmp_path / "t.csv"
    for header in ("", '"name", "class"\n'):
        table.write_text(f'\ufeff{header}"./a/0.png", "big cat"\n', encoding="utf-8")
        assert labels.csv_labels(table, ["a/0.png"]) == ["big cat"]
    table.write_text("a/0.png,\n")
    with pytest.raises(ValueError, match="a row has no label"):
        labels.csv_labels(table, ["a/0.png"])


def test_a_csv_file_labels_images_in_any_order(tmp_path):
    folder = write_set(tmp_path / "images")
    names = image_sources.open_source(str(folder)).names
    table = tmp_path / "labels.csv"
    table.write_text("file,class\n" + "".join(f"{name},{10 if int(name[-6:-4]) < 12 else 9}\n" for name in reversed(names)))
    data = ImageDataModule(str(folder), size=8, labels=str(table))
    assert contents(data) == [(10 * i, 10 if i < 12 else 9) for i in range(24)], "numbers are kept as they are"
    words = labels.csv_labels(table, names)
    assert labels.number_classes(["b", "a", "b"])[0].tolist() == [1, 0, 1]
    assert labels.number_classes(["10", "9"])[1] == ["9", "10"]
    assert len(words) == 24
    table.write_text(f"{names[0]},1\n")
    with pytest.raises(ValueError, match=f"no label for 23 of 24 images, such as {names[1]}"):
        ImageDataModule(str(folder), size=8, labels=str(table))
    table.write_text("just one column\n")
    with pytest.raises(ValueError, match=r"a row has no label\. Give two columns"):
        ImageDataModule(str(folder), size=8, labels=str(table))


def test_classes_that_occur_once_or_only_among_the_held_out_count(tmp_path):
    for i, name in enumerate("aaaabbbc"):
        file = tmp_path / "images" / name / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(file)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "images" / "d.png")
    (tmp_path / "other" / "e").mkdir(parents=True)
    (tmp_path / "images" / "d.png").rename(tmp_path / "other" / "e" / "d.png")
    data = ImageDataModule(str(tmp_path / "images"), labels=True)
    assert (data.num_classes, len(data.train), len(data.held_out)) == (3, 7, 1)
    data = ImageDataModule(str(tmp_path / "images"), labels=True, held_out=str(tmp_path / "other"))
    assert (data.num_classes, data.held_out.label.tolist(), data.train.label.tolist()) == (4, [3], [0, 0, 0, 0, 1, 1, 1, 2])
