"""The evaluate command on a tiny random model: figures, styles, layers, resumption, several processes, mistakes."""

import json
import os
import subprocess

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from miniatures import decoded, refer_family, reference
from PIL import Image
from processes import launched
from tiny import END_TOKEN, REJECT_TOKEN, SEGMENT_TOKEN, tiny_config, tiny_model
from tiny_processor import TEMPLATE, gradient_image, tiny_processor, tiny_tokenizer

from uground import UGroundForReferringSegmentation
from uground.training import evaluate as command
from uground.training.evaluate import EvaluationArguments, calibration_table, evaluate, main, table
from uground.training.evaluation.counts import count_query
from uground.training.evaluation.datasets import evaluation_data
from uground.training.evaluation.predictions import forced_answer, group_by_image, placed_targets, predict
from uground.training.evaluation.prompts import with_system_prompt
from uground.training.evaluation.protocols import reduce_counts
from uground.training.evaluation.store import BlockStore

NUM_LAYERS = tiny_config().num_layers


def talkative_model(seed: int):
    """A random model whose greedy answers now and then hold the segment, reject and end tokens."""
    model = tiny_model(seed)
    with torch.no_grad():
        model.lmm.lm_head.weight[[SEGMENT_TOKEN, REJECT_TOKEN, END_TOKEN]] *= 2.5
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    talkative_model(3).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def settings(checkpoint, **changes):
    return EvaluationArguments(
        **{"model": checkpoint, "count": 5, "batch_size": 2, "max_new_tokens": 4, "layers": ["last"], **changes}
    )


PLACE_AND_TIME = ("command", "date", "commit", "overlays", "processes")


def comparable(results):
    """Results without what says where and when."""
    return {name: value for name, value in results.items() if name not in PLACE_AND_TIME}


def rows_of(folder):
    return parquet.read_table(folder / "predictions.parquet").to_pylist()


def test_the_command_writes_what_it_prints(checkpoint, tmp_path, capsys):
    arguments = ["--model", checkpoint, "--count", "5", "--batch-size", "2", "--max-new-tokens", "4"]
    arguments += ["--layers", "last", "argmax", "--protocol", "ordered", "rela", "muse", "--overlays", "1"]
    main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    for protocol in ("ordered", "rela", "muse"):
        assert table(results, protocol) in printed
        assert f"| {protocol} | generate | argmax | overall | 5 |" in printed
    assert calibration_table(results) in printed
    assert results["command"] == " ".join(
        ["python -m uground.training.evaluate", *arguments, "--output", str(tmp_path)]
    )
    assert (results["style"], results["protocol"], results["seed"], results["counts"]["overall"]) == (
        "generate",
        "ordered",
        0,
        5,
    )
    assert {"torch", "transformers", "uground"} <= set(results["versions"])
    # the figures, once more, from the predictions and the scenes
    rows = [row for row in rows_of(tmp_path) if row["layer_selection"] == "argmax"]
    assert [row["index"] for row in rows] == list(range(5))
    example = evaluation_data("scenes", None, "test", 5, 0).example
    queries = []
    for row in rows:
        wanted = example(row["index"])
        assert (row["id"], row["query"], row["expected"]) == (wanted["id"], wanted["query"], wanted["answer"])
        assert row["answer"].count("[SEG]") == len(row["masks"]) == len(row["scores"]) == len(row["layers"])
        size = (0, wanted["image"].height, wanted["image"].width)
        found = np.array([decoded(rle) for rle in row["masks"]], dtype=bool).reshape(-1, *size[1:])
        target = np.array([decoded(rle) for rle in wanted["masks"]], dtype=bool).reshape(-1, *size[1:])
        queries.append(count_query(found, target, wanted["attribute"], scores=row["scores"]))
    assert sum(len(row["masks"]) for row in rows) > 0
    assert results["figures"]["argmax"]["overall"] == reduce_counts(queries, "ordered")
    assert results["more_figures"]["muse"]["argmax"]["overall"] == reduce_counts(queries, "muse")
    pictures = sorted(path.name[:8] for path in (tmp_path / "overlays").iterdir())
    assert pictures == ["best-01-", "worst-01"]
    assert not (tmp_path / "partial").exists()


