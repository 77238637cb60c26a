"""Tokenizers and chat templates that are made in a moment, for tests of the data stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.data import PrepareOptions, prepare_dataset

PAIR_OPTIONS = PrepareOptions(("chosen", "rejected"), None, "keep_start")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("Ġ", "the"), ("Ġa", "n"), ("o", "n"), ("b", "l")]

MARK = "\u2581"
MARKED_MERGES = [("t", "h"), (MARK, "th"), (MARK + "th", "e"), ("o", "n"), (MARK, MARK), ("!", "!"), ("i", "n")]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}"
    "{{ eos_token }}{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
HEADER_AFTER_USER = (
    "<|im_start|>system\nBe kind.<|im_end|>\n{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}<|im_end|>\n{% else %}<|im_start|>user\n{{ message.content }}<|im_end|>\n"
    "<|im_start|>assistant\n{% endif %}{% endfor %}"
)
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>') | last }}{% else %}"
    "{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}"
    "<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}{% for call in message.tool_calls %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    *, bos: bool = False, auto_eos: bool = False, template: str | None = CHATML, merges: Any = MERGES
) -> PreTrainedTokenizerFast:
    """One token per byte and a few merged ones: any text comes back from its ids as it was."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = f"{'<s> ' if bos else ''}$A{' </s>' if auto_eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        extra_special_tokens=SPECIAL[2:],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def marked_tokenizer() -> Any:
    """BPE that writes a space as a mark; characters beyond ASCII become bytes."""
    letters = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), MARK, *map(chr, range(33, 127))]
    words = [*letters, *("".join(pair) for pair in MARKED_MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=MARKED_MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL[2:]
    )


def prepared(rows: Sequence[dict[str, Any]], tokenizer: Any, options: PrepareOptions = PAIR_OPTIONS) -> Any:
    """The rows after ``prepare_dataset``."""
    return prepare_dataset(Dataset.from_list(list(rows)), tokenizer, options, name="train")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
