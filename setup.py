import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup


# Top-level folders that travel inside the wheel: lmtp_factory/resources.py finds them.
RESOURCES = {"lmtp_factory.datasets": "data", "lmtp_factory.configs": "configs"}

# What upstream wants to score batch predictions.
PREDICT = ["jieba", "nltk", "rouge-chinese"]

setup(
    name="lmtp_factory",
    version=re.search(r'__version__ = "(.+)"', Path("lmtp_factory/__init__.py").read_text(encoding="utf-8"))[1],
    description="Leap multi-token prediction (L-MTP) for an unmodified LLaMA-Factory",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["lmtp_factory", "lmtp_factory.*"]), *RESOURCES],
    package_dir=RESOURCES,
    package_data={name: ["*.json", "*.jsonl", "*/*.json", "*/*.yaml"] for name in RESOURCES},
    install_requires=[
        runpy.run_path("lmtp_factory/plugin/versions.py")["requirement"](),
        # torchaudio has to be of torch's own release: 2.11.1 does not load with torch 2.11.0, and no torch is 2.11.1.
        "torch>=2.4,<=2.11.0",
        "torchaudio<=2.11.0",
        "torchvision<0.27",
        # The flash-attention path of 5.6.0 is broken.
        "transformers>=5.2,!=5.6.0",
        "accelerate",
        "peft>=0.18",
        "deepspeed>=0.16",
        "safetensors",
        "huggingface_hub",
        "httpx",
        "psutil",
        "matplotlib",
        "pyyaml",
        "tqdm",
        "openai>=1.40",
    ],
    extras_require={
        "demo": ["gguf>=0.10"],
        # lmtp-cli quality builds tasks with the harness's Python interface, which minor versions may change.
        "eval": ["lm_eval[api]>=0.4.13,<0.5"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "import-linter>=2.3",
            "gguf>=0.10",
            "tensorboard",
            "bitsandbytes",
            "filelock",
            "ray",
            "playwright",
            *PREDICT,
        ],
    },
    entry_points={
        "console_scripts": ["lmtp-cli = lmtp_factory.cli:main"],
        # torch's extension autoload: see lmtp_factory/plugin/autoload.py.
        "torch.backends": ["lmtp_factory = lmtp_factory.plugin.autoload:autoload"],
    },
)
