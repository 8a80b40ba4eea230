"""What a linear probe tells of objects from image features averaged over their masks.

    python benchmarks/probe_kinds.py [--model PATH] [--scenes 3000] [--store FOLDER]

PATH is a UGround checkpoint, whose features are read behind the projector, or a CLIP tower of
`uground.training.scenes.pretrain`. Probes are fitted on training scenes and asked about test scenes: about all of
their objects, and about those whose colour and kind were never seen together (`held out`). One JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaConfig

from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model
from uground.modeling_uground.lmm_llava import LlavaAdapter
from uground.training.scenes.scene_store import PROPERTIES, SceneStore
from uground.training.scenes.vision_stage import SEEN_PATCHES, grid_coverage, patch_states, pooled
from uground.training.scenes.world import held_out

SEED = 900  # of scenes that nothing was trained on
BATCH, PENALTY, ROUNDS = 50, 1e-3, 60


def tower_of(path: str):
    """Vision tower, its adapter, and what its states go through before the language model reads them."""
    if json.loads((Path(path) / "config.json").read_text())["model_type"] != "uground":
        tower = CLIPVisionModel.from_pretrained(path).eval()
        return tower, LlavaAdapter(LlavaConfig(vision_config=tower.config), "letterbox"), torch.nn.Identity()
    model = load_model(path)
    return model.lmm.model.vision_tower, model.adapter, model.lmm.model.multi_modal_projector


@torch.no_grad()
def object_features(path: str, store: SceneStore, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(N, D)` and classes `(N, 4)` of the objects of the first scenes of a store."""
    tower, adapter, projector = tower_of(path)
    cells = tower.config.image_size // tower.config.patch_size
    features, classes = [], []
    for start in range(0, count, BATCH):
        batch = store.read(torch.arange(start, min(start + BATCH, count)).numpy())
        states = projector(patch_states(tower, adapter, batch).float())
        coverage = grid_coverage(batch.masks(), cells).flatten(2)
        properties = batch.properties[:, : coverage.shape[1]]
        seen = (properties[..., 0] >= 0) & (coverage.sum(-1) > SEEN_PATCHES)
        features.append(pooled(states, coverage)[seen])
        classes.append(properties[seen])
    return torch.cat(features), torch.cat(classes)


def fit_probe(features: torch.Tensor, classes: torch.Tensor, count: int):
    """Logistic regression on standardised features `(N, D)`; returns what gives the classes of others."""
    centre, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    weight = torch.zeros(count, features.shape[1], requires_grad=True)
    bias = torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")
    given = (features - centre) / scale

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(given @ weight.T + bias, classes) + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda others: (((others - centre) / scale) @ weight.detach().T + bias.detach()).argmax(-1)


def is_held_out(classes: torch.Tensor, split: str) -> torch.Tensor:
    """`(N,)` bool: whether colour and kind of an object were never seen together in training."""
    pairs, names = held_out(split), [*PROPERTIES]
    kinds, colours = (classes[:, names.index(name)].tolist() for name in ("kind", "colour"))
    told = zip(colours, kinds, strict=True)
    return torch.tensor([(PROPERTIES["colour"][c], PROPERTIES["kind"][k]) in pairs for c, k in told])


def probe(path: str, folder: str, scenes: int) -> dict[str, dict[str, float]]:
    """The share of test objects told right, by property: of all, and of held-out combinations."""
    train, test = (SceneStore(folder, split, SEED, scenes) for split in ("train", "test"))
    features, classes = object_features(path, train, scenes)
    others, wanted = object_features(path, test, scenes)
    new, figures = is_held_out(wanted, "test"), {"all": {}, "held out": {}}
    for number, (name, values) in enumerate(PROPERTIES.items()):
        right = fit_probe(features, classes[:, number], len(values))(others) == wanted[:, number]
        figures["all"][name] = round(right.float().mean().item(), 4)
        figures["held out"][name] = round(right[new].float().mean().item(), 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=tiny_checkpoint())
    parser.add_argument("--scenes", type=int, default=3000, help="of each split")
    parser.add_argument("--store", help="folder that keeps the drawn scenes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = probe(str(args.model), args.store or folder, args.scenes)
    print(json.dumps({"benchmark": "probe_kinds", "model": str(args.model), "scenes": args.scenes, **figures}))


if __name__ == "__main__":
    main()
