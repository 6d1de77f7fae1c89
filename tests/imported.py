"""What the processes of `forks` begin with. The CPU backend is not installed by then."""

from importlib import import_module

from megatron_reheat.large_imports import large_imports

with large_imports():
    for name in (
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "megatron_reheat.stages.run",
        "tests.distributed.cases",
        "tests.distributed.method_cases",
        "tests.distributed.reading_cases",
    ):
        import_module(name)
