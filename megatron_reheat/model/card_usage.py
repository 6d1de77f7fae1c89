"""The part of a model card that says how the model is sampled: with transformers and with vLLM, prompted as in its training."""

from __future__ import annotations

import json
import re
from typing import Any

QUESTION = "What is 7 * 8?"
MAX_TOKENS = 2048  # of a response, where the run's own limit is not known


def usage(name: str, config: dict[str, Any], *, has_chat_template: bool) -> str:
    """Markdown with two programs.

    Args:
        name: a hub name, or a folder as it is called.
        config: the run's configuration, in part or whole.
    """
    data, rollout = (section if isinstance(section := config.get(key), dict) else {} for key in ("data", "rollout"))
    chat = has_chat_template and data.get("template") != "raw"
    limits = (rollout.get("temperature", 1.0), rollout.get("max_tokens", MAX_TOKENS))
    if chat:
        kwargs = data.get("chat_template_kwargs") or {}
        prompt, more = _messages(data), f", **{kwargs!r}" if kwargs else ""
        encoded = (
            "tokenizer.apply_chat_template(\n"
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{more}\n)'
        )
        call = f"llm.chat(messages, sampling{f', chat_template_kwargs={kwargs!r}' if kwargs else ''})"
    else:
        prompt = _raw_prompt(data)
        encoded = 'tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)'
        call = "llm.generate([prompt], sampling)"
    transformers = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {_text(name)}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
{prompt}
inputs = {encoded}.to(model.device)
output = model.generate(**inputs, do_sample=True, temperature={limits[0]}, top_k=0, max_new_tokens={limits[1]})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
    vllm = f"""\
from vllm import LLM, SamplingParams

{prompt}
llm = LLM(model={_text(name)})
sampling = SamplingParams(temperature={limits[0]}, max_tokens={limits[1]})
print({call}[0].outputs[0].text)"""
    how = "Prompts go through the tokenizer's chat template" if chat else "Prompts are plain text"
    how += ", as in training" if "template" in data else ""
    how += (
        "; the tokenizer has a chat template, with which it was not trained" if has_chat_template and not chat else ""
    )
    return f"{how}. With transformers:\n\n```python\n{transformers}\n```\n\nWith vLLM:\n\n```python\n{vllm}\n```"


def renamed(card: str, old: str, new: str) -> str:
    """The card of a model that is called `new` from now on, as far as its programs name it."""
    for line in ("name = {}\n", "llm = LLM(model={})\n"):
        card = card.replace(line.format(_text(old)), line.format(_text(new)))
    return card


def _messages(data: dict[str, Any]) -> str:
    system = data.get("system_prompt")
    turns = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": QUESTION}]
    return f"messages = {_text(turns)}"


def _raw_prompt(data: dict[str, Any]) -> str:
    """The run's template, its first field filled with a question. A field is `{name}`, the name maybe dotted."""
    template = str(data.get("raw_template", "{question}"))
    fields = dict.fromkeys(re.findall(r"(?<!\{)\{([^{}]+)\}", template))
    if template == "{question}":
        return f"prompt = {_text(QUESTION)}"
    values = (QUESTION, *["..."] * len(fields))
    filled = "".join(f".replace({_text(f'{{{f}}}')}, {_text(v)})" for f, v in zip(fields, values, strict=False))
    return f"prompt = {_text(template)}{filled}"


def _text(value: Any) -> str:
    """As Python writes it, in one line and double quotes."""
    return json.dumps(value, ensure_ascii=False)
