"""What rewards are held against: training state of the layer policy, saved with a trainer's checkpoint.

The model ships its gates only; a moving average of the reward, or a critic that guesses it, is of use to nobody but
the run that trains them.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from uground.modeling_uground.hub_files import give_usual_mode
from uground.training.objectives.losses import OFFICIAL_EMA_DECAY

BASELINES = ("ema", "critic")
BASELINE_FILE = "reward_baseline.safetensors"
CRITIC_PREFIX = "critic."
# Of the moments of the critic's own AdamW, in the same file.
_MOMENTS = "optimizer."
# Where release 0.1.0 kept the baseline: among the weights of the model, or of its adapter.
EARLIER_FILES = ("model*.safetensors", "adapter_model.safetensors")
EARLIER_NAMES = re.compile(r"(?:.*\.)?layer_policy\.(?:modules_to_save\.)?(reward_ema|reward_updates|critic\..+)")


class RewardBaseline(nn.Module):
    """
    A moving average of the reward, and with `kind="critic"` a small network that guesses it.

    Args:
        num_layers: L+1.
        kind: one of `BASELINES`.
        ema_decay: share of the old value kept when the moving average is updated.
        critic_hidden_size: width of the critic.
    """

    def __init__(
        self,
        num_layers: int,
        kind: str = "ema",
        ema_decay: float = OFFICIAL_EMA_DECAY,
        critic_hidden_size: int = 128,
    ):
        super().__init__()
        if kind not in BASELINES:
            raise ValueError(f"policy_baseline must be one of {BASELINES}, got {kind!r}")
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"policy_ema_decay must lie in [0, 1), got {ema_decay}")
        self.register_buffer("reward_ema", torch.zeros(()))
        self.register_buffer("reward_updates", torch.zeros((), dtype=torch.long))
        self.ema_decay = ema_decay
        self.critic = None
        if kind == "critic":
            self.critic = nn.Sequential(
                nn.Linear(num_layers, critic_hidden_size), nn.ReLU(), nn.Linear(critic_hidden_size, 1)
            )

    def moving_average(self) -> torch.Tensor:
        """The moving average of the reward, a float32 scalar, free of the pull of the zero it began with."""
        weight = 1.0 - self.ema_decay ** self.reward_updates.float()
        return self.reward_ema / torch.where(weight > 0, weight, torch.ones_like(weight))

    @torch.no_grad()
    def update(self, reward: torch.Tensor) -> None:
        """Move the average towards a mean reward (a scalar): b ← decay · b + (1 − decay) · reward."""
        self.reward_ema.mul_(self.ema_decay).add_(reward.to(self.reward_ema), alpha=1.0 - self.ema_decay)
        self.reward_updates.add_(1)

    def segment_values(self, layer_logits: torch.Tensor) -> torch.Tensor | None:
        """The critic's guess for each of N segments `(N,)`, from detached logits `(N, L+1)`; `None` without one."""
        return None if self.critic is None else self._guess(layer_logits.detach().softmax(-1))

    def batch_value(self, layer_logits: torch.Tensor) -> torch.Tensor:
        """The critic's guess of a batch's one reward, a scalar, from the detached mean layer probabilities."""
        return self._guess(layer_logits.detach().softmax(-1).mean(0))

    def _guess(self, probabilities: torch.Tensor) -> torch.Tensor:
        # Small, and what is divided by it is not: never in lower precision.
        with torch.autocast(probabilities.device.type, enabled=False):
            return self.critic(probabilities.float()).squeeze(-1)


class BaselineTraining:
    """
    A baseline with the AdamW of its critic, which stands beside the optimizer of the model.

    Args:
        baseline: trained in place.
        betas, eps, weight_decay: of AdamW.
    """

    def __init__(
        self,
        baseline: RewardBaseline,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.baseline = baseline
        self.optimizer = None
        if baseline.critic is not None:
            self.optimizer = torch.optim.AdamW(
                baseline.critic.parameters(), betas=betas, eps=eps, weight_decay=weight_decay
            )

    def step(self, learning_rate: float, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        One step of the critic, on gradients that `backward` has left.

        Args:
            learning_rate: of this step.
            reduce: a gradient of one process to the mean over all of them.
        """
        if self.optimizer is None:
            return
        parameters = list(self.baseline.critic.parameters())
        for parameter in parameters:
            parameter.grad = reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # In half precision a scale may turn out too large; the step of the model is left out then too.
        if all(parameter.grad.isfinite().all() for parameter in parameters):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: str | os.PathLike) -> None:
        """Write baseline and optimizer state to a checkpoint folder."""
        tensors = dict(self.baseline.state_dict())
        if self.optimizer is not None:
            for number, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"{_MOMENTS}{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        path = Path(folder) / BASELINE_FILE
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        give_usual_mode(path)

    def load(self, folder: str | os.PathLike) -> bool:
        """
        Read what [`save`] wrote, or what release 0.1.0 kept among the weights.

        Returns:
            Whether there was any.

        Raises:
            ValueError: it is of another kind of baseline.
        """
        path = Path(folder) / BASELINE_FILE
        tensors = load_file(path) if path.is_file() else _earlier_tensors(Path(folder))
        if not tensors:
            return False
        moments = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_MOMENTS)}
        wanted = self.baseline.state_dict()
        if _shapes(tensors) != _shapes(wanted):
            raise ValueError(f"the reward baseline in {folder} must hold {_shapes(wanted)}, got {_shapes(tensors)}")
        self.baseline.load_state_dict(tensors)
        if self.optimizer is not None:
            state = self.optimizer.state_dict()
            state["state"] = {}
            for name, value in moments.items():
                number, key = name.removeprefix(_MOMENTS).split(".")
                state["state"].setdefault(int(number), {})[key] = value
            self.optimizer.load_state_dict(state)
        return True

    def load_critic(self, folder: str | os.PathLike) -> bool:
        """
        Read the critic's weights alone of what [`save`] or a converter wrote; moments and average stay as they are.

        Returns:
            Whether there was one.

        Raises:
            ValueError: it is of another width, or of another number of layers.
        """
        found = {
            name.removeprefix(CRITIC_PREFIX): tensor
            for name, tensor in load_file(Path(folder) / BASELINE_FILE).items()
            if name.startswith(CRITIC_PREFIX)
        }
        if not found or self.baseline.critic is None:
            return False
        wanted = self.baseline.critic.state_dict()
        if _shapes(found) != _shapes(wanted):
            raise ValueError(f"the critic in {folder} must hold {_shapes(wanted)}, got {_shapes(found)}")
        self.baseline.critic.load_state_dict(found)
        return True


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensors[name].shape) for name in sorted(tensors)}


def _earlier_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The baseline of a checkpoint of release 0.1.0, by the names it has now; empty for other checkpoints."""
    found = {}
    for path in sorted(path for pattern in EARLIER_FILES for path in folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            matches = [match for name in file.keys() if (match := EARLIER_NAMES.fullmatch(name))]  # noqa: SIM118
            found |= {match[1]: file.get_tensor(match[0]) for match in matches}
    return found