def test_an_interrupted_run_is_taken_up(checkpoint, tmp_path, monkeypatch):
    wanted = evaluate(settings(checkpoint, layers=["last", "mc"], output=str(tmp_path / "whole")))
    measured, real = [], command._measure_block

    def interrupted(number, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(number)
        return real(number, *rest)

    folder = tmp_path / "broken"
    arguments = settings(checkpoint, layers=["last", "mc"], output=str(folder))
    monkeypatch.setattr(command, "_measure_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(arguments)
    (file,) = (folder / "partial").glob("blocks-*.jsonl")
    # killed while it wrote: half a line of the second block is left
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    with pytest.raises(ValueError, match="interrupted evaluation with seed=0, got 1; finish it with its settings, or"):
        evaluate(settings(checkpoint, layers=["last", "mc"], output=str(folder), seed=1))
    measured.clear()
    monkeypatch.setattr(
        command, "_measure_block", lambda number, *rest: measured.append(number) or real(number, *rest)
    )
    assert comparable(evaluate(arguments)) == comparable(wanted)
    assert measured == [1, 2]
    assert rows_of(folder) == rows_of(tmp_path / "whole")
    assert not (folder / "partial").exists()


def test_two_processes_give_the_figures_of_one(checkpoint, tmp_path):
    choices = {"layers": ["last", "mc"], "protocol": ["ordered", "muse"]}
    arguments = settings(checkpoint, output=str(tmp_path / "one"), **choices)
    wanted = evaluate(arguments)
    flags = []
    for name in ("model", "dataset", "split", "count", "seed", "layers", "batch_size", "max_new_tokens", "protocol"):
        value = getattr(arguments, name)
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    command = launched(2, "uground.training.evaluate", *flags, "--output", tmp_path / "two")
    # Another number of threads adds up in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (wanted["processes"], results["processes"]) == (1, 2)
    assert comparable(results) == json.loads(json.dumps(comparable(wanted)))
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    assert not (tmp_path / "two" / "partial").exists()
    assert run.stdout.count("| muse | generate | last | overall |") == 1


@pytest.mark.parametrize("style", ["generate", "teacher-forced"])
def test_all_layers_from_one_pass(checkpoint, monkeypatch, style):
    passes = []
    real = UGroundForReferringSegmentation.read_masks
    monkeypatch.setattr(
        UGroundForReferringSegmentation, "read_masks", lambda self, *a: passes.append(a[1]) or real(self, *a)
    )
    encoded = []
    real_encode = UGroundForReferringSegmentation.get_image_embeddings
    monkeypatch.setattr(
        UGroundForReferringSegmentation,
        "get_image_embeddings",
        lambda self, *a, **k: encoded.append(1) or real_encode(self, *a, **k),
    )
    every = evaluate(settings(checkpoint, layers=["all"], style=style, batch_size=5))
    assert passes == list(range(NUM_LAYERS)) and len(encoded) == 1
    assert list(every["figures"]) == [str(layer) for layer in range(NUM_LAYERS)]
    last = evaluate(settings(checkpoint, layers=["last"], style=style, batch_size=5))
    assert every["figures"][str(NUM_LAYERS - 1)] == last["figures"]["last"]
    assert len({json.dumps(figures) for figures in every["figures"].values()}) > 1


def example(image, query, answer, *masks, **fields):
    coded = [command.encode_mask(mask) for mask in masks]
    return {
        "id": query,
        "image": image,
        "query": query,
        "answer": answer,
        "masks": coded,
        "phrases": ["x"] * len(coded),
        "ignore": None,
        "attribute": "res",
        "subset": None,
        **fields,
    }


# With one of these random models the reject token is likelier everywhere, with the other nowhere.
@pytest.mark.parametrize(("seed", "rejects"), [(3, False), (4, True)])
def test_forced_answers_are_those_of_the_model_in_one_forward(seed, rejects):
    model, processor = talkative_model(seed), tiny_processor()
    wide, tall = Image.fromarray(gradient_image(24, 40)), Image.fromarray(gradient_image(40, 30))
    left, right = np.zeros((24, 40), dtype=bool), np.ones((24, 40), dtype=bool)
    left[:, :20] = True
    examples = [
        example(wide, "the red cup", "[SEG].", left),
        example(tall, "fish", "[REJ]."),
        example(
            wide.copy(),
            "the cup and the tree",
            "the cup is [SEG] and the tree is [REJ] and boat is [SEG].",
            left,
            right,
        ),
        example(tall, "what can swim", "There is no fish."),
    ]
    found = predict(model, processor, examples, [2, "argmax"], "teacher-forced")
    answers = ["[SEG].", "[SEG].", "the cup is [SEG] and the tree is [SEG] and boat is [SEG].", "[SEG]."]
    flags = []
    for number, (one, answer) in enumerate(zip(examples, answers, strict=True)):
        inputs = processor([one["image"]], [one["query"]], answers=[answer])
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, layer_selection=2)
        masks = (
            processor.post_process_masks(
                outputs.mask_logits[None], inputs["sam_valid_sizes"], inputs["original_sizes"]
            )[0]
            > 0
        )
        prediction = found[2][number]
        np.testing.assert_array_equal(prediction.masks, masks.numpy())
        assert prediction.answer == answer and prediction.layers == [2] * answer.count("[SEG]")
        places = (inputs["input_ids"][0] == SEGMENT_TOKEN).nonzero()[:, 0] - 1
        logits = outputs.logits[0, places]
        expected = (logits[:, REJECT_TOKEN] > logits[:, SEGMENT_TOKEN]).tolist()
        assert prediction.rejected == expected
        flags += expected
    assert set(flags) == {rejects}
    assert [one.targets.any((1, 2)).tolist() for one in found[2]] == [[True], [False], [True, False, True], [False]]
    np.testing.assert_array_equal(found["argmax"][2].targets[2], right)


def test_forced_answers_do_not_give_absence_away():
    processor = tiny_processor()
    absent = example(Image.new("RGB", (6, 5)), "q", "There is none: [REJ].")
    assert forced_answer(processor, absent, "It is [SEG].") == "It is [SEG]."
    assert placed_targets(processor, absent).shape == (1, 5, 6)
    mixed = {
        **absent,
        "answer": "a is [REJ], b is [SEG].",
        "masks": [command.encode_mask(np.ones((5, 6), dtype=bool))],
    }
    assert forced_answer(processor, mixed, "It is [SEG].") == "a is [SEG], b is [SEG]."
    assert placed_targets(processor, mixed).any((1, 2)).tolist() == [False, True]


def test_equal_images_are_encoded_once():
    one, other = Image.new("RGB", (6, 5), "red"), Image.new("RGB", (6, 5), "blue")
    images, groups = group_by_image([{"image": image} for image in (one, other, one.copy(), other, one)])
    assert groups == [[0, 2, 4], [1, 3]] and images == [one, other]


def test_published_datasets_are_measured_from_their_files(checkpoint, tmp_path):
    sentences = (
        {"sent": "red cup", "is_false_premise": False},
        {"sent": "fish", "is_false_premise": True, "gt_sent": "cup"},
    )
    folder = ("fprefcoco", "refs(berkeley_exclude_unified).p")
    root = str(refer_family(tmp_path, *folder, [reference(1, 10, "val", *sentences)]))
    results = evaluate(
        settings(checkpoint, dataset="fprefcoco", root=root, split="val", count=None, style="teacher-forced")
    )
    assert (results["protocol"], results["style"], results["count"]) == ("sesame", "teacher-forced", 2)
    assert results["counts"] == {"overall": 2, "fp_res": 1, "res": 1}
    assert "answers_as_written" not in results
    assert "| sesame | teacher-forced | last | overall | 2 |" in table(results)


@pytest.fixture(scope="module")
def read_checkpoint(tmp_path_factory):
    """A READ without [REJ] and without a policy, under the chat template that knows system prompts."""
    folder = tmp_path_factory.mktemp("read")
    settings = {"image_frame": "centre_crop", "prompts": ("embedding", "points"), "num_points": 4}
    settings |= {"layer_policy": False, "layer_selection": "last", "reject_token_id": None}
    tiny_model(3, **settings).save_pretrained(folder)
    tiny_processor(chat_template=None, frame="centre_crop").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("dataset", "figures", "style", "system"),
    [
        ("refcoco", "lisa", "teacher-forced", "llava_v1"),
        ("fprefcoco", "sesame", "generate", "vicuna_v1"),
    ],
)
def test_read_is_asked_as_published(read_checkpoint, tmp_path, monkeypatch, dataset, figures, style, system):
    """Words, answer and system prompt come with the protocol, and the table names them."""
    file = {"refcoco": "refs(unc).p", "fprefcoco": "refs(berkeley_exclude_unified).p"}[dataset]
    sentences = [{"sent": "Red cup", "is_false_premise": False}]
    root = str(refer_family(tmp_path, dataset, file, [reference(1, 10, "val", *sentences)]))
    asked, original = [], command.predict

    def recorded(model, processor, examples, *rest):
        asked.append((examples[0]["query"], examples[0]["answer"], rest[-1]))
        return original(model, processor, examples, *rest)

    monkeypatch.setattr(command, "predict", recorded)
    told = {"dataset": dataset, "root": root, "split": "val", "protocol": ["read"], "count": None, "layers": []}
    results = evaluate(settings(read_checkpoint, **told))
    assert (results["protocol"], results["style"], results["layers"]) == (figures, style, ["last"])
    label = f"| read ({figures}, system prompt {system}) | {style} | last | overall | 1 |"
    assert label in table(results)
    ((query, answer, prompt),) = asked
    assert query == "What is red cup in this image? Please output segmentation mask."
    assert answer == "Sure, the segmentation result is [SEG]."
    who = {"llava_v1": "human", "vicuna_v1": "user"}[system]
    assert prompt == (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {who}'s questions."
    )
    whole = with_system_prompt(tiny_processor(chat_template=None), query, prompt)
    assert whole == f"{prompt} USER: <image>\n{query} ASSISTANT:"


def test_read_stands_alone_and_says_its_style(checkpoint):
    for changes, message in (
        ({"protocol": ["read", "lisa"], "dataset": "refcoco"}, "stands alone"),
        ({"protocol": ["read"], "dataset": "refcoco", "style": "generate"}, "is teacher-forced, got --style generate"),
        ({"protocol": ["read"]}, "protocol read is for reasonseg, refcoco, .*, got 'scenes'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(checkpoint, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "refkoko"}, "there is no dataset 'refkoko'; there are: scenes, refcoco, "),
        ({"split": "val"}, "scenes has no split 'val'; it has: train, validation, test"),
        ({"dataset": "refcoco", "split": "val"}, "refcoco is read from its original files: name the folder"),
        ({"dataset": "llava-instruct", "split": "train"}, "llava-instruct has no masks to measure"),
        ({"protocol": ["coco"]}, "there is no protocol 'coco'; scenes is measured under ordered, lisa, rela, gsva, "),
        ({"layers": ["first"]}, r"--layers must be last, argmax, sample, mc, all, or numbers in 0..4, got 'first'"),
        ({"layers": [5]}, r"numbers in 0..4, got 5"),
    ],
)
def test_what_cannot_be_measured(checkpoint, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(settings(checkpoint, **changes))


def test_a_dataset_has_its_own_protocols(checkpoint, tmp_path):
    root = str(refer_family(tmp_path, "refcoco", "refs(unc).p", [reference(1, 10, "val", "cup")]))
    with pytest.raises(ValueError, match="refcoco is measured under lisa, ordered, got 'muse'"):
        evaluate(settings(checkpoint, dataset="refcoco", root=root, split="val", protocol=["muse"]))


@pytest.mark.parametrize(
    ("protocol", "style"), [("rela", "generate"), ("gsva", "generate"), ("sesame", "teacher-forced")]
)
def test_a_model_that_cannot_reject_has_no_place_in_a_presence_protocol(tmp_path, protocol, style):
    tiny_processor(tiny_tokenizer(("[SEG]",)), TEMPLATE).save_pretrained(tmp_path)
    # Without [REJ] the other two tokens have other numbers.
    config = tiny_config(segment_token_id=REJECT_TOKEN, reject_token_id=None)
    config.lmm_config.image_token_id = SEGMENT_TOKEN
    config.save_pretrained(tmp_path)
    message = (
        rf"protocol {protocol} \({style}\) needs a model that can write \[REJ\], but the tokenizer of .* does not"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(settings(str(tmp_path), protocol=[protocol], style=style))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"seed": -1}, "--seed must lie in 0..4294967295, got -1"),
        ({"seed": 2**32}, "--seed must lie in 0..4294967295, got 4294967296"),
        ({"overlays": -1}, "--overlays must be at least 0, got -1"),
        ({"overlays": 2}, "--overlays are written to a folder: name it with --output"),
        ({"style": "guess"}, "--style must be one of generate, teacher-forced, got 'guess'"),
        ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        settings("m", **changes)


def test_the_command_ends_in_one_sentence(tmp_path, capsys):
    assert main(["--dataset", "reasonseg", "--root", str(tmp_path), "--split", "val"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("evaluate: error: reasonseg is incomplete under") and printed.count("\n") == 1


def test_a_finished_folder_is_not_overwritten_by_other_settings(checkpoint, tmp_path, capsys):
    finished = settings(checkpoint, count=2, output=str(tmp_path))
    results = evaluate(finished)
    assert comparable(evaluate(finished)) == comparable(results), "the same again is welcome"
    kept = (tmp_path / "results.json").read_bytes()
    for changes, named in (({"seed": 7}, "seed=0, got 7"), ({"protocol": ["muse"]}, "protocol=")):
        with pytest.raises(ValueError, match=f"holds a finished evaluation with {named}"):
            evaluate(settings(checkpoint, **{"count": 2, "output": str(tmp_path), **changes}))
    # as an earlier version left it
    del results["settings"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="holds a finished evaluation with max_new_tokens=4, got 5; name"):
        evaluate(settings(checkpoint, count=2, output=str(tmp_path), max_new_tokens=5))
    assert evaluate(finished)["figures"] == results["figures"]
    assert (tmp_path / "results.json").read_bytes() == kept


def test_a_file_of_ones_own_is_measured(checkpoint, tmp_path, capsys):
    Image.fromarray(gradient_image(30, 50)).save(tmp_path / "a.png")
    square = [[5, 5, 30, 5, 30, 20]]
    lines = [
        {"image": "a.png", "query": "the red cup", "masks": [square]},
        {"image": "a.png", "query": "what is red", "answer": "the cup ."},
        {"image": "a.png", "query": "a cup and a boat", "masks": [square, None]},
        {"image": "a.png", "query": "the tree", "masks": []},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", checkpoint, "--max-new-tokens", "4", "--overlays", "1", "--output", str(tmp_path / "out")]
    assert main([*flags, "--dataset", f"{file}:mine"]) == 0
    assert "answers exactly as expected" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["protocol"], results["split"], results["count"]) == ("ordered", "mine", 3)
    rows = rows_of(tmp_path / "out")
    assert [row["expected"] for row in rows] == ["It is [SEG].", "They are [SEG] and [REJ].", "It is [REJ]."]
    file.write_text(file.read_text() + "\n" + json.dumps(lines[0]))
    assert main([*flags, "--dataset", f"{file}:mine"]) == 2, "other lines are other data"


def test_of_several_turns_the_last_is_measured(checkpoint, tmp_path, capsys, monkeypatch):
    """Behind the earlier ones, with the answers that were wanted there."""
    Image.fromarray(gradient_image(30, 50)).save(tmp_path / "a.png")
    square, other = [[5, 5, 30, 5, 30, 20]], [[10, 10, 20, 10, 20, 25]]
    turns = [{"query": "a cup and a boat", "masks": [square, square]}, {"query": "the tree", "masks": [other]}]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"image": "a.png", "turns": turns}))
    flags = ["--model", checkpoint, "--dataset", str(file), "--max-new-tokens", "4"]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    (row,) = rows_of(tmp_path / "out")
    assert (row["query"], row["expected"]) == ("the tree", "It is [SEG].")
    assert len(row["masks"]) == row["answer"].count("[SEG]"), "masks of earlier turns are none of its own"
    example = evaluation_data(str(file), None, "test", None, 0).example(0)
    (mask,) = map(decoded, example["masks"])
    assert mask[12, 15:19].all() and not mask[6].any()
    model, processor, asked = talkative_model(3), tiny_processor(), []
    monkeypatch.setattr(type(model), "write_answers", lambda _, ids, *rest, **more: asked.append(ids) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model, processor, [example], ["last"])
    (ids,) = asked[0].tolist()
    assert ids.count(processor.segment_token_id) == 2
    words = processor.tokenizer.decode(ids)
    assert words.index("boat") < words.index("[SEG]") < words.index("tree")
    capsys.readouterr()
    assert main([*flags, "--style", "teacher-forced"]) == 2
    assert f"{file}:1: several turns can be measured with --style generate only" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [4295, 2**32 - 1])
def test_any_seed_will_do(checkpoint, seed):
    chosen = settings(checkpoint, count=1, layers=["sample"], seed=seed)
    assert comparable(evaluate(chosen)) == comparable(evaluate(chosen))
    assert evaluate(chosen)["seed"] == seed


def test_without_a_folder_nothing_is_kept(tmp_path):
    store = BlockStore(None, {})
    store.add({"block": 0})
    assert store.finished() == {}
    store.clear()
