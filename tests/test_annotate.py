"""The annotate command: every image and query exactly once, whatever happens in between; and memory that runs out."""

import io
import json
import os
import signal
import struct
import tarfile
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, features
from processes import Command
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny import SEGMENT_TOKEN, say_only, tiny_model
from tiny_processor import gradient_image, tiny_processor, write

from uground.apps import annotate
from uground.apps.annotation_outputs import OutputFolder
from uground.processing import ReferringSegmentationPipeline
from uground.processing.halving import halve_batch

ANSWER = "the cup is [SEG] and a boat is [SEG] ."
QUERIES = ["the red cup", "a tree"]
SIZES = [(30, 50), (20, 20), (50, 30), (24, 40), (10, 30), (40, 12), (33, 21)]


def make_pipe(answer=ANSWER):
    pipe = ReferringSegmentationPipeline(
        model=tiny_model(3), processor=tiny_processor(), task="referring-segmentation", device=-1
    )
    pipe._forward_params = write(pipe.processor, answer)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        name = f"deeper/{number}.png" if number % 3 == 0 else f"{number}.jpg"
        Image.fromarray(gradient_image(height, width)).save(images / name)
    (images / "notes.txt").write_text("no image")
    (tmp_path / "queries.txt").write_text("\n".join(QUERIES) + "\n\n")
    return tmp_path


def arguments(folder, *more, output="out", input="images", queries="queries.txt"):
    words = ["--input", str(folder / input), "--queries", str(folder / queries), "--output", str(folder / output)]
    return annotate.build_parser().parse_args([*words, "--shard-size", "2", "--batch-size", "2", *map(str, more)])


