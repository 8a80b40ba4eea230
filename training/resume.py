"""How a trainer goes on from what an earlier process of the same run has saved."""

import math
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from uground.training.checkpoints import check_same_run, last_complete_checkpoint
from uground.training.objectives.reward_baseline import BASELINE_FILE

logger = logging.get_logger(__name__)


class ResumeMixin:
    """
    For a `transformers.Trainer` of a UGround model that has `bare_model`, `run_record`: what its run was told, and
    `baseline_training`, a `BaselineTraining` or `None`.

    Only whole checkpoints of the same run count, and one at the end of a run is never trained further.
    """

    def resumable_checkpoint(self) -> str | None:
        """
        The newest whole checkpoint in `output_dir`, for `train(resume_from_checkpoint=…)`; `None` without any.

        Raises:
            ValueError: it is of a run that was told something else that matters; the sentence says what.
        """
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        if checkpoint is None:
            return None
        check_same_run(checkpoint, self.run_record)
        return str(checkpoint)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = len(self.get_train_dataloader())
        return math.ceil(
            self.args.num_train_epochs * max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        )

    def _is_finished(self, checkpoint: str) -> bool:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < self.total_steps():
            return False
        if self.is_sharded:
            raise ValueError(
                f"{checkpoint} is the end of a run that has made all its {state.global_step} steps, and sharded "
                f"weights are read in training only: take the model from there, or name another output_dir"
            )
        return True

    def _load_end(self, checkpoint: str) -> TrainOutput:
        """Weights and state of a run that has made all its steps."""
        self._load_from_checkpoint(checkpoint)
        self._load_baseline(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        logger.info(f"{checkpoint} is the end of a run of {self.state.global_step} steps; nothing is trained")
        return TrainOutput(self.state.global_step, 0.0, {})

    def load_finished(self, folder: str, steps: int) -> None:
        """
        Take over what a finished run saved; weights that are sharded here stay as they are.

        Args:
            folder: where the run saved its end.
            steps: how many it made.
        """
        if not self.is_sharded:
            self._load_from_checkpoint(folder)
        self.state.global_step = steps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """
        Weights of a checkpoint to go on from.

        `Trainer` compares names in the file with names in the model and passes over what differs; a LLaVA is saved
        under other names than it has, so a whole model is loaded by `from_pretrained`, which knows both and is strict.
        """
        if self._is_plain_model():
            self._load_whole_model(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self._is_plain_model():
            self._load_whole_model(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _is_plain_model(self) -> bool:
        """Neither adapters nor sharded weights: one file holds what `self.model` holds."""
        return not (is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_whole_model(self, folder) -> None:
        # Nothing that a file holds is rounded on its way to the dtype that the parameter has here.
        loaded = type(self.bare_model).from_pretrained(folder, dtype=torch.float32)
        self.bare_model.load_state_dict(loaded.state_dict())

    def _load_baseline(self, folder) -> None:
        """The reward's baseline of a checkpoint; one of a run that drew no layers has none."""
        if self.baseline_training is not None:
            self.baseline_training.load(folder)

    def _begin_baseline(self) -> None:
        """
        The critic that lies beside the weights a new run begins with, as a converter leaves it; the average of the
        rewards is that of another run and begins anew.
        """
        origin = Path(self.bare_model.config.name_or_path or "")
        if self.baseline_training is None or self.args.policy_baseline != "critic":
            return
        if (origin / BASELINE_FILE).is_file() and self.baseline_training.load_critic(origin):
            logger.info(f"the critic begins as it lies in {origin}")

    @property
    def is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled
