"""The run that `test_resume` kills; a module of its own, so that a process can import it."""

import os
import signal

import torch
from processes import forget_process_group
from tiny import tiny_model
from tiny_training import example, tiny_trainer

from uground.training import trainer as training
from uground.training.data.mixture import Mixture, MixtureEpochs

STEPS = 8


def build(folder, baseline: str, **settings):
    """A run with everything that has a state: dropout, schedule, moving average or critic, shuffling, a mixture."""
    torch.manual_seed(1)
    model = tiny_model().train()
    model.lmm.model.language_model.config.attention_dropout = 0.2
    items = [{"image": example(number)["image"], "examples": [example(number)]} for number in range(10)]
    mixture = Mixture([items[:4], items[4:]], [1.0, 2.0], epoch_size=6, seed=3)
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "policy_baseline": baseline,
    }
    callbacks = {"callbacks": [MixtureEpochs(mixture)], "mixture": mixture}
    trainer = tiny_trainer(folder, model=model, trainer=callbacks, **{**defaults, **settings})
    trainer.train_dataset = mixture.dataset()
    return trainer


def run(folder, baseline: str, last_batch: int | None = None, last_save: int | None = None) -> None:
    """
    Train in a process of its own that kills itself: at the beginning of a batch, or when all of a checkpoint is
    written but the list of files that makes it count.
    """
    torch.set_num_threads(1)
    forget_process_group()
    trainer = build(folder, baseline)
    step, mark, batches = trainer.training_step, training.mark_complete, []

    def counted_step(*args, **kwargs):
        batches.append(len(batches))
        if len(batches) == last_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    def watched_mark(checkpoint, record):
        if checkpoint.name == f"checkpoint-{last_save}":
            os.kill(os.getpid(), signal.SIGKILL)
        mark(checkpoint, record)

    trainer.training_step, training.mark_complete = counted_step, watched_mark
    trainer.train(resume_from_checkpoint=trainer.resumable_checkpoint())
