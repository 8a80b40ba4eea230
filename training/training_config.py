"""What a training run can be told, and which parameters it trains."""

import os
import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from uground.command_line import checked_seed
from uground.training.objectives.grounding_terms import MapTarget
from uground.training.objectives.losses import LossWeights
from uground.training.objectives.reward_baseline import BASELINES

# What peft puts into the names of modules that it trains whole.
PEFT_NAMES = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")
TRAIN_LAYER_SELECTIONS = ("sample", "last")
# The order of the data is drawn by a generator of PyTorch alone, which takes more than NumPy's.
DATA_SEEDS = range(2**63)


@dataclass
class UGroundTrainingConfig(SFTConfig):
    """
    What `SFTConfig` has, and the settings of grounding.

    The weights are the official ones; `loss_size`, `gaussian_*` and `pos_weight_cap` differ from the official code,
    which compares at image size, softens with 31 and 7.0 pixels there and has no cap. Rewards are per segment, and the
    baseline is the moving average *before* the step, so that a segment's own reward is not in it. Every loss is
    divided by the number of masks (text: of learnt tokens) of the whole optimizer step, over all micro-batches and
    processes.

    Mixed precision is what the device can: `bf16` gives way to float32 where the accelerator has no bfloat16, and
    where there is no accelerator, unless `use_cpu` says that this is meant.
    """

    loss_size: int | None = field(
        default=None, metadata={"help": "side of the frame in which masks are compared; image size by default"}
    )
    gaussian_kernel_size: int = field(default=31, metadata={"help": "side of the kernel that softens map targets"})
    gaussian_sigma: float = field(default=7.0, metadata={"help": "standard deviation of that kernel, in pixels"})
    pos_weight_cap: float | None = field(
        default=None, metadata={"help": "upper bound of the weight of positive pixels in the map loss"}
    )
    train_layer_selection: str = field(
        default="sample", metadata={"help": "how layers are chosen in training: sample, or last for LISA and READ"}
    )
    policy_samples: int = field(
        default=1,
        metadata={"help": "layers drawn per segment; more than one judge each draw by the others (leave-one-out)"},
    )
    policy_baseline: str = field(
        default="ema",
        metadata={"help": "what single draws are held against: ema, a moving average of the reward, or critic"},
    )
    policy_ema_decay: float = field(default=0.9, metadata={"help": "share of that average kept at each step"})
    critic_hidden_size: int = field(default=128, metadata={"help": "width of the critic"})
    text_weight: float = field(default=1.0, metadata={"help": "weight of the text cross-entropy"})
    mask_bce_weight: float = field(default=2.0, metadata={"help": "weight of the mask BCE"})
    mask_dice_weight: float = field(default=4.0, metadata={"help": "weight of the mask dice"})
    map_bce_weight: float = field(default=2.0, metadata={"help": "weight of the similarity map's BCE"})
    map_dice_weight: float = field(default=4.0, metadata={"help": "weight of the similarity map's dice"})
    policy_weight: float = field(default=0.4, metadata={"help": "weight of REINFORCE"})
    entropy_weight: float = field(default=0.0, metadata={"help": "weight of the policy's entropy, which is raised"})
    iou_weight: float = field(default=0.0, metadata={"help": "weight of the error of SAM's IoU estimate"})
    presence_weight: float = field(
        default=1.0, metadata={"help": "weight of the BCE of presence, for a mask head that estimates it (SAM 2)"}
    )
    critic_beta: float = field(default=1.0, metadata={"help": "weight of the critic's own loss within REINFORCE"})
    trainable: list[str] | None = field(
        default=None, metadata={"help": "parts of parameter names to train; by default all but the two encoders"}
    )
    cache_sam_embeddings: str | None = field(
        default=None, metadata={"help": "folder that keeps SAM's image embeddings, so that it sees an image once"}
    )
    cache_limit_gb: float = field(default=100.0, metadata={"help": "most gigabytes of embeddings in that folder"})
    eval_generate_count: int = field(
        default=0, metadata={"help": "evaluation items whose answers are also generated, 0 for none"}
    )
    eval_max_new_tokens: int | None = field(
        default=None, metadata={"help": "most tokens of a generated answer (default: as the checkpoint says)"}
    )
    eval_overlays: int = field(default=4, metadata={"help": "generated answers drawn for TensorBoard"})
    muon: bool = field(
        default=False,
        metadata={"help": "Muon instead of AdamW for the matrices of hidden layers, for training from nothing"},
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "tokens of a query and its answer, image included; the rest is cut, its masks with it"},
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "integrations that are told of the logs, or none"}
    )
    remove_unused_columns: bool = False
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "older name of activation_checkpointing"}
    )

    def __post_init__(self):
        self._resolve_checkpointing()
        self._fit_to_device()
        super().__post_init__()
        if self.train_layer_selection not in TRAIN_LAYER_SELECTIONS:
            raise ValueError(
                f"train_layer_selection must be one of {TRAIN_LAYER_SELECTIONS}, got {self.train_layer_selection!r}"
            )
        checked_seed(self.seed)
        if self.data_seed is not None:
            checked_seed(self.data_seed, "data_seed", DATA_SEEDS)
        if self.policy_baseline not in BASELINES:
            raise ValueError(f"policy_baseline must be one of {BASELINES}, got {self.policy_baseline!r}")
        if not 0.0 <= self.policy_ema_decay < 1.0:
            raise ValueError(f"policy_ema_decay must lie in [0, 1), got {self.policy_ema_decay}")
        for name in ("policy_samples", "critic_hidden_size", "eval_max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    def _resolve_checkpointing(self) -> None:
        """On by default as in TRL, and without the warning that transformers has for the older names."""
        for name in ("checkpointing", "checkpointing_kwargs"):
            new, old = getattr(self, f"activation_{name}"), getattr(self, f"gradient_{name}")
            if new is not None and old is not None and new != old:
                raise ValueError(f"activation_{name} and gradient_{name} are one setting, got {new} and {old}")
            setattr(self, f"activation_{name}", old if new is None else new)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = True

    def _fit_to_device(self) -> None:
        """Choose what this machine can do, before `SFTConfig` refuses what it cannot, or PyTorch warns of it."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.dataloader_num_workers = min(self.dataloader_num_workers, cores or 1)
        if torch.accelerator.is_available() and not self.use_cpu:
            if self.bf16 is not False and not self.fp16:
                self.bf16 = is_torch_bf16_gpu_available()
            return
        if not self.use_cpu:
            # Said for each process of a job too: otherwise it would take itself for the only one.
            self.use_cpu = True
            self.bf16 = self.fp16 = False
        # Asked for, a CPU computes in bfloat16; most are slower in it.
        self.bf16 = bool(self.bf16)
        # Pinned memory speeds up copies to an accelerator, and without one is warned of.
        self.dataloader_pin_memory = False

    def loss_weights(self) -> LossWeights:
        """The weights as the loss functions take them."""
        return LossWeights(
            text=self.text_weight,
            mask_bce=self.mask_bce_weight,
            mask_dice=self.mask_dice_weight,
            map_bce=self.map_bce_weight,
            map_dice=self.map_dice_weight,
            policy=self.policy_weight,
            entropy=self.entropy_weight,
            iou=self.iou_weight,
            presence=self.presence_weight,
        )

    def map_target(self) -> MapTarget:
        """How masks become targets of similarity maps."""
        return MapTarget(self.gaussian_kernel_size, self.gaussian_sigma, self.pos_weight_cap)


def freeze(
    model: PreTrainedModel, trainable: list[str] | None = None, weights: LossWeights | None = None, policy: bool = True
) -> list[str]:
    """
    Choose what is trained.

    Args:
        model: a `UGroundForReferringSegmentation`.
        trainable: a parameter is trained if its name holds one of these; `None` trains all but both image encoders.
            What the configured prompts and the weights leave without a gradient stays frozen in any case.
        weights: of the loss terms; `None` for the default ones.
        policy: whether layers are drawn from the layer policy, which otherwise stays frozen.

    Returns:
        Names of the parameters that will be trained.

    Raises:
        ValueError: nothing is left to train.
    """
    encoders = [f"lmm.{name}" for name in model.adapter.names.encoders]
    if model.mask_decoder is not None:
        encoders += [f"mask_decoder.{name}" for name in model.mask_decoder.encoders]
    for name, parameter in model.named_parameters():
        if trainable is None:
            parameter.requires_grad_(not _is_below(name, encoders))
        else:
            parameter.requires_grad_(any(part in name for part in trainable))
    freeze_unused(model, weights or LossWeights(), policy)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError(f"trainable={trainable} matches no parameter of the model")
    return names


def freeze_unused(model: PreTrainedModel, weights: LossWeights, policy: bool = True) -> None:
    """
    Freeze what never gets a gradient: distributed training would wait for it, and weight decay would shrink it.

    Args:
        model: a `UGroundForReferringSegmentation`, with or without adapters.
        weights: of the loss terms.
        policy: whether layers are drawn from the layer policy.
    """
    prompts, head = model.config.prompts, model.mask_decoder
    unused = [f"lmm.{name}" for name in model.adapter.unused()]
    if not weights.text:
        unused.append(f"lmm.{model.adapter.names.head}")
    presence = head is not None and head.has_presence and bool(weights.presence)
    draws_masks = head is not None and bool(weights.mask_bce or weights.mask_dice or weights.iou or presence)
    if draws_masks:
        names = (*head.frozen, *head.unused(prompts, bool(weights.iou), presence))
        unused += [f"mask_decoder.{name}" for name in names]
    else:
        unused += ["mask_decoder", "segment_projection"]
    if not (weights.map_bce or weights.map_dice or (draws_masks and "mask" in prompts)):
        unused.append("similarity_scaling")
    if not ((policy and weights.policy) or weights.entropy):
        unused.append("layer_policy")
    for name, parameter in model.named_parameters():
        if _is_below(name, unused):
            parameter.requires_grad_(False)


def _is_below(name: str, modules: list[str]) -> bool:
    """Whether a parameter belongs to one of some modules."""
    name = PEFT_NAMES.sub("", name)
    return any(name == module or name.startswith(f"{module}.") for module in modules)
