"""The flags of `finetune`: its help shows our settings first, and those it inherits only where one asks for them."""

import argparse
from dataclasses import fields
from typing import Any, NoReturn

from trl import TrlParser

from uground.command_line import FAILED
from uground.training.training_config import UGroundTrainingConfig

USAGE = "python -m uground.training.finetune [--config RECIPE] [--NAME VALUE …]"
CONFIG = "--config"
# Inherited settings that nearly every run sets.
USUAL = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "activation_checkpointing",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "push_to_hub",
    "hub_model_id",
    "seed",
)


class _HelpAll(argparse.Action):
    """Prints every setting and ends, as `--help` does with those that matter."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_all_help()
        parser.exit()


class SettingsParser(TrlParser):
    """
    Reads a recipe and flags; flags win.

    Args:
        arguments: the dataclass of what is trained and on what.
        description: what the command does.
    """

    def __init__(self, arguments: type, description: str):
        self.by_name: dict[str, argparse.Action] = {}
        super().__init__((arguments, UGroundTrainingConfig), usage=USAGE, description=description)
        self.own = [field.name for field in fields(arguments)]
        self.add_argument(
            "--help-all",
            action=_HelpAll,
            nargs=0,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help="list the settings inherited from transformers and trl too",
        )

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        if action.dest not in ("help", argparse.SUPPRESS):
            self.by_name[action.dest] = action
        return action

    def parse(self, argv: list[str]) -> tuple:
        """
        The dataclasses that the flags fill.

        Raises:
            OSError: the recipe cannot be read. ValueError: it is none, or something in it or a flag is unknown.
        """
        if argv and argv[-1] == CONFIG:
            raise ValueError(f"{CONFIG} must be followed by the path of a recipe, got nothing")
        return self.parse_args_and_config(argv)

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"finetune: error: {message}\n")

    def format_help(self) -> str:
        """The help with our settings and the usual ones."""
        grounding = [name for name in UGroundTrainingConfig.__annotations__ if name not in USUAL]
        return self._help(
            [
                ("what is trained, and on what", self.own),
                ("grounding", grounding),
                ("the run (settings of transformers and trl that are usual)", list(USUAL)),
            ]
        )

    def print_all_help(self) -> None:
        """Print the help with every setting."""
        named = {*self.own, *UGroundTrainingConfig.__annotations__, *USUAL}
        rest = [name for name in self.by_name if name not in named]
        print(self.format_help() + "\n" + self._help([("inherited", rest)], with_head=False), end="")

    def _help(self, sections: list[tuple[str, list[str]]], with_head: bool = True) -> str:
        actions, formatter = self.by_name, self.formatter_class(prog=self.prog)
        if with_head:
            formatter.add_usage(self.usage, [], [])
            formatter.add_text(self.description)
            formatter.add_text(f"{CONFIG} names a recipe, a yaml file of the settings below; flags win over it.")
        for title, names in sections:
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        if with_head:
            more = len(actions) - sum(name in actions for _, names in sections for name in names)
            formatter.add_text(f"--help-all lists {more} more settings, inherited from transformers and trl.")
        return formatter.format_help()


__all__ = ["SettingsParser"]
