"""The prepare command: original files to parquet, and back to examples that training and evaluation take."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import load_dataset
from miniatures import PIXELS, decoded, refer_family, reference, save_image
from tiny_processor import tiny_processor

from uground.training.collator import GroundingCollator
from uground.training.data.masks import encode_mask
from uground.training.data.prepare import main
from uground.training.data.prepared import FEATURES, prepared_dataset, prepared_splits, stored_image, write_prepared
from uground.training.evaluation.datasets import evaluation_data
from uground.training.scenes import scene_examples


@pytest.fixture
def grefcoco(tmp_path):
    references = [
        reference(1, [10], "train", "cup"),
        reference(2, [-1], "train", "whale"),
        reference(3, [12], "val", "größte Tasse"),
        reference(4, [10], "testA", "cup"),
    ]
    return refer_family(tmp_path / "original", "grefcoco", "grefs(unc).json", references)


def test_original_files_become_parquet(grefcoco, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "prepared"
    main(["grefcoco", "--root", str(grefcoco), "--output", str(output), "--split", "train", "val", "testA"])
    assert "train: 2 examples" in capsys.readouterr().out
    assert list(prepared_splits(output)) == ["testA", "train", "val"]
    (example,) = prepared_dataset(output, "val")
    assert example["query"] == "What is größte Tasse in this image? Please output segmentation mask."
    assert (example["answer"], example["phrases"], example["attribute"]) == ("[SEG].", ["größte Tasse"], "gres")
    assert example["image"].mode == "RGB" and example["ignore"] is None
    np.testing.assert_array_equal(decoded(example["masks"][0]), PIXELS[12])
    cup, whale = prepared_dataset(output, "train")
    assert "[SEG]" in cup["answer"] and "[REJ]" in whale["answer"] and whale["masks"] == []
    # the collator of training takes them as they are
    batch = GroundingCollator(tiny_processor())([cup, whale])
    np.testing.assert_array_equal(batch["target_groups"][0]["masks"][0].bool().numpy(), PIXELS[10])
    # and so does a plain load_dataset, splits and all
    loaded = load_dataset(str(output), cache_dir=str(tmp_path / "cache2"))
    assert set(loaded) == {"train", "val", "testA"}
    assert loaded["val"][0]["image"].size == (30, 20)


def test_pictures_may_lie_inside(grefcoco, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = ["grefcoco", "--root", str(grefcoco), "--split", "val", "--output"]
    main([*arguments, str(tmp_path / "by_path")])
    main([*arguments, str(tmp_path / "inside"), "--embed-images"])
    for picture in grefcoco.rglob("*.jpg"):
        picture.unlink()
    assert prepared_dataset(tmp_path / "inside", "val")[0]["image"].size == (30, 20)
    with pytest.raises(OSError, match=r"COCO_train2014_000000000001.jpg' does not exist"):
        prepared_dataset(tmp_path / "by_path", "val")[0]


def test_a_picture_of_another_size_is_refused(grefcoco, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main(["grefcoco", "--root", str(grefcoco), "--split", "val", "--output", str(tmp_path / "out")])
    save_image(grefcoco / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000001.jpg", size=(9, 9))
    with pytest.raises(ValueError, match="grefcoco-val-3-300: masks of 20x30 pixels do not fit its image of 9x9"):
        prepared_dataset(tmp_path / "out", "val")[0]


def test_what_is_asked_may_be_drawn(grefcoco, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    output = str(tmp_path / "out")
    main(["grefcoco", "--root", str(grefcoco), "--split", "train", "--output", output, "--targets-per-query", "3"])
    (joined,) = prepared_dataset(output, "train")
    assert joined["attribute"] == "multi_rs" and len(joined["masks"]) == 1
    assert joined["answer"].count("[SEG]") == joined["answer"].count("[REJ]") == 1


def test_scenes_are_prepared_with_their_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    main(["scenes", "--split", "test", "--count", "2", "--seed", "5", "--output", str(tmp_path / "out")])
    data = prepared_dataset(tmp_path / "out", "test")
    (wanted,) = scene_examples("test", 5, 1)
    assert data[1]["query"] == wanted["query"] and data[1]["masks"] == wanted["masks"]
    np.testing.assert_array_equal(np.asarray(data[1]["image"]), np.asarray(wanted["image"]))


def test_prepared_data_is_measured_without_its_talk(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (one,), (two,) = scene_examples("test", 0, 0), scene_examples("test", 0, 1)
    talk = {**one, "attribute": "vqa", "masks": [], "phrases": [], "answer": "A boat."}
    examples = [{**example, "subset": None} for example in (one, talk, two)]
    write_prepared(examples, tmp_path / "out", "val")
    data = evaluation_data(str(tmp_path / "out"), None, "val", None, 0)
    assert (data.size, data.protocols[0]) == (2, "lisa")
    assert [data.example(index)["query"] for index in range(2)] == [one["query"], two["query"]]
    assert evaluation_data(str(tmp_path / "out"), None, "val", 1, 0).size == 1
    with pytest.raises(ValueError, match="holds no prepared dataset, as uground.training.data.prepare writes it"):
        evaluation_data(str(tmp_path), None, "val", None, 0)
    write_prepared(examples[1:2], tmp_path / "out", "train")
    with pytest.raises(ValueError, match="the split holds no query about a mask"):
        evaluation_data(str(tmp_path / "out"), None, "train", None, 0)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    def broken():
        yield from scene_examples("test", 0, 0, 2)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_prepared(({**example, "subset": None} for example in broken()), tmp_path, "test")
    assert list(tmp_path.rglob("*.*")) == []


def prepared_row(**columns):
    (example,) = scene_examples("test", 0, 0)
    return {**example, "subset": None, **columns}


RLE = prepared_row()["masks"][0]
ROWS = {
    "no id": ({"id": None}, "row 1: id must be a text, got None"),
    "no query": ({"query": " "}, "row 1, broken: query must not be empty, got ' '"),
    "no answer": ({"answer": None}, "row 1, broken: answer must be a text, got None"),
    "no masks": ({"masks": None}, "row 1, broken: masks must be a list, got None"),
    "too few masks": ({"masks": []}, r"row 1, broken must have one mask per \[SEG\], got 0 for 1"),
    "phrases": ({"phrases": ["a", "b"]}, "row 1, broken must have one phrase per mask, 1, got 2"),
    "no size": ({"masks": [{"size": None, "counts": RLE["counts"]}]}, "row 1, broken: mask 1: a size must be whole"),
    "a wrong size": ({"masks": [{**RLE, "size": [4, 4]}]}, "row 1, broken: mask 1: its RLE counts"),
    "no counts": ({"masks": [{**RLE, "counts": None}]}, "row 1, broken: mask 1: the counts of an RLE must be"),
    "memory of others": ({"masks": [{**RLE, "counts": "06"}]}, "row 1, broken: mask 1: its RLE counts"),
    "an empty mask": ({"masks": [encode_mask(np.zeros(RLE["size"], bool))]}, "row 1, broken: mask 1 covers no pixel"),
    "another ignore": ({"ignore": encode_mask(np.ones((4, 4), bool))}, "row 1, broken: its masks must be of one size"),
    "no picture": ({"image": None}, "row 1, broken: image must be an object with named fields, got None"),
    "nothing in it": ({"image": {"bytes": None, "path": None}}, "row 1, broken: its image must hold bytes or a path"),
    "a torn picture": ({"image": {"bytes": b"GIF89a", "path": None}}, "row 1, broken: its image cannot be read"),
    "a lost picture": ({"image": {"bytes": None, "path": "/gone.png"}}, "row 1, broken: .*gone.png' does not exist"),
}


@pytest.mark.parametrize(("columns", "sentence"), ROWS.values(), ids=ROWS)
def test_a_broken_row_is_named_with_its_file(columns, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [prepared_row(), prepared_row(id="broken") | columns]
    rows = [{**row, "image": row["image"] and stored_image(row["image"], True)} for row in rows]
    (tmp_path / "out/data").mkdir(parents=True)
    schema = FEATURES.arrow_schema
    # Two files, so that the row counts within its own.
    parquet.write_table(pa.Table.from_pylist(rows[:1], schema), tmp_path / "out/data/val-00000-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "out/data/val-00001-of-00002.parquet")
    data = evaluation_data(str(tmp_path / "out"), None, "val", None, 0)
    assert [data.example(index)["query"] for index in (0, 1)] == [rows[0]["query"]] * 2
    with pytest.raises((ValueError, OSError), match=f"out/data/val-00001-of-00002.parquet {sentence}"):
        data.example(2)


def test_columns_and_files_of_another_kind_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = {**prepared_row(), "image": stored_image(prepared_row()["image"], True)}
    path = tmp_path / "out/data/val-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist([{**row, "image": 5}]), path)
    with pytest.raises(ValueError, match="the column image of split 'val' of .*out must hold pictures, got Value"):
        prepared_dataset(tmp_path / "out", "val")
    parquet.write_table(pa.Table.from_pylist([{**row, "query": 5, "masks": "x"}]), path)
    with pytest.raises(ValueError, match="val-00000-of-00001.parquet row 0, .*: query must be a text, got 5"):
        prepared_dataset(tmp_path / "out", "val")[0]
    write_prepared([], tmp_path / "out", "val")
    with pytest.raises(ValueError, match="split 'val' of .*out holds no rows"):
        prepared_dataset(tmp_path / "out", "val")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(OSError, match="val-00000-of-00001.parquet cannot be read as a parquet file"):
        prepared_dataset(tmp_path / "out", "val")


def test_rows_keep_their_numbers_when_they_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_prepared([prepared_row(), prepared_row(id="b", query=" "), prepared_row(id="c")], tmp_path / "out", "val")
    data = prepared_dataset(tmp_path / "out", "val").select([2, 1])
    assert data[0]["id"] == "c" and set(data[0]) == set(FEATURES)
    with pytest.raises(ValueError, match="row 1, b: query must not be empty"):
        data[1]


def test_what_is_left_out_is_said_once_at_the_end(tmp_path, capsys):
    references = [reference(1, 10, "val", "cup", ""), reference(2, 13, "val", " "), reference(3, 14, "val", "a line")]
    root = refer_family(tmp_path, "refcoco", "refs(unc).p", references)
    path = root / "refer_seg/refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 14, "image_id": 1, "segmentation": [[1, 1, 5, 1, 3, 1]]})
    path.write_text(json.dumps(content))
    main(["refcoco", "--root", str(root), "--split", "val", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert said.startswith(f"val: 1 examples in {tmp_path}/out/data; left out: 2 x a query without words (first: ")
    assert "refs(unc).p reference 1, sentence 1), 1 x a target without area (first: " in said
    data = evaluation_data("refcoco", str(root), "val", None, 0)
    assert data.size == 1 and data.left_out.startswith("left out: 2 x a query without words (first: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["refcoco", "--output", "o"], "prepare: error: refcoco is read from its original files: name the folder"),
        (["refcoco", "--output", "o", "--split", "test"], "has no split 'test'; it has: train, val, testA, testB"),
        (["refcoco", "--output", "o", "--root", "/nowhere"], "prepare: error: --root /nowhere is not a folder"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    # above it, a progress bar
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_flags_that_make_no_sense(capsys):
    for arguments in (["refkoko", "--output", "o"], ["refcoco", "--output", "o", "--count", "0"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err


def test_folders_that_hold_nothing_prepared(tmp_path):
    with pytest.raises(OSError, match="holds no prepared dataset"):
        prepared_dataset(tmp_path, "val")
    write_prepared([], tmp_path, "val")
    with pytest.raises(ValueError, match="has no split 'test'; it has: val"):
        prepared_dataset(tmp_path, "test")
