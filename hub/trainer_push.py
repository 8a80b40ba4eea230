"""What a trainer pushes to the Hub: checkpoints that are complete, and nothing that lies beside them."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from uground.hub.card import write_card
from uground.hub.publish import ADAPTER_FILES, TAKEN, WEIGHTS

# Arguments and optimizer states are pickles: they stay at home.
PUSHED = (*TAKEN, *WEIGHTS, *ADAPTER_FILES, "*.py")


class HubPushMixin:
    """
    For a `transformers.Trainer`: `push_to_hub` and every `hub_strategy` leave a repository that loads by itself, with
    code, processor and a card that says what is known of the model.

    Pickles are not pushed, but for the state of the optimizer under the strategies `"checkpoint"` and
    `"all_checkpoints"`, which are there to go on training from.
    """

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **_others) -> None:
        """Write the card of the output folder; see `uground.hub.card`."""
        if not self.is_world_process_zero():
            return
        config = self.accelerator.unwrap_model(self.model).config
        origin = config.name_or_path
        write_card(
            self.args.output_dir,
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
        **card,
    ):
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
        """After a checkpoint was saved, as `hub_strategy` says."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The checkpoint may be deleted while it is sent.
        for path in Path(checkpoint_folder).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in PUSHED):
                shutil.copyfile(path, Path(self.args.output_dir) / path.name)
        self.create_model_card()
        if self.args.save_strategy == SaveStrategy.STEPS:
            message = f"Training in progress, step {self.state.global_step}"
        else:
            message = f"Training in progress, epoch {int(self.state.epoch)}"
        jobs = [self._push_output(message, self.args.hub_token, None, run_as_future=True)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = strategy == HubStrategy.CHECKPOINT
            jobs.append(
                HfApi().upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    token=self.args.hub_token,
                    run_as_future=True,
                    revision=self.args.hub_revision,
                )
            )
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

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
