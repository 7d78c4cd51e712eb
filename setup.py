"""Packaging of `kernels` (the operators) and `gptfast` (the model, training and generation)."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# thop imports distutils, which setuptools provides since Python 3.12
BENCH = ["jinja2", "pandas", "pydantic", "pytest", "pytest-benchmark", "setuptools", "thop", "transformers"]

setup(
    name="gptfast",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "gptfast/__init__.py").read_text(), re.MULTILINE)[1],
    description="GPT models with switchable Triton kernels, and benchmarks that measure the difference",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "gptfast",
        "gptfast.checkpoint",
        "gptfast.commands",
        "gptfast.data",
        "gptfast.evaluation",
        "gptfast.generation",
        "gptfast.huggingface",
        "gptfast.tokenizers",
        "gptfast.training",
        "kernels",
    ],
    package_data={"gptfast": ["py.typed"], "kernels": ["py.typed", "launches/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "safetensors",
        "tiktoken",
        "tqdm",
        "tyro",
    ],
    extras_require={
        "dev": ["hypothesis", "mypy", "pytest-xdist", "ruff", "tensorboard", *BENCH],
        "bench": BENCH,
        "tensorboard": ["tensorboard"],
    },
    entry_points={"console_scripts": ["gptfast = gptfast.cli:program"]},
)
