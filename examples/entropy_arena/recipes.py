"""The recipes of yaml/methods for the CPU, and who takes part with which of them."""

from __future__ import annotations

from examples.elsewhere import ROOT, Sections

# those for GPUs have their model in their name
RECIPES = {path.stem: path for path in sorted((ROOT / "yaml" / "methods").glob("*.yaml")) if "_qwen3_" not in path.stem}
# by name: the recipe and what is changed in it
CONTESTANTS: dict[str, tuple[str, Sections]] = {
    **{name: (name, {}) for name in RECIPES},
    # what methods with minibatches are to be compared with: as many updates of the same rollouts
    "grpo_two_updates": ("grpo", {"rl": {"minibatch_prompts": 16}}),
    "opefo_exact": ("opefo", {"rl": {"options": {"variant": "exact"}}}),
}
