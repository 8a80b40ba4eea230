"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer.

Trained from nothing, the small towers of the tiny checkpoint need about half the steps of AdamW (docs/log.md). For the
fine-tuning of large models nothing was measured here.
"""

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments


class MuonWithAdamW(Optimizer):
    """
    Two optimizers of PyTorch behind one interface.

    Muon's updates are scaled to the size of AdamW's, so that both go by the same learning rate.

    Args:
        matrices: parameters of two axes, as [`hidden_matrices`] finds them.
        others: groups of all other parameters, as any optimizer takes them.
        lr: learning rate of all.
        weight_decay: of the matrices.
        betas, eps: of AdamW.

    Source: https://kellerjordan.github.io/posts/muon/; the scaling is that of https://arxiv.org/abs/2502.16982.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[dict],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        self.parts: dict[str, Optimizer] = {}
        if matrices:
            self.parts["muon"] = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        others = [group for group in others if group["params"]]
        if others:
            self.parts["adamw"] = AdamW(others, lr=lr, betas=betas, eps=eps)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {"lr": lr})
        self._share_groups()

    def _share_groups(self) -> None:
        """What a schedule changes in a group of this optimizer holds for the part it belongs to."""
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> float | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Go on where another one was.

        Raises:
            ValueError: the states are of another optimizer, or of other parameters.
        """
        if set(state_dict) != set(self.parts):
            raise ValueError(
                f"the optimizer's state must be of {', '.join(self.parts)}, got {', '.join(sorted(state_dict))}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()


def hidden_matrices(model: nn.Module, head: str) -> dict[str, nn.Parameter]:
    """
    The trained weights `(out, in)` of linear layers, but for the one whose rows are words.

    Args:
        model: any module.
        head: the last part of the name of the layer that gives the vocabulary's logits.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and name.rpartition(".")[2] != head
    }


def build_optimizer(model: nn.Module, head: str, decayed: Collection[str], args: TrainingArguments) -> MuonWithAdamW:
    """
    The optimizer of what a model trains.

    Args:
        model: any module.
        head: as in [`hidden_matrices`].
        decayed: names of the parameters that weight decay pulls at.
        args: give the learning rate, the weight decay, and the numbers of AdamW.
    """
    matrices = hidden_matrices(model, head)
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in matrices}
    groups = [
        {
            "params": [parameter for name, parameter in rest.items() if (name in decayed) == decays],
            "weight_decay": args.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(
        list(matrices.values()), groups, args.learning_rate, args.weight_decay, betas, args.adam_epsilon
    )


__all__ = ["MuonWithAdamW", "build_optimizer", "hidden_matrices"]
