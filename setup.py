"""The repository root is the import package `uground`; the four folders are its sub-packages."""

from setuptools import setup

# Every lower bound is what `make test-floor` runs: `constraints-floor.txt` names the same versions.
RUNTIME = [
    "torch>=2.13",
    "transformers>=5.23",
    "huggingface-hub>=2.4",
    "safetensors>=0.8",
    "accelerate>=1.15",
    "numpy>=2.0",
    "pillow>=11.2.1",  # older ones paint other pixels of the same polygon, and so other scenes of the same seed
    "pycocotools>=2.0.8",
]
TRAINING = [
    "trl>=1.16",
    "peft>=0.21",
    "datasets>=5.2",
    "scipy>=1.14",
    "tensorboard>=2.18",
    "pyyaml>=6.0.1",
    "protobuf>=5.26",  # reads the sentencepiece models of LLaMA tokenizers
]
# Only for the metrics as modules of that library.
METRICS = ["evaluate>=0.4.2"]  # older ones do not find the locks of datasets 5, when several processes measure
QUANTIZATION = ["bitsandbytes>=0.50"]
TESTS = ["pytest>=8.3", "pytest-xdist>=3.6.1", "packaging>=24.0", "ruff>=0.9", "mypy>=2.4", "segment-anything>=1.0"]

setup(
    packages=[
        "uground",
        "uground.modeling_uground",
        "uground.processing",
        "uground.training",
        "uground.training.data",
        "uground.training.data.importers",
        "uground.training.evaluation",
        "uground.training.metric_modules",
        "uground.training.objectives",
        "uground.training.scenes",
        "uground.hub",
        "uground.hub.convert",
        "uground.hub.publish",
        "uground.hub.weights",
        "uground.apps",
    ],
    package_dir={"uground": "."},
    package_data={
        "uground": ["py.typed"],
        "uground.processing": ["*.jinja"],
        "uground.hub": ["checkpoints/uground-tiny/*"],
    },
    install_requires=RUNTIME,
    extras_require={
        "train": TRAINING,
        "metrics": TRAINING + METRICS,
        "quantization": QUANTIZATION,
        "test": TRAINING + METRICS + QUANTIZATION + TESTS,
    },
)
