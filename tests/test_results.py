"""Results are dictionaries that are drawn, written, read back and handed on, and nothing is lost on the way."""

import copy
import json
import pickle
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from uground.processing import FoundSegment, GroundingResult, decode_mask, encode_mask
from uground.processing.answer_labels import label_absent


def make_mask(size, box):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


@pytest.fixture
def result():
    generator = np.random.default_rng(0)
    segments = [
        {
            "mask": make_mask((50, 30), (10, 5, 20, 9)),
            "score": 0.1 + 0.2,
            "label": "the cup",
            "box": [10, 5, 20, 9],
            "layer": 3,
            "similarity_map": generator.normal(size=(3, 4)).astype(np.float32),
            "similarity_box": [0.0, 0.0, 60.0, 30.0],
            "uncertainty": generator.random((30, 50)).astype(np.float32),
            "agreement": 0.75,
        },
        {"mask": make_mask((50, 30), (0, 0, 0, 0)), "score": 0.0, "label": "a boat", "box": [0, 0, 0, 0], "layer": 1},
    ]
    image = Image.new("RGB", (50, 30), (200, 30, 40))
    return GroundingResult(
        "é [SEG] and [SEG] [REJ]", segments, "a cup, boat", (50, 30), ["the tree"], last_layer=4, image=image
    )


FIELDS = ("query", "size", "absent", "last_layer")


def test_a_result_is_a_dictionary(result):
    assert isinstance(result, dict) and set(result) == {"answer", "segments"}
    assert isinstance(result["segments"][0], dict) and {**result["segments"][1]}["layer"] == 1
    plain = {"answer": result["answer"], "segments": [dict(segment) for segment in result["segments"]]}
    assert result == plain and plain == result
    assert (result != plain) is False
    changed = copy.deepcopy(result)
    assert changed == result
    changed["segments"][0]["similarity_map"][0, 0] += 1
    assert changed != result and result["segments"][0] != changed["segments"][0]
    assert result != {"answer": result["answer"], "segments": plain["segments"][:1]}
    assert GroundingResult("no", []) == {"answer": "no", "segments": []}


@pytest.mark.parametrize("through", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy])
def test_copies_keep_everything(result, through):
    other = through(result)
    assert type(other) is GroundingResult and type(other["segments"][0]) is FoundSegment and other == result
    assert all(getattr(other, name) == getattr(result, name) for name in (*FIELDS, "image"))


def test_json_and_back_is_the_same(result):
    for one in (result, GroundingResult("no", [], "is it red?", (7, 5)), GroundingResult("no", [])):
        written = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        back = GroundingResult.from_dict(written)
        assert back == one and all(getattr(back, name) == getattr(one, name) for name in FIELDS)
        assert back.to_dict() == one.to_dict()
    first = result.to_dict()["segments"][0]
    assert first["area"] == 40 and coco_mask.decode(first["mask"])[5:9, 10:20].sum() == 40
    drawn = GroundingResult.from_dict(result.to_dict(), image=result.image).draw()
    assert np.array_equal(np.asarray(drawn), np.asarray(result.draw()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda written: [written], 'a result must be a dictionary with "answer" and a list "segments", got'),
        (lambda written: {"answer": "no"}, 'a result must be a dictionary with "answer" and a list "segments", got'),
        (lambda written: written | {"segments": 3}, 'a result must be a dictionary with "answer" and a list "segme'),
        (lambda written: {"answer": "", "segments": [{"label": "a"}]}, "a segment must have score, box, layer, mask"),
        (lambda written: written["segments"][0].update(mask="x") or written, 'a mask must be {"size": '),
        (lambda written: written["segments"][0]["mask"].update(size=[3, 3]) or written, "must fill its 3 x 3 pixels"),
        (lambda written: written["segments"][0]["mask"].update(counts="~~") or written, "those of a COCO encoding"),
        (lambda written: written["segments"][0].update(uncertainty={"shape": [1]}) or written, "a map must be"),
    ],
)
def test_broken_json_is_refused(result, change, message):
    with pytest.raises(ValueError, match=message):
        GroundingResult.from_dict(change(result.to_dict()))


