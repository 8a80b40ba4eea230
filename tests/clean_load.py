"""Loads repositories from a Hub; run by test_publish.py in a process where `uground` cannot be imported.

The arguments are INPUTS.pt, OUT.pt and JOBS.json. A job is `[name, what, arguments]`;
OUT.pt maps names to what came out, or to `{"error": …}`.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from peft import PeftModel
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

INPUTS, OUT, JOBS = sys.argv[2:]
inputs = torch.load(INPUTS)
IMAGE = Image.fromarray((np.arange(40 * 60 * 3) % 251).astype(np.uint8).reshape(40, 60, 3))


def masks(repo_id, revision=None, layer_selection="last", **kwargs):
    """Mask logits of the model of a repository."""
    model = AutoModel.from_pretrained(repo_id, revision=revision, **{"trust_remote_code": True, **kwargs}).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        return model(**inputs, layer_selection=layer_selection).mask_logits


def adapted(repo_id, base):
    """Mask logits of a base with the adapter of a repository on top."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, trust_remote_code=True), repo_id).eval()
    with torch.no_grad():
        return model(**inputs, layer_selection="last").mask_logits


def answers(repo_id):
    """A pipeline's answer, and how many queries the processor makes rows of."""
    pipe = pipeline("referring-segmentation", model=repo_id, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo_id, trust_remote_code=True)
    rows = processor([IMAGE], [["the cup", "the tree"]], return_tensors="pt")["input_ids"].shape[0]
    result = pipe(IMAGE, "the red cup", max_new_tokens=2)
    assert type(result).from_dict(json.loads(json.dumps(result.to_dict()))) == result
    return {"answer": result["answer"], "rows": rows, "drawn": result.draw().size}


def words(repo_id):
    """What the pipeline for words writes in a second turn, of a conversation about an image."""
    pipe = pipeline("image-text-to-text", model=repo_id, trust_remote_code=True)
    assert type(pipe.model).__module__.startswith("transformers_modules.")
    turns = [("user", [{"type": "image", "image": IMAGE}, {"type": "text", "text": "the red cup"}])]
    turns += [
        ("assistant", [{"type": "text", "text": "it is [SEG]."}]),
        ("user", [{"type": "text", "text": "a tree"}]),
    ]
    conversation = [{"role": role, "content": content} for role, content in turns]
    said = pipe(text=conversation, max_new_tokens=2, return_full_text=False)[0]["generated_text"]
    asked = pipeline("referring-segmentation", model=repo_id, trust_remote_code=True)(conversation, max_new_tokens=2)
    return {"words": said.split(), "answer": asked["answer"].split()}


def frozen(folder):
    """Mask logits of a folder that an older release published, by the code in it."""
    return masks(folder, dtype="float32", layer_selection="argmax")[:, ::5, ::5]


def resaved(repo_id):
    """Files that a model leaves which was loaded from a repository or a published folder and is saved again."""
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_pretrained(repo_id, trust_remote_code=True).save_pretrained(folder)
        return sorted(path.name for path in Path(folder).glob("*.py"))


def of_a_revision(repo_id, revision):
    """What a model of a revision loads later: code of the processor when saved, and the processor of a session."""
    model = AutoModel.from_pretrained(repo_id, revision=revision, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        code = Path(folder, "processing_uground.py").read_bytes()
    with model.image_session(IMAGE) as session:
        return {"code": code, "longest": session._processor.tokenizer.model_max_length}


def examples(repo_id):
    """Queries and picture sizes of a dataset's test split."""
    rows = load_dataset(repo_id, split="test")
    return [(row["query"], row["image"].size) for row in rows]


def warned(repo_id, version):
    """Warnings about the version of transformers, when another one than ours is installed."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    # Not the name imported above: transformers puts another module object in its own place later on.
    library = sys.modules["transformers"]
    installed, library.__version__ = library.__version__, version
    for _ in range(2):
        AutoConfig.from_pretrained(repo_id, trust_remote_code=True)
    library.__version__ = installed
    logging.getLogger().removeHandler(handler)
    return [text for text in records if "tested with transformers" in text]


results = {}
for name, what, arguments in json.loads(Path(JOBS).read_text()):
    try:
        results[name] = globals()[what](**arguments)
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
results["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "uground" and sys.modules[name])
torch.save(results, OUT)
