"""Scenes: determinism, the common schema, exact meanings, held-out combinations, and the command line."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from processes import Command
from pycocotools import mask as coco_mask

from uground.training.scenes import (
    SPLITS,
    SceneGroups,
    allowed_pairs,
    corpus,
    example_scene,
    held_out,
    main,
    scene,
    scene_examples,
    scene_group,
    scene_queries,
    scenes,
)
from uground.training.scenes.drawing import (
    COLOURS,
    GEOMETRIC,
    KINDS,
    MIN_VISIBLE_PIXELS,
    SIZES,
    TEXTURES,
    ObjectPlan,
    Scene,
    SceneObject,
    paint,
)
from uground.training.scenes.queries import ATTRIBUTE_WEIGHTS, PLURALS, RIDDLES, Grammar

SINGULARS = {plural: kind for kind, plural in PLURALS.items()} | {"things": "thing", "shapes": "shape"}


def plain(example):
    return {key: value for key, value in example.items() if key != "image"} | {"pixels": example["image"].tobytes()}


def meant_by(text, objects):
    """An independent reading of a plain phrase: every word restricts the objects; None for a spatial one."""
    words = re.sub(r"^(the (two|three|four|five)|the|all|every(?!thing))\s", "", text)
    words = re.sub(r"^everything that is ", "thing ", words).split()
    left = set(range(len(objects)))
    for word in words:
        word = SINGULARS.get(word, word)
        if word == "thing":
            continue
        if word == "shape":
            left = {i for i in left if objects[i].kind in GEOMETRIC}
        elif word in (*COLOURS, *SIZES, *TEXTURES, *KINDS):
            left = {
                i for i in left if word in (objects[i].colour, objects[i].size, objects[i].texture, objects[i].kind)
            }
        else:
            return None
    return left


def riddle_reading(text, objects):
    """An independent reading of a riddle: remove the colour, look the rest up; None if it is no riddle."""
    colour = next((word for word in text.split() if word in COLOURS), None)
    bare = re.sub(r"\ban\b", "a", text)
    bare = bare.replace(f" {colour}", "", 1) if colour else bare
    for kind, riddles in RIDDLES.items():
        if bare in (riddle.replace("{c}", "") for riddle in riddles):
            return {i for i, item in enumerate(objects) if item.kind == kind and colour in (None, item.colour)}
    return None


def test_examples_depend_on_split_seed_and_index_only():
    few = [plain(e) for e in scenes("test", 3, seed=4)]
    many = [plain(e) for e in scenes("test", 5, seed=4)]
    assert few == many[:3]
    assert plain(scene_examples("test", 4, 2)[0]) == few[2]
    # asking more questions about a scene changes none of the earlier ones
    assert [plain(e) for e in scene_examples("test", 4, 2, queries=4)][:1] == few[2:3]
    assert [e["id"] for e in scenes("test", 5, seed=4, queries_per_scene=2)] == [
        "scenes-test-4-0-0",
        "scenes-test-4-0-1",
        "scenes-test-4-1-0",
        "scenes-test-4-1-1",
        "scenes-test-4-2-0",
    ]


def test_splits_seeds_and_indices_give_different_images():
    keys = [(split, seed, index) for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    images = {scene(*key).image.tobytes() for key in keys}
    assert len(images) == len(keys)


@pytest.mark.parametrize("split", SPLITS)
def test_common_schema(split):
    for example in scenes(split, 120, seed=2, queries_per_scene=4):
        assert list(example) == ["id", "image", "query", "answer", "phrases", "masks", "ignore", "attribute"]
        image = example["image"]
        assert image.mode == "RGB" and max(image.size) == 256 and example["ignore"] is None
        assert example["answer"].count("[SEG]") == len(example["masks"]) == len(example["phrases"])
        for rle in example["masks"]:
            assert rle["size"] == [image.height, image.width] and isinstance(rle["counts"], str)
            mask = coco_mask.decode(rle)
            assert mask.shape == (image.height, image.width) and mask.sum() >= MIN_VISIBLE_PIXELS
        for phrase in example["phrases"]:
            assert phrase in example["query"]
        if example["attribute"] == "fp_res":
            assert example["answer"] == "There is none: [REJ]."


def test_multi_answers_copy_each_phrase_in_order_and_reject_the_absent_ones():
    rejected = 0
    for index in range(80):
        _, (query,) = scene_queries("train", 3, index, attributes=["multi_rs"])
        texts = [phrase.text for phrase in query.phrases]
        assert len(texts) in (2, 3) and (", ".join(texts[:-1]) + " and " + texts[-1]) in query.text
        parts = [f"{p.text} is {'[SEG]' if p.targets else '[REJ]'}" for p in query.phrases]
        assert query.answer == ", ".join(parts[:-1]) + " and " + parts[-1] + "."
        targets = [p.targets for p in query.phrases if p.targets]
        assert all(len(t) == 1 for t in targets) and len(set(targets)) == len(targets) >= 1
        rejected += len(texts) - len(targets)
        (example,) = scene_examples("train", 3, index, attributes=["multi_rs"])
        assert example["phrases"] == [p.text for p in query.phrases if p.targets]
    assert 2 <= rejected <= 30


def test_phrases_mean_exactly_their_targets():
    read = {"res": 0, "rs": 0, "fp_res": 0, "gres": 0, "multi_rs": 0}
    for index in range(150):
        drawn, asked = scene_queries("test", 1, index, 4)
        for query in asked:
            for phrase in query.phrases:
                meant = riddle_reading(phrase.text, drawn.objects)
                meant = meant_by(phrase.text, drawn.objects) if meant is None else meant
                if meant is None:  # spatial: checked by hand below
                    continue
                read[query.attribute] += 1
                assert meant == set(phrase.targets), (phrase.text, drawn.objects)
                if query.attribute in ("res", "rs"):
                    assert len(meant) == 1
                if match := re.match(r"the (two|three|four|five) ", phrase.text):
                    assert len(meant) == {"two": 2, "three": 3, "four": 4, "five": 5}[match[1]]
    assert min(read.values()) > 30


def test_the_form_of_a_phrase_does_not_tell_whether_it_means_anything():
    kinds = {**dict.fromkeys(KINDS, "KIND"), **dict.fromkeys(PLURALS.values(), "KIND"), "things": "thing"}
    kinds |= dict.fromkeys(COLOURS, "COLOUR") | dict.fromkeys(SIZES, "SIZE") | dict.fromkeys(TEXTURES, "TEXTURE")
    asked, absent = Counter(), Counter()
    for index in range(700):
        drawn, queries = scene_queries("train", 21, index, 5, ["res", "rs", "fp_res"])
        for phrase in (query.phrases[0] for query in queries):
            riddle = riddle_reading(phrase.text, drawn.objects) is not None
            words = phrase.text.split()
            form = " ".join(kinds.get(word, word) for word in words)
            if riddle:
                form = f"riddle {bool(set(words) & set(COLOURS))}"
            asked[form] += 1
            absent[form] += not phrase.targets
    whole = sum(absent.values()) / sum(asked.values())
    common = [form for form, count in asked.items() if count > 100]
    assert {"the KIND", "the SIZE COLOUR KIND", "the TEXTURE KIND", "riddle True", "riddle False"} <= set(common)
    assert all(abs(absent[form] / asked[form] - whole) < 0.12 for form in common), (whole, asked, absent)


def test_minimal_pairs_differ_in_one_thing_and_only_one_of_them_means_anything():
    forms, words, pairs = Counter(), Counter(), 0
    for index in range(150):
        drawn, asked = scene_queries("train", 23, index, 5, pairs=2)
        assert len({query.text for query in asked}) == 5
        assert scene_queries("train", 23, index, 4, pairs=2)[1] == asked[:4]
        assert scene_queries("train", 23, index, 1, pairs=2)[1] == scene_queries("train", 23, index)[1]
        for first, second in (asked[:2], asked[2:4]):
            there, absent = sorted((first, second), key=lambda query: not query.phrases[0].targets)
            if there.phrases[0].plural != absent.phrases[0].plural or bool(absent.phrases[0].targets):
                continue  # this scene had no more pairs
            pairs += 1
            forms[first is there] += 1
            meant = [riddle_reading(query.phrases[0].text, drawn.objects) for query in (there, absent)]
            if None not in meant:
                assert meant == [set(there.phrases[0].targets), set()]
                continue
            ours, others = there.text.split(), absent.text.split()
            changed = [pair for pair in zip(ours, others, strict=True) if pair[0] != pair[1]]
            assert len(changed) == 1, (there.text, absent.text)
            read = meant_by(absent.phrases[0].text, drawn.objects)
            assert read in (None, set())
            words[changed[0][1].strip("?.,") in {*KINDS, *PLURALS.values()}] += 1
    assert pairs > 290 and min(forms.values()) > 0.4 * pairs  # and neither place tells
    assert words[True] > words[False] > 40


def block(kind, colour, x0, y0, x1, y1, size="small"):
    mask = np.zeros((200, 200), bool)
    mask[y0:y1, x0:x1] = True
    return SceneObject(kind, colour, size, "plain", float(max(x1 - x0, y1 - y0)), mask)


def test_relations_and_superlatives_by_hand():
    objects = (
        block("cup", "red", 10, 90, 30, 110),  # centre (20, 100)
        block("tree", "green", 80, 80, 120, 120, "large"),  # centre (100, 100), the largest
        block("cup", "blue", 160, 90, 180, 110),  # centre (170, 100)
        block("fish", "red", 95, 170, 115, 190),  # centre (105, 180)
        block("star", "red", 88, 20, 108, 40),  # centre (98, 30)
    )
    image = Image.new("RGB", (200, 200))
    grammar = Grammar(Scene(image, objects), allowed_pairs("train"), np.random.default_rng(0))
    cups, everything = (0, 2), (0, 1, 2, 3, 4)
    assert grammar.related(cups, "left of", 1) == (0,)
    assert grammar.related(cups, "right of", 1) == (2,)
    assert grammar.related(cups, "above", 1) is None  # level with the tree: neither above nor clearly not
    assert grammar.related((4,), "above", 1) == (4,)
    assert grammar.related((3,), "above", 1) == ()
    assert grammar.superlative("leftmost", cups) == 0 and grammar.superlative("rightmost", cups) == 2
    assert grammar.superlative("highest", cups) is None  # equally high
    assert grammar.superlative("lowest", everything) == 3 and grammar.superlative("highest", everything) == 4
    assert grammar.superlative("largest", everything) == 1
    assert grammar.superlative("smallest", everything) is None
    assert grammar.superlative("leftmost", (1,)) is None


def test_spatial_phrases_are_asked_and_hold():
    pattern = re.compile(r"^the (.*) (left of|right of|above|below) (the .*)$")
    seen = 0
    for index in range(300):
        drawn, (query,) = scene_queries("train", 7, index, attributes=["res"])
        (phrase,) = query.phrases
        if not (match := pattern.match(phrase.text)):
            continue
        seen += 1
        (anchor,) = meant_by(match[3], drawn.objects)
        ax, ay = drawn.objects[anchor].centre
        holds = {
            "left of": lambda x, y, ax=ax, ay=ay: x < ax,
            "right of": lambda x, y, ax=ax, ay=ay: x > ax,
            "above": lambda x, y, ax=ax, ay=ay: y < ay,
            "below": lambda x, y, ax=ax, ay=ay: y > ay,
        }[match[2]]
        candidates = meant_by("the " + match[1], drawn.objects) - {anchor}
        assert {i for i in candidates if holds(*drawn.objects[i].centre)} == set(phrase.targets)
    assert seen >= 10


def test_held_out_combinations_are_an_eighth_and_disjoint():
    everything = len(COLOURS) * len(KINDS)
    validation, test = held_out("validation"), held_out("test")
    assert held_out("train") == frozenset() and not validation & test
    assert len(validation) == len(test) == everything // 16
    assert not allowed_pairs("train") & (validation | test)
    assert not allowed_pairs("test") & validation and not allowed_pairs("validation") & test


def test_held_out_combinations_stay_out_of_training():
    foreign = held_out("validation") | held_out("test")
    for index in range(200):
        drawn, asked = scene_queries("train", 0, index, 4)
        assert not {(item.colour, item.kind) for item in drawn.objects} & foreign
        for query in asked:
            for colour, kind in foreign:
                assert f"{colour} {kind}" not in query.text and f"{colour} {PLURALS[kind]}" not in query.text
                for riddle in RIDDLES[kind]:
                    assert (
                        "{c}" not in riddle or riddle.format(c=f" {colour}").replace("a o", "an o") not in query.text
                    )
    drawn_pairs = {(i.colour, i.kind) for n in range(200) for i in scene("test", 0, n).objects}
    assert held_out("test") <= drawn_pairs and not drawn_pairs & held_out("validation")
    assert len(drawn_pairs - held_out("test")) > 60  # and the ordinary ones too


def test_attribute_mix_and_choice():
    examples = list(scenes("validation", 800, seed=9, queries_per_scene=4))
    for name, weight in ATTRIBUTE_WEIGHTS.items():
        share = sum(e["attribute"] == name for e in examples) / len(examples)
        assert abs(share - weight) < 0.06, name
    groups = [e for e in examples if e["attribute"] == "gres"]
    assert 0.12 < sum(not e["masks"] for e in groups) / len(groups) < 0.4
    assert {e["attribute"] for e in scenes("train", 60, attributes=["rs", "gres"])} == {"rs", "gres"}
    assert {e["attribute"] for e in scenes("train", 20, attributes={"rs": 0.0, "fp_res": 2.0})} == {"fp_res"}


def test_masks_are_the_visible_pixels_and_objects_stay_visible():
    for index in range(60):
        drawn = scene("train", 5, index)
        assert 2 <= len(drawn.objects) <= 5
        assert np.sum([item.mask for item in drawn.objects], axis=0).max() == 1  # nothing is claimed twice
        assert min(item.mask.sum() for item in drawn.objects) >= MIN_VISIBLE_PIXELS
    plans = (
        ObjectPlan("square", "blue", "large", "plain", 100, (100, 100)),
        ObjectPlan("circle", "red", "small", "plain", 40, (100, 100)),
    )
    below, above = paint(np.random.default_rng(0), plans, 200, 200).objects
    assert abs(above.mask.sum() - np.pi * 20**2) < 40
    assert abs(below.mask.sum() + above.mask.sum() - 90**2) < 250
    # an object that would hide another one is left out
    hiding = (plans[1], plans[0])
    assert [item.kind for item in paint(np.random.default_rng(0), hiding, 200, 200).objects] == ["circle"]


def test_masks_lie_on_their_objects():
    plans = [ObjectPlan(kind, "red", "large", "plain", 100, (100, 100)) for kind in KINDS]
    for plan in plans:
        drawn = paint(np.random.default_rng(1), [plan], 200, 200)
        pixels = np.asarray(drawn.image, np.int64)
        reddish = pixels[..., 0] - np.maximum(pixels[..., 1], pixels[..., 2]) > 40
        mask = drawn.objects[0].mask
        # eyes, windows and wheels are not red, everything outside is not
        assert (reddish & mask).sum() > 0.75 * mask.sum() and (reddish & ~mask).sum() < 0.06 * mask.sum()


def test_group_shares_its_image_and_dataset_returns_groups():
    image, examples = scene_group("train", 0, 5, 6)
    assert all(e["image"] is image for e in examples) and len({e["query"] for e in examples}) == 6
    groups = SceneGroups("train", scene_count=8, queries=6)
    assert len(groups) == 8 and [plain(e) for e in groups[5]] == [plain(e) for e in examples]
    with pytest.raises(IndexError, match="0..7, got 8"):
        groups[8]


def test_corpus_yields_queries_and_answers():
    texts = list(corpus(20, seed=1))
    examples = list(scenes("train", 20, seed=1, queries_per_scene=8))
    assert texts == [text for e in examples for text in (e["query"], e["answer"])]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "val"}, "split must be one of train, validation, test, got 'val'"),
        ({"seed": -1}, "seed must be in 0..4294967295, got -1"),
        ({"count": -1}, "got -1 and 1"),
        ({"queries_per_scene": 0}, "got 1000 and 0"),
        ({"attributes": ["ress"]}, "attributes must be a list from res, .* got \\['ress'\\]"),
        ({"attributes": "res"}, "attributes must be a list"),
        ({"attributes": {"res": 0.0}}, "not all 0"),
        ({"attributes": []}, "not all 0"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(**arguments)


def test_example_scene_holds_one_small_red_boat():
    drawn = example_scene()
    traits = [(item.size, item.colour, item.kind) for item in drawn.objects]
    assert traits.count(("small", "red", "boat")) == 1 and len(traits) == 5
    assert not {(item.colour, item.kind) for item in drawn.objects} & (held_out("validation") | held_out("test"))


def test_command_writes_preview_and_example(tmp_path):
    sheet, example = tmp_path / "sheet.png", tmp_path / "scene.png"
    done = Command(tmp_path / "said", "uground.training.scenes", "--preview", 4, sheet, "--split", "test")
    assert done.wait() == [0] and done.text("stdout").strip() == str(sheet)
    with Image.open(sheet) as image:
        assert image.width == 3 * 540 and np.asarray(image).std() > 20
    assert main(["--example", str(example)]) == 0
    with Image.open(example) as image:
        assert image.convert("RGB").tobytes() == example_scene().image.tobytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preview", "0", "x.png"], "must be a whole number in 1..300, got '0'"),
        (["--preview", "many", "x.png"], "got 'many'"),
        (["--preview", "2", "no/such/folder/x.png"], "no/such/folder"),
        (["--preview", "2", "x.nonsense"], "nonsense"),
        (["--preview", "2", "x.png", "--seed", "-3"], "seed must be"),
        (["--preview", "2", "x.png", "--split", "val"], "invalid choice"),
        ([], "--preview"),
    ],
)
def test_command_refuses_bad_arguments_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err.strip()
    assert status == 2 and message in printed and "\n" not in printed
    assert list(tmp_path.iterdir()) == []
