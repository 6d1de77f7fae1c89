"""A real tokenizer with one token a character, small enough to know every id of a text beforehand."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def character_tokenizer(
    chat_template: str | dict[str, str] | None = CHAT_TEMPLATE, *, adds: str = "$A"
) -> PreTrainedTokenizerFast:
    """`adds` is what it puts around a text by itself: `<bos> $A` like Llama's, `<bos> $A <eos>` like T5's."""
    specials = {"<unk>": 0, "<eos>": 1, "<bos>": 2}
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocabulary = specials | {c: i for i, c in enumerate(characters, start=len(specials))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=list(specials.items()))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>")
    made.chat_template = chat_template
    return made
