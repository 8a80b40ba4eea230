"""What the processes of `test_distributed` do; a module of its own, so that they can import it."""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from processes import forget_process_group
from tiny import SEGMENT_TOKEN, say_only, tiny_model
from tiny_training import dataset, example, losses_of, tiny_trainer
from transformers import TrainerCallback

from uground.training.data.mixture import Mixture

# Which processes of a pair see a segment: of a batch of 4, the first half goes to the first process.
MIXED = [example(number) for number in range(12)]
ONE_SIDED = [example(number, saying) for number, saying in enumerate((0, 1, 3, 2))]
NO_SEGMENT = [example(number, 2 + number % 2) for number in range(4)]


class KeepGradients(TrainerCallback):
    """Gradients of every step, before the optimizer."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = ((name.removeprefix("module."), parameter.grad) for name, parameter in model.named_parameters())
        self.steps.append({name: gradient.clone() for name, gradient in named if gradient is not None})


def policy_model():
    """A tiny model with a policy that gives every layer a chance."""
    model = tiny_model().train()
    with torch.no_grad():
        model.layer_policy.gates.mul_(0.02)
    return model


def train(folder, items, baseline: str, batch: int, **settings) -> dict:
    """Train on batches of `batch` per process, in order, and tell everything."""
    model, gradients = policy_model(), KeepGradients()
    defaults = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "iou_weight": 0.5}
    trainer = tiny_trainer(
        folder,
        items,
        model,
        trainer={"callbacks": [gradients]},
        per_device_train_batch_size=batch,
        policy_baseline=baseline,
        **{**defaults, **settings},
    )
    trainer.train()
    return {
        "gradients": gradients.steps,
        "losses": losses_of(trainer),
        "average": float(trainer.baseline_training.baseline.moving_average()),
        "baseline": trainer.baseline_training.baseline.state_dict(),
        "log": trainer.state.log_history[0],
    }


CASES = {
    "several draws": (MIXED, "ema", {"policy_samples": 3, "max_steps": 3}),
    "critic": (MIXED, "critic", {"max_steps": 3}),
    "segments in one process only": (ONE_SIDED, "ema", {"policy_samples": 2}),
    "no segment at all": (NO_SEGMENT, "critic", {"policy_samples": 2}),
    # Of the second step of an epoch, the second process holds repeated items only.
    "a rest that fills no batch": (MIXED[:5], "ema", {"policy_samples": 2, "max_steps": 4}),
}
# Items, items per batch and process, whether training leaves out a rest: in the last batches of two processes there
# are repeated items, in one or in both.
EVALUATIONS = [(3, 1, False), (3, 2, False), (3, 4, True), (5, 2, False), (8, 2, False)]


def evaluate(folder, count: int, batch: int, drop_last: bool = False) -> dict[str, float]:
    """Figures of an evaluation, of what is written too."""
    model = policy_model().eval()
    model.generation_config.suppress_tokens = say_only(SEGMENT_TOKEN)
    settings = {"eval_generate_count": 3, "eval_max_new_tokens": 4, "dataloader_drop_last": drop_last}
    evaluated = {"eval_dataset": dataset(MIXED[:count])}
    trainer = tiny_trainer(folder, MIXED, model, trainer=evaluated, per_device_eval_batch_size=batch, **settings)
    return trainer.evaluate()


class BrokenHere(list):
    """Items of which some cannot be read."""

    def __getitem__(self, index: int) -> dict:
        if index in (1, 2, 5):
            raise ValueError(f"item {index} is broken")
        return {"image": super().__getitem__(index)["image"], "examples": [super().__getitem__(index)]}


def skipped(folder, batch: int) -> float:
    """How many broken items a run says that it skipped."""
    mixture = Mixture([BrokenHere(MIXED[:8])], on_bad_sample="skip")
    settings = {"per_device_train_batch_size": batch, "max_steps": 2, "logging_steps": 2}
    trainer = tiny_trainer(folder, MIXED, policy_model(), trainer={"mixture": mixture}, **settings)
    trainer.train_dataset = mixture.dataset()
    trainer.train()
    return trainer.state.log_history[0]["data/skipped"]


def all_cases(rank: int, folder) -> dict:
    """Every case in one pair of processes, then a sharded run: starting a process takes longer than all of them."""
    plain = {name: train(folder / name, items, baseline, 2, **more) for name, (items, baseline, more) in CASES.items()}
    evaluated = [evaluate(folder / "evaluated", *settings) for settings in EVALUATIONS]
    broken = skipped(folder / "skipped", 2)
    forget_process_group()
    return {"plain": plain, "evaluated": evaluated, "skipped": broken, "sharded": train_sharded(folder / "sharded")}


def train_sharded(folder) -> dict:
    """FSDP2; accelerate offers it on accelerators only, so it is switched on behind its back."""
    trainer = tiny_trainer(
        folder,
        MIXED,
        policy_model(),
        trainer={"eval_dataset": dataset(MIXED[:4])},
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        max_steps=3,
        policy_baseline="critic",
        iou_weight=0.5,
        eval_strategy="steps",
        eval_steps=3,
        eval_generate_count=3,
        eval_max_new_tokens=4,
        save_strategy="steps",
        save_steps=3,
        cache_sam_embeddings=str(folder / "cache"),
    )
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer", "SamVisionLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    trainer.train()
    kinds = {type(parameter).__name__ for parameter in trainer.model.parameters()}
    return {"losses": losses_of(trainer), "kinds": kinds, "log": trainer.state.log_history}
