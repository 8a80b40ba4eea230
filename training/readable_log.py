"""What a run says as it goes: one line per log, with the parts of the loss by name."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Shown behind the losses, by their names in the logs.
OTHERS = {"policy/reward": "reward", "policy/entropy": "entropy", "learning_rate": "lr", "grad_norm": "gradient"}
LOSSES, EVALUATED, RUNTIME = "loss/", "eval_", "train_runtime"
# Times and counts of an evaluation, which tell nothing of the model.
LEFT_OUT = ("runtime", "samples_per_second", "steps_per_second", "epoch", "num_tokens", "mean_token_accuracy")
# Most runs have no critic, and then its loss is 0.
MAP_DICE, CRITIC = "loss/map_dice", "loss/critic"
NEGATIVE_DICE = (
    "map_dice may lie below 0, and lower is better all the same: its targets weigh w = background / object, at most "
    "pos_weight_cap, so that a perfect map costs about (1 - w) / (1 + w)"
)


def log_line(logs: dict, step: int, steps: int) -> str:
    """
    A log as one line of text; "" where it says nothing.

    Args:
        logs: what `Trainer.log` is given: losses before their weights, figures of an evaluation, or the end of a run.
        step, steps: where the run is, and how many steps it has.
    """
    if RUNTIME in logs:
        mean = _number(logs.get("train_loss", 0.0))
        return f"trained {step} of {steps} steps in {logs[RUNTIME]:.0f} s, mean loss {mean}"
    figures = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
    evaluated = {name.removeprefix(EVALUATED): value for name, value in figures.items() if name.startswith(EVALUATED)}
    kept = evaluated or figures
    parts = [f"loss {_number(kept['loss'])}"] if "loss" in kept else []
    losses = {name: value for name, value in kept.items() if name.startswith(LOSSES) and (value or name != CRITIC)}
    parts += [f"{name.removeprefix(LOSSES)} {_number(value)}" for name, value in losses.items()]
    if evaluated:
        shown = (name for name in kept if "/" not in name and name != "loss" and name not in LEFT_OUT)
        parts += [f"{name} {_number(kept[name])}" for name in shown]
    else:
        parts += [f"{label} {_number(kept[name])}" for name, label in OTHERS.items() if name in kept]
    return f"step {step} of {steps}{', evaluated' * bool(evaluated)}: {', '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    return f"{value:.3g}"


class ReadableLog(ProgressCallback):
    """A progress bar, or none where `disable_tqdm` says so, and [`log_line`]s above it; stands in for their dicts."""

    def __init__(self):
        super().__init__()
        self._explained = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = 0
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        lines = [log_line(logs, state.global_step, state.max_steps)]
        if not self._explained and logs.get(MAP_DICE, 0.0) < 0:
            self._explained = True
            lines.append(NEGATIVE_DICE)
        write = print if self.training_bar is None else self.training_bar.write
        for line in filter(None, lines):
            write(line)


__all__ = ["ReadableLog", "log_line"]