def rows_of(folder, output="out"):
    files = sorted((folder / output).glob("part-*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def key(row):
    return row["image"], row["query_index"]


def test_every_image_is_asked_every_query(folder, pipe):
    annotate.annotate(arguments(folder), lambda _: pipe)
    rows = rows_of(folder)
    names = sorted(path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.[jp][pn]g"))
    assert [key(row) for row in rows] == [(name, place) for name in names for place in (0, 1)]
    assert [row["query"] for row in rows[:2]] == QUERIES and all(row["error"] is None for row in rows)
    assert len(list((folder / "out").glob("part-*"))) == 4 and not list((folder / "out").glob(".*.partial*"))
    for row in rows:
        path = folder / "images" / row["image"]
        expected = pipe(str(path), row["query"], generate_kwargs=write(pipe.processor, ANSWER))
        assert row["answer"] == expected["answer"] == "the cup is [SEG] and a boat is [SEG]."
        for segment, wanted in zip(row["segments"], expected["segments"], strict=True):
            assert [segment[name] for name in ("label", "box", "layer")] == [
                wanted[name] for name in ("label", "box", "layer")
            ]
            assert segment["score"] == pytest.approx(wanted["score"], abs=1e-5)
            mask = coco_mask.decode({**segment["mask"], "counts": segment["mask"]["counts"].encode()})
            assert np.array_equal(mask * 255, np.asarray(wanted["mask"])) and mask.any()


def test_an_interrupted_run_goes_on_without_a_lost_or_doubled_row(folder, pipe, monkeypatch):
    annotate.annotate(arguments(folder, "--batch-size", 1, output="whole"), lambda _: pipe)
    asked, run_batch = [], pipe.run_batch

    def dying(items):
        asked.append(len(items))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return run_batch(items)

    # One image a batch: the third batch is the first half of the second shard.
    monkeypatch.setattr(pipe, "run_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        annotate.annotate(arguments(folder, "--batch-size", 1), lambda _: pipe)
    assert len(rows_of(folder)) == 4
    (folder / "out" / ".0123.partial").write_bytes(b"cut off")
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("part-*")}
    annotate.annotate(arguments(folder, "--batch-size", 1), lambda _: pipe)
    assert rows_of(folder) == rows_of(folder, "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not list((folder / "out").glob(".*.partial*"))
    # Nothing is left to do, so nothing is loaded.
    annotate.annotate(arguments(folder), lambda _: pytest.fail("loaded a model for nothing"))


def test_processes_share_the_images_out(folder, pipe, monkeypatch):
    annotate.annotate(arguments(folder, output="whole"), lambda _: pipe)
    barrier, written, write_shard = threading.Barrier(2), [], annotate.Annotator.write_shard

    def state():
        number = int(threading.current_thread().name)
        return SimpleNamespace(
            process_index=number,
            num_processes=2,
            is_main_process=number == 0,
            is_local_main_process=False,
            wait_for_everyone=lambda: barrier.wait(timeout=120),
        )

    def note(self, shard, numbers, progress):
        written.append((int(threading.current_thread().name), shard))
        write_shard(self, shard, numbers, progress)

    monkeypatch.setattr(annotate, "job_state", state)
    monkeypatch.setattr(annotate.Annotator, "write_shard", note)
    pipes = [make_pipe(), make_pipe()]
    run = [lambda own=own: annotate.annotate(arguments(folder), lambda _: own) for own in pipes]
    threads = [threading.Thread(target=work, name=str(number)) for number, work in enumerate(run)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    assert rows_of(folder) == rows_of(folder, "whole")


def test_a_bad_image_is_recorded_and_passed_over(folder, pipe):
    (folder / "images" / "1.jpg").write_bytes((folder / "images" / "1.jpg").read_bytes()[:200])
    (folder / "images" / "4.jpg").write_bytes(b"no image at all")
    Image.fromarray(gradient_image(1, 40)).save(folder / "images" / "thin.png")
    annotate.annotate(arguments(folder), lambda _: pipe)
    rows = rows_of(folder)
    assert len(rows) == 16 and len({key(row) for row in rows}) == 16
    failed = {row["image"]: row["error"] for row in rows if row["error"]}
    assert set(failed) == {"1.jpg", "4.jpg", "thin.png"}
    assert "no known image format" in failed["4.jpg"] and "at least 2 pixels" in failed["thin.png"]
    assert all(row["answer"] is None and row["segments"] == [] for row in rows if row["error"])
    assert all(len(row["segments"]) == 2 for row in rows if not row["error"])


def bomb() -> bytes:
    """A PNG whose header promises 2.5 thousand million pixels."""
    pieces = (b"IHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND")
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in pieces]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken_avif() -> bytes:
    """An AVIF whose header is whole and whose pixels are not."""
    buffer = io.BytesIO()
    Image.fromarray(gradient_image(64, 64)).save(buffer, "AVIF")
    return buffer.getvalue()[:-200] + bytes(200)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_no_bad_input_ends_a_job(folder, pipe, as_dataset):
    whole = (folder / "images" / "1.jpg").read_bytes()
    contents = {"bomb.png": bomb(), "cut.jpg": whole[:200], "noise.webp": b"RIFF", "whole.jpg": whole}
    if features.check("avif"):
        contents["broken.avif"] = broken_avif()
    if as_dataset:
        columns = {"id": list(contents), "image": [{"bytes": data, "path": None} for data in contents.values()]}
        columns = {"id": [*columns["id"], "none"], "image": [*columns["image"], None]}
        kinds = Features({"id": Value("string"), "image": ImageFeature(decode=False)})
        Dataset.from_dict(columns, kinds).save_to_disk(str(folder / "bad"))
    else:
        (folder / "bad").mkdir()
        for name, content in contents.items():
            (folder / "bad" / name).write_bytes(content)
    annotate.annotate(arguments(folder, input="bad"), lambda _: pipe)
    errors = {row["image"]: row["error"] for row in rows_of(folder) if row["error"]}
    assert set(errors) == (set(contents) | ({"none"} if as_dataset else set())) - {"whole.jpg"}
    assert "too large" in errors["bomb.png"] and "\n" not in "".join(errors.values())
    assert sum(row["answer"] is not None for row in rows_of(folder)) == 2
    line = OutputFolder(folder / "out").closing_line()
    assert line.startswith(f"{2 * len(errors) + 2} rows in ") and f"{2 * len(errors)} of them failed: " in line
    assert f"bomb.png: {errors['bomb.png'][:100]}" in line


def test_a_query_that_cannot_be_asked_leaves_the_others(folder, pipe):
    lines = [
        {"image": "1.jpg", "queries": ["fish", "\ud83d", "a boat"]},
        {"image": "2.jpg", "query": "half \ude00"},
        {"image": "4.jpg", "queries": ["fish", "the " * 300]},
    ]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    annotate.annotate(arguments(folder, queries="queries.jsonl"), lambda _: pipe)
    rows = {key(row): row for row in rows_of(folder)}
    failed = {place for place, row in rows.items() if row["error"]}
    assert failed == {("1.jpg", 1), ("2.jpg", 0), ("4.jpg", 1)} and len(rows) == 6
    assert rows["1.jpg", 1]["query"] == "\\ud83d" and rows["1.jpg", 2]["query"] == "a boat"
    assert all((row["answer"] is None) == (place in failed) for place, row in rows.items())
    assert "may have 200 tokens" in rows["4.jpg", 1]["error"]
    alone = pipe(str(folder / "images/1.jpg"), "a boat", generate_kwargs=write(pipe.processor, ANSWER))
    assert [segment["box"] for segment in rows["1.jpg", 2]["segments"]] == [s["box"] for s in alone["segments"]]
    assert "; 4.jpg query_index 1: query 1 is too long" in OutputFolder(folder / "out").closing_line()


def test_names_that_are_no_text_are_written_out(folder, pipe):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(gradient_image(20, 30)).save(folder / "images" / "1.png")
    (folder / "images" / "1.png").rename(folder / "images" / name)
    annotate.annotate(arguments(folder), lambda _: pipe)
    assert "caf\\udce9.png" in {row["image"] for row in rows_of(folder) if row["error"] is None}


def test_what_the_model_refuses_is_found_in_its_batch(folder, pipe, monkeypatch):
    run_batch = pipe.run_batch

    def choosy(items):
        if any(
            "a tree" in item["queries"] and item["inputs"]["original_sizes"].tolist() == [[20, 20]] for item in items
        ):
            raise ValueError("the model computed NaN or infinity in torch.float16")
        return run_batch(items)

    monkeypatch.setattr(pipe, "run_batch", choosy)
    annotate.annotate(arguments(folder), lambda _: pipe)
    rows = rows_of(folder)
    assert len(rows) == 14 and len({key(row) for row in rows}) == 14
    assert [(key(row), row["answer"]) for row in rows if row["error"]] == [(("1.jpg", 1), None)]

    def refusing(items):
        raise ValueError("NaN in all weights")

    monkeypatch.setattr(pipe, "run_batch", refusing)
    with pytest.raises(ValueError, match="the model answers nothing: NaN in all weights"):
        annotate.annotate(arguments(folder, output="none"), lambda _: pipe)
    assert not list((folder / "none").glob("part-*"))


def test_the_output_is_a_dataset_and_goes_on_from_one_of_the_earlier_release(folder, pipe):
    annotate.annotate(arguments(folder), lambda _: pipe)
    out = folder / "out"
    (out / annotate.SETTINGS_FILE).rename(out / "annotate.json")
    (out / "part-00000001.parquet").unlink()
    with pytest.raises(ValueError, match="was begun with threshold=0.0, got 0.5"):
        annotate.annotate(arguments(folder, "--threshold", "0.5"), lambda _: pipe)
    annotate.annotate(arguments(folder), lambda _: pipe)
    data = load_dataset("parquet", data_dir=str(out), split="train", cache_dir=str(folder / "cache"))
    assert data.to_list() == rows_of(folder) and len(data) == 14
    annotate.annotate(arguments(folder), lambda _: pytest.fail("loaded a model for nothing"))
    (out / annotate.SETTINGS_FILE).write_text("[1")
    with pytest.raises(ValueError, match=".annotate.json must hold the settings of a job, but"):
        annotate.annotate(arguments(folder), lambda _: pipe)


def test_a_line_of_queries_ends_where_its_line_ends(tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffthe\u2028cup\x0ca\r\na\x85boat\u2029!\n\n".encode())
    assert annotate.read_queries(str(tmp_path / "q.txt"), ["1"]) == [["the\u2028cup\x0ca", "a\x85boat\u2029!"]]
    (tmp_path / "q.jsonl").write_text('{"image": "1", "query": "the\u2028cup"}\r\n', newline="")
    assert annotate.read_queries(str(tmp_path / "q.jsonl"), ["1"]) == [["the\u2028cup"]]


def test_queries_may_be_listed_per_image(folder, pipe):
    lines = [{"image": "1.jpg", "query": "fish"}, {"image": "deeper/3.png", "queries": QUERIES}]
    lines.append({"image": "1.jpg", "query": "a boat"})
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, lines)))
    annotate.annotate(arguments(folder, queries="queries.jsonl"), lambda _: pipe)
    asked = [(row["image"], row["query"]) for row in rows_of(folder)]
    assert asked == [
        ("1.jpg", "fish"),
        ("1.jpg", "a boat"),
        ("deeper/3.png", QUERIES[0]),
        ("deeper/3.png", QUERIES[1]),
    ]


def test_a_saved_dataset_is_an_input(folder, pipe):
    paths = [str(folder / "images" / "1.jpg"), str(folder / "images" / "notes.txt")]
    features = Features({"id": Value("string"), "picture": ImageFeature()})
    Dataset.from_dict({"id": ["first", "second"], "picture": paths}, features).save_to_disk(str(folder / "data"))
    annotate.annotate(arguments(folder, "--image-column", "picture", input="data"), lambda _: pipe)
    rows = rows_of(folder)
    assert [row["image"] for row in rows] == ["first"] * 2 + ["second"] * 2
    assert rows[0]["error"] is None and rows[2]["error"]
    with pytest.raises(ValueError, match="--image-column must be one of id, picture, got 'image'"):
        annotate.annotate(arguments(folder, input="data", output="other"), lambda _: pipe)


def as_stream(folder, kind):
    """The images of a folder, as files that are streamed."""
    files = sorted(path for path in (folder / "images").rglob("*") if path.suffix in (".png", ".jpg"))
    if kind == "parquet":
        rows = [{"id": file.stem, "image": {"bytes": file.read_bytes(), "path": None}} for file in files]
        features = Features({"id": Value("string"), "image": ImageFeature()})
        (folder / "stream").mkdir()
        for part in range(2):
            data = Dataset.from_list(rows[part::2], features=features)
            data.to_parquet(folder / "stream" / f"{part}.parquet")
        return "stream"
    if kind == "jsonl":
        lines = [
            json.dumps({"id": file.stem, "image": f"images/{file.relative_to(folder / 'images')}"}) for file in files
        ]
        (folder / "list.jsonl").write_text("\n".join(lines))
        return "list.jsonl"
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for file in files:
            content = io.BytesIO()
            Image.open(file).save(content, "PNG")
            info = tarfile.TarInfo(f"{file.stem}.png")
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    return "shard-*.tar"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_streams_are_killed_and_taken_up_by_two_processes(folder, pipe, kind, monkeypatch):
    annotate.annotate(arguments(folder, output="whole"), lambda _: pipe)
    given, barrier = as_stream(folder, kind), threading.Barrier(2)

    def state():
        number = int(threading.current_thread().name)
        return SimpleNamespace(
            process_index=number,
            num_processes=2,
            is_main_process=number == 0,
            is_local_main_process=False,
            wait_for_everyone=lambda: barrier.wait(timeout=120),
        )

    def work(own):
        asked, run_batch = [], own.run_batch

        def dying(items):
            asked.append(len(items))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return run_batch(items)

        own.run_batch = dying if dies else run_batch
        try:
            annotate.annotate(arguments(folder, "--image-column", "image", input=given), lambda _: own)
        except (KeyboardInterrupt, threading.BrokenBarrierError):
            barrier.abort()
        finally:
            own.run_batch = run_batch

    monkeypatch.setattr(annotate, "job_state", state)
    pipes = [make_pipe(), make_pipe()]
    for dies in (True, False):
        barrier.reset()
        threads = [threading.Thread(target=work, args=(own,), name=str(n)) for n, own in enumerate(pipes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if dies:
            before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("part-*")}
    assert len(before) == 2 and all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list((folder / "out").glob(".*.partial*"))
    rows, whole = rows_of(folder), rows_of(folder, "whole")
    assert len(rows) == len(whole) == 2 * len(SIZES)
    found = {(row["image"], row["query"]): row["segments"] for row in rows}
    for row in whole if kind != "tar" else []:
        stem = row["image"].rpartition("/")[2].rpartition(".")[0]
        assert [one["mask"] for one in found[stem, row["query"]]] == [one["mask"] for one in row["segments"]]
    assert {image for image, _ in found} == {str(number) for number in range(len(SIZES))}
    assert {path.name.split("-")[1] for path in (folder / "out").glob("part-*")} == {"00000", "00001"}
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was begun with processes=2, got 1"):
        annotate.annotate(arguments(folder, input=given), lambda _: pipe)


def test_streams_that_cannot_be_read_are_refused(folder, pipe):
    (folder / "broken.parquet").write_bytes(b"nothing")
    (folder / "mixed").mkdir()
    for name in ("a.parquet", "b.jsonl"):
        (folder / "mixed" / name).write_text("{}")
    given = as_stream(folder, "jsonl")
    for options, message in (
        ({"input": "broken.parquet"}, "broken.parquet cannot be read as a dataset"),
        ({"input": "mixed"}, r"mixed must hold files of one kind, got \.jsonl, \.parquet"),
        ({"input": given, "queries": "none.txt"}, "--queries .*none.txt does not exist"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            annotate.annotate(arguments(folder, **options), lambda _: pytest.fail("loaded a model for nothing"))
    with pytest.raises(ValueError, match="--image-column must be one of id, image, got 'picture'"):
        annotate.annotate(arguments(folder, "--image-column", "picture", input=given), lambda _: pytest.fail("loaded"))
    (folder / "asked.jsonl").write_text(json.dumps({"image": "3", "query": "a boat"}))
    annotate.annotate(arguments(folder, input=given, queries="asked.jsonl"), lambda _: pipe)
    assert [key(row) for row in rows_of(folder)] == [("3", 0)]


def test_formats_and_overlays_and_least_areas(folder, pipe):
    (folder / "images" / "2.jpg").write_bytes(b"no picture")
    annotate.annotate(arguments(folder, "--overlays", folder / "drawn"), lambda _: pipe)
    rows = rows_of(folder)
    annotate.annotate(arguments(folder, "--format", "jsonl", output="lines"), lambda _: pipe)
    lines = [json.loads(line) for file in sorted((folder / "lines").glob("*.jsonl")) for line in file.open()]
    for line, row in zip(lines, rows, strict=True):
        assert list(line) == list(row) and {**line, "segments": 0} == {**row, "segments": 0}
        assert [one["mask"] for one in line["segments"]] == [one["mask"] for one in row["segments"]]
    annotate.annotate(arguments(folder, "--format", "coco", output="coco"), lambda _: pipe)
    found = {}
    for file in sorted((folder / "coco").glob("part-*.json")):
        coco = COCO(file)
        for one in coco.anns.values():
            name = coco.imgs[one["image_id"]]["file_name"]
            query = coco.cats[one["category_id"]]["name"]
            found.setdefault((name, query), []).append((one["segmentation"]["counts"], one["area"]))
            height, width = one["segmentation"]["size"]
            assert (coco.imgs[one["image_id"]]["width"], coco.imgs[one["image_id"]]["height"]) == (width, height)
            assert coco.annToMask(one).sum() == one["area"]
    wanted = {(row["image"], row["query"]): row["segments"] for row in rows if row["segments"]}
    assert {key: [counts for counts, _ in value] for key, value in found.items()} == {
        key: [one["mask"]["counts"] for one in value] for key, value in wanted.items()
    }
    expected = OutputFolder(folder / "out").closing_line().replace("/out,", "/coco,")
    assert OutputFolder(folder / "coco", "coco").closing_line() == expected and "2 of them failed" in expected
    drawn = sorted(file.relative_to(folder / "drawn").as_posix() for file in (folder / "drawn").rglob("*.png"))
    assert len(drawn) == sum(row["error"] is None for row in rows)
    assert (
        drawn[0] == "part-00000000/image-00000000-query-000.png"
        and Image.open(folder / "drawn" / drawn[0]).width >= 384
    )
    areas = sorted(area for pairs in found.values() for _, area in pairs)
    least = areas[len(areas) // 2]
    annotate.annotate(arguments(folder, "--min-area", least, output="large"), lambda _: pipe)
    kept = sum(len(row["segments"]) for row in rows_of(folder, "large"))
    assert kept == sum(area >= least for area in areas) and kept > 0
    with pytest.raises(ValueError, match="was begun with format='parquet', got 'coco'"):
        annotate.annotate(arguments(folder, "--format", "coco"), lambda _: pipe)


def test_a_folder_is_called_the_same_as_a_stream(folder, pipe):
    (folder / "images" / "notes.txt").unlink()
    (folder / "asked.jsonl").write_text(json.dumps({"image": "deeper/3.png", "query": "a boat"}))
    for name, more in (("out", ()), ("streamed", ("--stream",))):
        annotate.annotate(arguments(folder, *more, output=name, queries="asked.jsonl"), lambda _: pipe)
        assert [key(row) for row in rows_of(folder, name)] == [("deeper/3.png", 0)]


def test_overlays_asked_for_later_are_drawn(folder, pipe):
    annotate.annotate(arguments(folder), lambda _: pipe)
    rows = rows_of(folder)
    annotate.annotate(arguments(folder, "--overlays", folder / "drawn"), lambda _: pipe)
    assert len(list((folder / "drawn").rglob("*.png"))) == len(rows) == len(rows_of(folder))
    annotate.annotate(arguments(folder, "--overlays", folder / "drawn"), lambda _: pytest.fail("loaded for nothing"))


@pytest.mark.parametrize("entry", [5, {"x": 5}])
def test_entries_that_are_no_image_are_told(folder, pipe, entry):
    (folder / "list.jsonl").write_text(json.dumps({"image": entry}))
    annotate.annotate(arguments(folder, input="list.jsonl"), lambda _: pipe)
    expected = f'an image must be a path or {{"bytes": …, "path": …}}, got {entry}'
    assert [row["error"] for row in rows_of(folder)] == [expected] * len(QUERIES)


@pytest.mark.parametrize("given", ["none.parquet", "none-*.tar", "~/none", "none.jpg"])
@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_files_that_are_missing_are_not_looked_for_on_the_hub(folder, given, more, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["--input", given, "--queries", "queries.txt", "--output", "out", *more]
    with pytest.raises(FileNotFoundError, match=r"^--input \S+ does not exist$"):
        annotate.annotate(annotate.build_parser().parse_args(words), lambda _: pytest.fail("loaded for nothing"))


def test_images_of_one_name_stay_two_in_coco(folder, pipe):
    files = ["images/2.jpg", "images/deeper/3.png"]
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"id": "same", "image": file}) for file in files))
    annotate.annotate(arguments(folder, "--format", "coco", input="list.jsonl"), lambda _: pipe)
    (file,) = (folder / "out").glob("part-*.json")
    content = json.loads(file.read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    assert list(sizes.values()) == [[50, 30], [24, 40]]
    assert {image["file_name"] for image in content["images"]} == {"same"}
    assert {one["image_id"] for one in content["annotations"]} == set(sizes)
    assert all(one["segmentation"]["size"] == sizes[one["image_id"]] for one in content["annotations"])


def test_images_are_prepared_a_few_ahead_and_in_order():
    started, taken = [], []
    for number in annotate.prefetch(range(20), lambda number: started.append(number) or number, 4):
        taken.append(number)
        assert len(started) <= len(taken) + 4
    assert taken == list(range(20))


BAD = {
    "settings": (["--threshold", "0.5"], {}, "was begun with threshold=0.0, got 0.5; choose another folder"),
    "batch": (["--batch-size", "0"], {}, "--batch-size must be at least 1, got 0"),
    "shard": (["--shard-size", "-1"], {}, "--shard-size must be at least 1, got -1"),
    "prefetch": (["--prefetch", "0"], {}, "--prefetch must be at least 1, got 0"),
    "rows": (["--max-rows", "0"], {}, "--max-rows must be at least 1, got 0"),
    "kept": (["--max-kept-prefixes", "-1"], {}, "--max-kept-prefixes must be at least 0, got -1"),
    "tokens": (["--max-new-tokens", "0"], {}, "--max-new-tokens must be at least 1, got 0"),
    "score": (["--threshold", "3"], {}, r"--min-score must lie in 0\.\.1, got 3.0"),
    "no score": (["--threshold", "nan"], {}, r"--min-score must lie in 0\.\.1, got nan"),
    "peak": (["--reject-threshold", "-1"], {}, r"--reject-threshold must lie in 0\.\.1, got -1.0"),
    "layer": (
        ["--layer-selection", "best"],
        {},
        "--layer-selection must be argmax, last, sample, mc or a number, got",
    ),
    "input": ([], {"input": "nowhere"}, "does not exist"),
    "no images": ([], {"input": "empty"}, "holds no images"),
    "no queries": ([], {"queries": "blank.txt"}, "holds no queries"),
    "no json": ([], {"queries": "bad.jsonl"}, "bad.jsonl:1: the line must be JSON"),
    "deep json": ([], {"queries": "deep.jsonl"}, "deep.jsonl:1: the line must be JSON, but"),
    "two bytes": ([], {"queries": "wide.txt"}, "wide.txt:1: the file looks like UTF-16"),
    "latin": ([], {"queries": "latin.txt"}, "latin.txt:2: the line is not UTF-8, got the byte 0xe9"),
    "a folder": ([], {"queries": "images"}, "--queries .*images is a folder"),
    "no query": ([], {"queries": "none.jsonl"}, 'none.jsonl:2: the line must hold "image" and either "query" or'),
    "both": (
        [],
        {"queries": "both.jsonl"},
        'both.jsonl:1: the line must hold "image" and either "query" or "queries"',
    ),
    "no file": ([], {"queries": "nothing.txt"}, "--queries .*nothing.txt does not exist"),
    "stranger": (
        [],
        {"queries": "stranger.jsonl"},
        "stranger.jsonl:1: the line asks about the image '9.png', which is not in",
    ),
}


@pytest.mark.parametrize("more, names, sentence", BAD.values(), ids=BAD)
def test_mistakes_are_told_before_a_model_is_loaded(folder, pipe, more, names, sentence, monkeypatch):
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text(" \n")
    (folder / "bad.jsonl").write_text("{")
    (folder / "none.jsonl").write_text('{"image": "1.jpg", "query": "a"}\n{"image": "1.jpg", "query": " "}')
    (folder / "both.jsonl").write_text('{"image": "1.jpg", "query": "a", "queries": ["b"]}')
    (folder / "stranger.jsonl").write_text('{"image": "9.png", "query": "a"}')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "wide.txt").write_text("the cup", encoding="utf-16")
    (folder / "latin.txt").write_bytes("the cup\ncafé\n".encode("latin-1"))
    if more == ["--threshold", "0.5"]:
        annotate.annotate(arguments(folder), lambda _: pipe)
    with pytest.raises((OSError, ValueError), match=sentence):
        annotate.annotate(arguments(folder, *more, **names), lambda _: pytest.fail("loaded a model"))


def test_the_command_loads_a_checkpoint(folder, capsys):
    model = tiny_model(3, similarity_scaling="minmax")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    words = ["--input", folder / "images", "--queries", folder / "queries.txt", "--output", folder / "out"]
    words = [str(word) for word in (*words, "--model", folder / "model")]
    assert annotate.main(words) == 0
    assert capsys.readouterr().out == f"14 rows in 1 files in {folder / 'out'}, 0 of them failed\n"
    assert all(row["answer"] for row in rows_of(folder))
    for more, sentence in (
        (["--layer-selection", "9"], "--layer-selection must lie in 0..4 for"),
        (
            ["--reject-threshold", "0.5"],
            "--reject-threshold needs a model with similarity_scaling='scaled', got 'minmax'",
        ),
    ):
        assert annotate.main([*words, *more, "--output", str(folder / "other" / more[0])]) == 2
        assert sentence in capsys.readouterr().err


def test_killed_and_taken_up_by_two_processes(folder):
    for number in range(20):
        Image.fromarray(gradient_image(20 + number, 40)).save(folder / "images" / f"more-{number}.png")
    model = make_pipe().model
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")

    def words(output):
        named = {"input": "images", "queries": "queries.txt", "model": "model", "output": output}
        flags = [word for name, value in named.items() for word in (f"--{name}", str(folder / value))]
        return ["uground.apps.annotate", *flags, "--shard-size", "1", "--batch-size", "1"]

    killed = Command(folder / "killed", *words("out"))
    deadline = time.monotonic() + 240
    while len(list((folder / "out").glob("part-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.kill()
    assert killed.wait() == [-signal.SIGKILL], killed.text("stderr")
    finished = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("part-*")}
    assert 3 <= len(finished) < 27
    resumed = Command(folder / "resumed", *words("out"), count=2)
    assert resumed.wait() == [0, 0], resumed.text("stderr")
    assert resumed.text("stdout").count("54 rows in 27 files") == 1
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert annotate.main(words("whole")[1:]) == 0
    assert rows_of(folder) == rows_of(folder, "whole")
    assert not list((folder / "out").glob(".*.partial*"))


def test_a_mistake_is_one_line(folder, capsys):
    assert annotate.main(["--input", "./nowhere", "--queries", "x.txt", "--output", str(folder / "out")]) == 2
    assert capsys.readouterr().err == "annotate: error: --input ./nowhere does not exist\n"


def fail_above(pipe, monkeypatch, rows, error):
    sizes, segment = [], pipe.model.segment

    def scarce(input_ids, **others):
        sizes.append(len(input_ids))
        if len(input_ids) > rows:
            raise error
        return segment(input_ids=input_ids, **others)

    monkeypatch.setattr(pipe.model, "segment", scarce)
    return sizes


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("error", [OUT, RuntimeError("DefaultCPUAllocator: not enough memory"), MemoryError("no")])
@pytest.mark.parametrize("texts", [[["a tree", "fish", "the cup"]], ["a tree", "the red cup"]])
def test_a_batch_that_does_not_fit_is_halved(pipe, monkeypatch, texts, error):
    images = [gradient_image(30, 50), gradient_image(50, 20)][: len(texts)]
    settings = {"batch_size": 2, "max_new_tokens": 3, "return_similarity": True}
    monkeypatch.setattr(pipe, "_forward_params", {})
    monkeypatch.setattr(pipe.model.generation_config, "suppress_tokens", say_only(5, SEGMENT_TOKEN))
    expected = pipe(images, texts, **settings)
    sizes = fail_above(pipe, monkeypatch, 2 if len(texts) == 1 else 1, error)
    found = pipe(images, texts, **settings)
    assert sizes == ([3, 1, 2] if len(texts) == 1 else [2, 1, 1])
    if len(texts) == 1:
        found, expected = found[0], expected[0]
    assert [result["answer"] for result in found] == [result["answer"] for result in expected]
    assert any(result["segments"] for result in expected)
    for one, other in zip(found, expected, strict=True):
        for segment, wanted in zip(one["segments"], other["segments"], strict=True):
            assert np.array_equal(np.asarray(segment["mask"]), np.asarray(wanted["mask"]))
            np.testing.assert_allclose(segment["similarity_map"], wanted["similarity_map"], atol=1e-4)


def test_half_a_batch_that_does_not_fit_is_an_error_that_says_what_to_lower(pipe, monkeypatch):
    sizes = fail_above(pipe, monkeypatch, 0, OUT)
    with pytest.raises(MemoryError, match="half a batch, 2 queries, does not fit into memory; lower batch_size, max_"):
        pipe(gradient_image(30, 50), ["a tree", "fish", "the cup"])
    assert sizes == [3, 1]
    with pytest.raises(MemoryError, match="one query does not fit into memory; lower batch_size.*CUDA out of memory"):
        pipe(gradient_image(30, 50), "a tree")
    fail_above(pipe, monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pipe(gradient_image(30, 50), "a tree")


def test_halves_are_the_whole(pipe):
    images = [gradient_image(30, 50), gradient_image(50, 20), gradient_image(9, 9)]
    inputs = dict(pipe.processor(images, [["a tree", "fish"], ["the cup"], ["boat", "a cup"]]))
    first, second = halve_batch(inputs)
    assert first["image_index"].tolist() == [0, 0] and second["image_index"].tolist() == [0, 1, 1]
    for name in set(inputs) - {"image_index"}:
        assert torch.equal(torch.cat([first[name], second[name]]), inputs[name])
    first, second = halve_batch(dict(pipe.processor(images[0], ["a tree", "fish", "boat"])))
    assert len(first["input_ids"]) == 1 and second["image_index"].tolist() == [0, 0]
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    single = dict(pipe.processor(images[0], "a tree"))
    assert halve_batch(single) == [single]
