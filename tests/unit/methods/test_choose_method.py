"""`rl.method`: a name or a file of the user's own; what is wrong with it is told in one sentence, before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_reheat.config import Config
from megatron_reheat.errors import ConfigError
from megatron_reheat.methods import METHODS, choose_method, method_class
from megatron_reheat.methods.grpo import GRPO, Costs
from megatron_reheat.recipe import dump_config, load_config, parse_config

# annotations are text, as in most modern files: they are found only where the file is a module like any other
TOY = """
from __future__ import annotations
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from pydantic import Field
from megatron_reheat.config_fields import Section
from megatron_reheat.methods.grpo import GRPO, Costs

@dataclass
class Part:
    size: int = 0

class Toy(GRPO):
    class Options(Section):
        weight: float = Field(default=0.5, ge=0)
        kind: Literal["a", "b"] = "a"

    @classmethod
    def problems(cls, config, options) -> Iterator[str]:
        if config.rl.dynamic_sampling and options.kind == "b":
            yield "rl.options.kind b and rl.dynamic_sampling make no sense together; set rl.dynamic_sampling=false"

    @classmethod
    def costs(cls, config, options) -> Costs:
        return Costs(sampled=options.weight)

class Asking(Toy):
    samplers = ("explorer",)
"""


def recipe(method: str, **keys: Any) -> Config:
    return parse_config({"model": {"hf_path": "m"}, "data": {"path": "p"}, "rl": {"method": method, **keys}})


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "toy.py"
    path.write_text(TOY)
    return path


def refusal(method: str, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_method(recipe(method, **keys))
    return str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method_whose_options_describe_themselves(name: str) -> None:
    found = method_class(name)
    assert issubclass(found, GRPO)
    assert [key for key, field in found.Options.model_fields.items() if not field.description] == []


def test_the_default_is_grpo_which_costs_nothing_more() -> None:
    choice = choose_method(parse_config({"model": {"hf_path": "m"}, "data": {"path": "p"}}))
    assert choice.cls is GRPO and choice.options == GRPO.Options()
    assert choice.costs(recipe("grpo")) == Costs()


def test_a_file_of_the_users_own(toy: Path) -> None:
    config = recipe(f"{toy}:Toy", options={"weight": 2, "kind": "b"}, dynamic_sampling=False)
    choice = choose_method(config)
    assert choice.cls.__name__ == "Toy" and choice.options.model_dump() == {"weight": 2.0, "kind": "b"}
    assert choice.costs(config) == Costs(sampled=2.0)
    assert choose_method(config).cls is choice.cls  # read once: its instances are instances of one class


def test_a_relative_path_is_that_of_the_folder_the_run_starts_from_for_good(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("toy.py:Toy")
    assert config.rl.method == f"{toy.resolve()}:Toy" == recipe(f"../{tmp_path.name}/./toy.py:Toy").rl.method
    dump = tmp_path / "config.yaml"
    dump.write_text(dump_config(config))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_config(dump) == config
    assert choose_method(load_config(dump)).cls.__name__ == "Toy"


def test_a_home_folder_is_one() -> None:
    assert recipe("~/toy.py:Toy").rl.method == f"{Path.home().resolve()}/toy.py:Toy"


def test_a_name_is_no_path() -> None:
    assert recipe("grpo").rl.method == "grpo"


def test_a_typo_gets_a_suggestion() -> None:
    assert refusal("grop") == "rl.method: there is no 'grop'; did you mean 'grpo'?"


def test_what_resembles_nothing_gets_the_list() -> None:
    assert refusal("zzz") == (
        f"rl.method: there is no 'zzz'; it is one of {', '.join(METHODS)}, or path/to/file.py:Class"
    )


def test_a_file_without_its_class_is_asked_for_it(toy: Path) -> None:
    assert refusal(str(toy)) == f"rl.method: {toy} is a file; say which class of it as well: {toy}:Class"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/none.py:Toy") == f"rl.method: no such file: {tmp_path}/none.py"
    (tmp_path / "folder.py").mkdir()
    assert refusal(f"{tmp_path}/folder.py:Toy") == f"rl.method: no such file: {tmp_path}/folder.py"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError: "),
        ("open('no_such_data.txt')", "FileNotFoundError: [Errno 2] No such file or directory: 'no_such_data.txt'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_raises_is_told_with_what_it_raised(tmp_path: Path, source: str, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    message = refusal(f"{path}:Toy")
    assert message.startswith(f"rl.method: {path} cannot be imported: {told}") and "\n" not in message


def test_a_class_that_is_not_there(toy: Path) -> None:
    derived = f"rl.method: {toy} has no class 'Tony' derived from megatron_reheat.methods.grpo.GRPO"
    assert refusal(f"{toy}:Tony") == f"{derived}; it has Toy, Asking"
    assert refusal(f"{toy}:Part").startswith(f"rl.method: {toy} has no class 'Part' derived from")
    (toy.parent / "empty.py").write_text("")
    assert refusal(f"{toy.parent}/empty.py:Toy").endswith("'Toy' derived from megatron_reheat.methods.grpo.GRPO")


def test_options_are_checked_as_everything_is(toy: Path) -> None:
    name = f"{toy}:Toy"
    assert refusal(name, options={"wieght": 1}) == "rl.options.wieght: unknown key; did you mean 'weight'?"
    assert refusal(name, options={"zzz": 1}) == "rl.options.zzz: unknown key; known keys: weight, kind"
    assert refusal(name, options={"weight": -1}) == (
        "rl.options.weight: Input should be greater than or equal to 0, got -1"
    )
    assert refusal(name, options={"weight": -1, "kind": "c"}).count("rl.options.") == 2
    assert refusal("grpo", options={"weight": 1}) == "rl.options.weight: unknown key; there are none"


def test_what_makes_no_sense_beside_the_method(toy: Path) -> None:
    assert "set rl.dynamic_sampling=false" in refusal(f"{toy}:Toy", options={"kind": "b"}, dynamic_sampling=True)


def test_samplers_are_those_that_the_method_has(toy: Path) -> None:
    asking = f"{toy}:Asking"
    assert choose_method(recipe(asking, samplers={"explorer": "folder"})).cls.__name__ == "Asking"
    assert refusal(asking) == (
        f"rl.method {asking} samples from a frozen model besides: give its Hugging Face folder as rl.samplers.explorer"
    )
    assert refusal(asking, samplers={"explorer": "folder", "expolrer": "f"}) == (
        f"rl.samplers.expolrer: rl.method {asking} does not sample from it; its samplers are explorer"
    )
    assert refusal("grpo", samplers={"explorer": "folder"}) == (
        "rl.samplers.explorer: rl.method grpo does not sample from it; it has none"
    )
