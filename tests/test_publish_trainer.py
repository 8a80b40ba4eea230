"""What a training run leaves on the Hub: repositories that load by themselves, and no pickles."""

import pytest
from huggingface_hub import snapshot_download
from loopback_hub import LoopbackHub, connected
from tiny import tiny_model
from tiny_processor import tiny_processor

from uground.hub.checkpoint_folder import load_checkpoint
from uground.hub.closure import code_files
from uground.processing import UGroundProcessor
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
        gradient_checkpointing=False,
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


def test_push_with_the_state_to_resume_from(hub, tmp_path):
    make_trainer(tmp_path / "run", hub_strategy="checkpoint").train()
    assert_complete(hub, tmp_path, "Training in progress, step 2", extra={"last-checkpoint"})
    assert "last-checkpoint/optimizer.pt" in hub.repository(REPOSITORY).head.files
