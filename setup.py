"""Package metadata of llmtuner; tested versions are pinned in requirements.txt."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.10",  # older releases let a crafted weights file bypass weights_only
    "transformers>=5.3,<6",  # older releases can run hub code named in a config.json
    "accelerate>=1.12",
    "peft>=0.18",
    "datasets>=4.0",
    "safetensors>=0.6",
    "sentencepiece>=0.2",
    "pydantic>=2.11",
    "ruamel.yaml>=0.18",
    "rich>=13",
    "matplotlib>=3.8",
]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.18"],
    "quant": ["bitsandbytes>=0.49"],
    "liger": ["liger-kernel>=0.7"],
    "gptq": ["gptqmodel>=5.6", "optimum>=2.0"],
    "demo": ["gguf>=0.17"],
    "metrics": ["sacrebleu>=2.5", "rouge-score>=0.1.2", "rjieba>=0.1.13"],
    "trl": ["trl>=1.0"],
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.19"],
    "swanlab": ["swanlab>=0.6"],
    "dev": ["pytest>=8", "pytest-socket>=0.7", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.15"],
}

setup(
    name="llmtuner",
    version="0.1.0",
    description="Fine-tune language models and prove what was trained.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"": ["*.jinja", "*.json", "*.c", "*.h"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["llmtuner = llmtuner.cli.main:program"]},
)