def test_masks_are_written_as_pycocotools_writes_them():
    generator = np.random.default_rng(0)
    for _ in range(60):
        mask = generator.random(generator.integers(1, 40, 2)) < generator.choice([0, 0.02, 0.3, 0.9, 1])
        theirs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        ours = encode_mask(mask)
        assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
        assert np.array_equal(decode_mask(ours), mask) and np.array_equal(decode_mask(theirs), mask)
    large = np.zeros((3000, 2000), dtype=bool)
    large[1:-1, 700:1900] = True
    assert np.array_equal(decode_mask(encode_mask(large)), large)
    assert decode_mask({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match=r"a mask must have the shape \(H, W\), got \(2, 2, 3\)"):
        encode_mask(np.zeros((2, 2, 3)))


def test_coco_reads_annotations_and_results(result, tmp_path):
    annotations = result.to_coco(7, {"the cup": 1, "a boat": 2}, first_id=5)
    content = {
        "images": [{"id": 7, "width": 50, "height": 30}],
        "categories": [{"id": 1, "name": "the cup"}, {"id": 2, "name": "a boat"}],
        "annotations": annotations,
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "coco.json")
    assert coco.getAnnIds() == [5, 6] and coco.loadAnns(5)[0]["bbox"] == [10, 5, 10, 4]
    assert coco.annToMask(coco.loadAnns(5)[0]).sum() == 40 == coco.loadAnns(5)[0]["area"]
    found = result.to_coco(7)
    assert not any("id" in one for one in found) and {one["category_id"] for one in found} == {1}
    numbers = np.arange(8)  # as ids of data sets often are
    of_numpy = result.to_coco(numbers[7], {"the cup": numbers[1], "a boat": numbers[2]}, first_id=numbers[5])
    assert json.loads(json.dumps(of_numpy)) == json.loads(json.dumps(annotations))
    assert len(coco.loadRes(json.loads(json.dumps(found))).anns) == 2
    with pytest.raises(ValueError, match="category_id must know the label 'a boat', got"):
        result.to_coco(7, {"the cup": 1})


@dataclass
class Detections:
    """Stands in for that of supervision, which checks the same of its fields."""

    xyxy: np.ndarray
    mask: np.ndarray | None = None
    confidence: np.ndarray | None = None
    class_id: np.ndarray | None = None
    tracker_id: np.ndarray | None = None
    data: dict = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)

    def __post_init__(self):
        count = len(self.xyxy)
        assert self.xyxy.shape == (count, 4) and self.mask.ndim == 3 and self.mask.dtype == bool
        values = (self.mask, self.confidence, self.class_id, *self.data.values())
        assert all(len(value) == count for value in values)
        assert self.confidence.shape == self.class_id.shape == (count,)
        assert np.issubdtype(self.class_id.dtype, np.integer) and np.issubdtype(self.confidence.dtype, np.floating)


def test_detections_of_supervision(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=Detections))
    found = result.to_detections()
    assert found.xyxy.tolist() == [[10, 5, 20, 9], [0, 0, 0, 0]] and found.mask.shape == (2, 30, 50)
    assert found.mask[0].sum() == 40 and found.class_id.tolist() == [0, 1]
    assert found.data["class_name"].tolist() == ["the cup", "a boat"] and found.data["layer"].tolist() == [3, 1]
    assert GroundingResult("no", [], size=(50, 30)).to_detections().mask.shape == (0, 30, 50)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="to_detections needs the package supervision, .* `pip install supervision`"):
        result.to_detections()


def test_drawing_and_notebooks(result, tmp_path):
    assert result._repr_png_().startswith(b"\x89PNG")
    result.image.save(tmp_path / "image.png")
    picture = result.draw()
    assert np.array_equal(np.asarray(result.draw(tmp_path / "image.png")), np.asarray(picture))
    result.image = str(tmp_path / "image.png")
    assert np.array_equal(np.asarray(result.draw()), np.asarray(picture))
    with pytest.raises(ValueError, match=r"about an image of the size \(50, 30\), got one of \(30, 50\)"):
        result.draw(Image.new("RGB", (30, 50)))
    (tmp_path / "image.png").unlink()
    assert result._repr_png_() is None
    result.image = None
    assert result._repr_png_() is None
    with pytest.raises(ValueError, match=r"holds no image to draw on, so draw\(image\) needs one, got None"):
        result.draw()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[REJ]", ["the query"]),
        ("There is none: [REJ].", ["the query"]),
        ("There is no purple cat: [REJ].", ["purple cat"]),
        ("The tree is not in the image [REJ]", ["The tree"]),
        ("the cup is [SEG] and the boat is [REJ].", ["the boat"]),
        ("a, b and c are [REJ], [SEG] and [REJ].", ["a", "c"]),
        ("it is red", []),
    ],
)
def test_what_is_absent_has_its_name(answer, expected):
    assert label_absent(answer, "the query", "[SEG]", "[REJ]") == expected
