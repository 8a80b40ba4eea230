"""What a training run leaves: names of its files, and which of its settings matter to its result."""

COMPLETE_FILE = "complete.json"
# Of the reward's baseline; in release 0.1.0 they stood in the model's configuration, and no record has them.
BASELINE_SETTINGS = ("policy_baseline", "policy_ema_decay", "critic_hidden_size")
# Of the training arguments, what changes the weights a run ends with. The batch is recorded as a whole: how it is laid
# out in processes and micro-batches does not matter.
SETTINGS_THAT_MATTER = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "loss_size",
    "gaussian_kernel_size",
    "gaussian_sigma",
    "pos_weight_cap",
    "train_layer_selection",
    "policy_samples",
    *BASELINE_SETTINGS,
    "text_weight",
    "mask_bce_weight",
    "mask_dice_weight",
    "map_bce_weight",
    "map_dice_weight",
    "policy_weight",
    "entropy_weight",
    "iou_weight",
    "presence_weight",
    "critic_beta",
    "trainable",
    "max_length",
)
# The length of a run shapes these schedules; a constant rate does not know it.
LENGTH_SETTINGS = ("max_steps", "num_train_epochs")
