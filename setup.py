"""The repository root is the import package `uground`; the four folders are its sub-packages."""

from setuptools import setup

RUNTIME = [
    "torch>=2.6",
    "transformers>=5.23",
    "huggingface-hub>=2.4",
    "safetensors>=0.8",
    "accelerate>=1.15",
    "numpy>=2.0",
    "pillow>=11.0",
]
TRAINING = [
    "trl>=1.16",
    "peft>=0.21",
    "datasets>=5.2",
    "evaluate>=0.4",
    "pycocotools>=2.0.8",
    "scipy>=1.14",
    "tensorboard>=2.18",
    "pyyaml>=6.0",
    "segment-anything>=1.0",
    "protobuf>=5.0",  # reads the sentencepiece models of LLaMA tokenizers
]
QUANTIZATION = "bitsandbytes>=0.50"

setup(
    packages=[
        "uground",
        "uground.modeling_uground",
        "uground.processing",
        "uground.training",
        "uground.training.data",
        "uground.training.metric_modules",
        "uground.hub",
    ],
    package_dir={"uground": "."},
    package_data={
        "uground.processing": ["*.jinja"],
        "uground.hub": ["checkpoints/uground-tiny/*"],
    },
    install_requires=RUNTIME + TRAINING,
    extras_require={
        "quantization": [QUANTIZATION],
        "test": ["pytest>=8.3", "pytest-xdist>=3.6", "ruff>=0.9", QUANTIZATION],
    },
)
