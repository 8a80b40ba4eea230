"""What a trainer pushes to the Hub: checkpoints that are complete, and nothing that lies beside them."""

import json
import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, run_as_future
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from uground.hub.publish.card import write_card
from uground.hub.publish.publishing import ADAPTER_FILES, TAKEN, WEIGHTS
from uground.hub.publish.run_files import COMPLETE_FILE
from uground.hub.weights.code_files import write_json

logger = logging.get_logger(__name__)

# Arguments and optimizer states are pickles: they stay at home.
BESIDE_WEIGHTS = (*TAKEN, "*.py")
PUSHED = (*BESIDE_WEIGHTS, *WEIGHTS, *ADAPTER_FILES)
# In the output folder; the underscore keeps it out of what is pushed from there.
STAGE_PREFIX = "_push-"


class HubPushMixin:
    """
    For a `transformers.Trainer`: `push_to_hub` and every `hub_strategy` leave a repository that loads by itself, with
    code, processor and a card that says what is known of the model.

    Pickles are not pushed, but for the state of the optimizer under the strategies `"checkpoint"` and
    `"all_checkpoints"`, which are there to go on training from.
    """

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **_others: Any,
    ) -> None:
        """Write the card of the output folder; see `uground.hub.publish.card`."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, model_name, dataset_name)

    def _write_card(self, folder: str | os.PathLike, model_name=None, dataset_name=None) -> None:
        config = self.accelerator.unwrap_model(self.model).config
        origin = config.name_or_path
        write_card(
            folder,
            config=config,
            repo_id=self.hub_model_id or model_name,
            base_models=[origin] if origin and not os.path.exists(origin) else None,
            datasets=[dataset_name] if isinstance(dataset_name, str) else dataset_name,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save model and processor, write the card and push; arguments as for `Trainer.push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        return self._push_output(commit_message, token, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: the trainer calls it before the checkpoint is complete, see [`push_checkpoint`]."""

    def push_checkpoint(self, checkpoint: str | os.PathLike) -> None:
        """Push a complete checkpoint in the background, as `hub_strategy` says; it may be deleted meanwhile."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output = Path(self.args.output_dir)
        if not is_busy:
            # A run that was killed left these.
            for left in output.glob(f"{STAGE_PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
        if self.args.save_strategy == SaveStrategy.STEPS:
            message = f"Training in progress, step {self.state.global_step}"
        else:
            message = f"Training in progress, epoch {int(self.state.epoch)}"
        stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=output))
        model = stage / "model"
        _stage_model(Path(checkpoint), output, model)
        self._write_card(model)
        uploads = [{"folder_path": model, "commit_message": message}]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            _stage_state(Path(checkpoint), stage / "state")
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint).name
            title = f"{message}, checkpoint"
            uploads.append({"folder_path": stage / "state", "path_in_repo": name, "commit_message": title})
        target = {"repo_id": self.hub_model_id, "token": self.args.hub_token, "revision": self.args.hub_revision}
        job = run_as_future(_upload, stage, [target | upload for upload in uploads])
        if is_busy:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])

    def _push_output(self, message: str | None, token: str | None, revision: str | None, run_as_future: bool):
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            allow_patterns=list(PUSHED),
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
            commit_message=message,
            token=token,
            run_as_future=run_as_future,
            revision=revision or self.args.hub_revision,
        )


def _upload(stage: Path, uploads: list[dict]) -> None:
    """Upload folders, a commit each, and remove the staged files."""
    try:
        for upload in uploads:
            HfApi().upload_folder(**upload)
    except Exception as error:
        # Nobody asks a background job for its exception.
        logger.warning(f"{uploads[0]['commit_message']!r} could not be pushed: {error}")
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stage_model(checkpoint: Path, output: Path, folder: Path) -> None:
    """What loads by itself, of a checkpoint, and what lies beside the checkpoints, such as the recipe."""
    folder.mkdir()
    for source, patterns in ((checkpoint, PUSHED), (output, BESIDE_WEIGHTS)):
        for path in source.iterdir():
            # The card is written anew, which must not reach the checkpoint through a link.
            is_pushed = path.name != "README.md" and any(fnmatch(path.name, pattern) for pattern in patterns)
            if is_pushed and path.is_file() and not (folder / path.name).exists():
                _link(path, folder / path.name)


def _stage_state(checkpoint: Path, folder: Path) -> None:
    """All of a checkpoint but the training arguments, which resuming does not read, listed as complete."""
    ignored = shutil.ignore_patterns(TRAINING_ARGS_NAME, COMPLETE_FILE)
    shutil.copytree(checkpoint, folder, ignore=ignored, copy_function=_link)
    sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    write_json(folder / COMPLETE_FILE, {name: size for name, size in sizes.items() if name != TRAINING_ARGS_NAME})


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A second name for a file, which outlives the first; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
