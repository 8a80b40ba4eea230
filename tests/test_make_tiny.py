"""The stages of the bundled checkpoint: scenes drawn ahead, exact resume, forms of prompt, and the driver."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from uground.processing import masks_to_boxes
from uground.training.choose_rejection import careful_threshold, shares
from uground.training.scenes import make_tiny, pretrain, sam_stage, scene, scene_store, vision_stage
from uground.training.scenes.make_tiny import Stage
from uground.training.scenes.scene_store import PROPERTIES, DrawnBatch, SceneStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight training and two validation scenes, kept in shards of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_store, "SHARD", 2)
        path = tmp_path_factory.mktemp("scenes")
        for split in ("train", "validation"):
            SceneStore(path, split, pretrain.TRAIN_SEED, 8 if split == "train" else 2, processes=1)
        yield path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(scene_store, "SHARD", 2)
    monkeypatch.setattr(pretrain, "VALIDATION_SCENES", 2)
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)


def batch_of(objects: torch.Tensor, count: int) -> DrawnBatch:
    """One scene of the whole frame with objects by number, all of class 0."""
    side = scene_store.FRAME
    properties = torch.full((1, scene_store.MAX_OBJECTS, len(PROPERTIES)), -1)
    properties[:, :count] = 0
    return DrawnBatch(
        torch.zeros(1, side, side, 3, dtype=torch.uint8), objects[None], torch.tensor([[side, side]]), properties
    )


def test_stored_scenes_are_those_that_are_drawn(folder):
    store = SceneStore(folder, "train", pretrain.TRAIN_SEED, 7)
    assert len(store) == 8
    batch, drawn = store.read(np.array([5])), scene("train", pretrain.TRAIN_SEED, 5)
    height, width = batch.sizes[0].tolist()
    assert (height, width) == (drawn.image.height, drawn.image.width)
    assert np.array_equal(batch.images[0, :height, :width].numpy(), np.asarray(drawn.image))
    for number, thing in enumerate(drawn.objects):
        assert np.array_equal(batch.masks()[0, number, :height, :width].numpy(), thing.mask)
        classes = batch.properties[0, number].tolist()
        assert [names[n] for names, n in zip(PROPERTIES.values(), classes, strict=True)] == [
            getattr(thing, name) for name in PROPERTIES
        ]
    first, again, other = store.sample(3, 4, 0), store.sample(3, 4, 0), store.sample(4, 4, 0)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)


@pytest.mark.parametrize("stage", pretrain.STAGES)
def test_a_broken_off_stage_ends_with_the_same_weights(folder, tmp_path, monkeypatch, stage):
    def command(output: Path) -> list[str]:
        settings = {"--output": output, "--scenes": folder, "--scene-count": 8, "--steps": 2, "--batch-size": 1}
        return [stage, *(str(part) for pair in settings.items() for part in pair)]

    assert pretrain.main(command(tmp_path / "whole")) == 0
    step, broken = pretrain.Pretraining._train_step, tmp_path / "broken"

    def stop(run, batch):
        if run.step == 1:
            raise KeyboardInterrupt
        step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_train_step", stop)
        assert pretrain.main(command(broken)) != 0
    assert not json.loads((broken / "pretraining.json").read_text())["finished"]
    assert pretrain.main(command(broken)) == 0
    expected, got = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", broken))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    # Finished: nothing is trained or written any more, and another run may not take its place.
    (broken / "model.safetensors").unlink()
    assert pretrain.main(command(broken)) == 0 and not (broken / "model.safetensors").exists()
    assert pretrain.main([*command(broken), "--seed", "1"]) == 2


def test_prompts_point_at_their_targets():
    torch.manual_seed(0)
    objects = torch.zeros(scene_store.FRAME, scene_store.FRAME, dtype=torch.uint8)
    objects[40:80, 100:160] = 1
    batch = batch_of(objects, 1)
    masks = batch.masks()
    for _ in range(8):
        given = sam_stage.prompt_points(batch, masks)
        columns, rows = given.points[0, 0].long().T
        assert given.targets[0, rows, columns].tolist() == given.labels[0, 0].bool().tolist()
    assert masks_to_boxes(masks[:, 0]).tolist() == [[100, 40, 160, 80]]
    assert masks_to_boxes(torch.zeros(1, 256, 256, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]
    coarse = sam_stage.prompt_coarse(batch, masks)
    inside = masks[0, 0, ::4, ::4]
    assert coarse.mask[0, 0][inside].mean() > 0 > coarse.mask[0, 0][~inside].mean()


def test_of_several_masks_the_best_counts():
    objects = torch.zeros(1, scene_store.FRAME, scene_store.FRAME, dtype=torch.bool)
    objects[:, :128] = True
    right = torch.full((1, 1, 64, 64), -20.0)
    right[:, :, :32] = 20.0
    logits = torch.cat([-right, right], 1)
    loss, iou = sam_stage.mask_loss(logits, torch.tensor([[0.0, 1.0]]), objects)
    assert loss < 1e-3 and iou == 1.0
    assert sam_stage.mask_loss(logits, torch.tensor([[1.0, 0.0]]), objects)[0] == pytest.approx(1.0, abs=1e-3)


def test_states_are_pooled_by_what_objects_cover():
    masks = torch.zeros(1, 256, 256, dtype=torch.bool)
    masks[:, :128, :192] = True
    coverage = vision_stage.grid_coverage(masks, 2)
    assert torch.allclose(coverage, torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]))
    states = torch.tensor([[[3.0], [6.0], [9.0], [12.0]]])
    assert vision_stage.pooled(states, coverage.flatten(1)[None]).tolist() == [[[4.0]]]


ROWS = [
    *({"there": True, "rejected": False, "peak": peak} for peak in (0.9, 0.8, 0.4, 0.6)),
    {"there": True, "rejected": True, "peak": 0.0},
    {"there": False, "rejected": False, "peak": 0.5},
    {"there": False, "rejected": True, "peak": 0.0},
]


def test_the_threshold_costs_no_more_than_it_may():
    assert careful_threshold(ROWS, 0.0) == 0.4  # the weakest one that is there is kept
    assert careful_threshold(ROWS, 0.2) == 0.6 and careful_threshold(ROWS, 1.0) == 0.0
    assert shares(ROWS, 0.0) == {"absent rejected": 0.5, "present kept": 0.8}
    assert shares(ROWS, 0.6) == {"absent rejected": 1.0, "present kept": 0.6}


def test_the_driver_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    asked, failing = [], {"second"}

    class Command:
        def __init__(self, command, env):
            self.name, self.threads = command[2], env["OMP_NUM_THREADS"]
            asked.append((self.name, self.threads))
            if "--output" in command and self.name not in failing:
                Path(command[command.index("--output") + 1]).mkdir()

        def wait(self):
            return int(self.name in failing)

        def terminate(self):
            pass

    one, other = Stage("one", "one", ()), Stage("other", "other", ())
    second = Stage("second", "second", (), whole=tmp_path / "second")
    monkeypatch.setattr(make_tiny, "stages", lambda runs: [(one, other), (second,)])
    monkeypatch.setattr(make_tiny.subprocess, "Popen", Command)
    arguments = ["--runs", str(tmp_path), "--threads", "4"]
    assert make_tiny.main(arguments) == 2
    assert asked == [("one", "2"), ("other", "2"), ("second", "4")] and not (tmp_path / "second").exists()
    failing.clear()
    assert make_tiny.main(arguments) == 0 and (tmp_path / "second").is_dir()
    assert asked[3:] == [("second", "4")]
    assert make_tiny.main(arguments) == 0 and len(asked) == 4


def test_every_stage_has_its_command_and_its_recipe(tmp_path):
    found = [stage for together in make_tiny.stages(tmp_path) for stage in together]
    assert [stage.name for stage in found] == ["sam", "vision", "start", "frozen", "joint", "threshold", "checkpoint"]
    root = Path(make_tiny.__file__).parents[2]
    for stage in found:
        assert (root / f"{stage.module.removeprefix('uground.').replace('.', '/')}.py").is_file()
        recipes = [path for path in stage.arguments if path.endswith(".yaml")]
        assert all(Path(path).is_file() for path in recipes)
