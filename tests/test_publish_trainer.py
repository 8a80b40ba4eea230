"""What a training run leaves on the Hub: repositories that load by themselves, and no pickles."""

from concurrent.futures import wait
from pathlib import Path
from threading import Event

import pytest
from huggingface_hub import snapshot_download
from loopback_hub import LoopbackHub, connected
from tiny import tiny_model
from tiny_processor import tiny_processor
from transformers.utils.hub import PushInProgress

from uground.hub.publish import trainer_push
from uground.hub.weights.checkpoint_folder import load_checkpoint
from uground.hub.weights.code_files import code_files
from uground.processing import UGroundProcessor
from uground.training.checkpoints import what_is_missing
from uground.training.data import scene_dataset
from uground.training.trainer import UGroundTrainer, UGroundTrainingConfig

REPOSITORY = "someone/trained"
COMPLETE = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *code_files(),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path):
        yield server


def make_trainer(folder, **settings) -> UGroundTrainer:
    arguments = UGroundTrainingConfig(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=1,
        push_to_hub=True,
        hub_model_id=REPOSITORY,
        hub_always_push=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    return UGroundTrainer(tiny_model(), arguments, tiny_processor(), train_dataset=scene_dataset("train", 2, 0))


def assert_complete(hub, tmp_path, title: str, extra: set[str] = frozenset()) -> None:
    repository = hub.repository(REPOSITORY)
    assert title in [commit.title for commit in repository.commits]
    for commit in repository.commits[1:]:
        names = {name for name in commit.files if "/" not in name}
        assert names == COMPLETE, commit.title
    assert {name.split("/")[0] for name in repository.head.files if "/" in name} == extra
    assert b"OSU-NLP-Group/UGround" in repository.head.files["README.md"].data
    folder = snapshot_download(REPOSITORY, cache_dir=tmp_path / "cache")
    load_checkpoint(folder)
    UGroundProcessor.from_pretrained(folder)


def test_push_at_the_end(hub, tmp_path):
    trainer = make_trainer(tmp_path / "run", hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(dataset_name="scenes")
    assert_complete(hub, tmp_path, "End of training")
    assert "- Data: scenes" in hub.repository(REPOSITORY).head.files["README.md"].data.decode()
    assert (tmp_path / "run" / "training_args.bin").is_file(), "stays at home"


def test_push_with_every_save(hub, tmp_path):
    make_trainer(tmp_path / "run", hub_strategy="every_save").train()
    assert_complete(hub, tmp_path, "Training in progress, step 2")


@pytest.mark.parametrize(
    ("strategy", "pushed"),
    [("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-1", "checkpoint-2"})],
)
def test_push_with_the_state_to_resume_from(strategy, pushed, hub, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(PushInProgress, "wait_until_done", lambda push: jobs.extend(push.jobs) or wait(push.jobs))
    # The first push waits until its checkpoint is rotated away.
    rotated = Event()
    upload = trainer_push._upload
    monkeypatch.setattr(trainer_push, "_upload", lambda *given: rotated.wait(60) and upload(*given))
    trainer = make_trainer(tmp_path / "run", hub_strategy=strategy)
    finish = trainer._finish_current_push
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: (rotated.set(), finish()))
    trainer.train()
    assert not (tmp_path / "run" / "checkpoint-1").exists()
    assert [job.exception() for job in jobs] == [None, None]
    assert not list((tmp_path / "run").glob("_push-*"))
    assert_complete(hub, tmp_path, "Training in progress, step 2", extra=pushed)
    assert not [name for name in hub.repository(REPOSITORY).head.files if name.endswith("training_args.bin")]
    folder = Path(snapshot_download(REPOSITORY, cache_dir=tmp_path / "cache"))
    for name in pushed:
        assert (folder / name / "optimizer.pt").is_file()
        assert what_is_missing(folder / name) is None
    assert what_is_missing(tmp_path / "run" / "checkpoint-2") is None
    resumed = make_trainer(tmp_path / "resumed", hub_strategy="end")
    resumed.args.max_steps = 3
    resumed.train(resume_from_checkpoint=str(folder / max(pushed)))
    assert resumed.state.global_step == 3


def test_failed_push_is_told(hub, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("the Hub is away")

    monkeypatch.setattr(trainer_push.HfApi, "upload_folder", refuse)
    told = []
    monkeypatch.setattr(trainer_push.logger, "warning", told.append)
    make_trainer(tmp_path / "run", hub_strategy="every_save").train()
    assert told[-1] == "'Training in progress, step 2' could not be pushed: the Hub is away"
    assert not list((tmp_path / "run").glob("_push-*"))
