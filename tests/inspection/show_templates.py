"""Chat templates of many kinds, as short as they can be: what families of models do, written for these tests."""

from __future__ import annotations

OPENED = "{% if add_generation_prompt %}"
SYSTEM = "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}"
NO_SYSTEM = "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
EACH = "{% for m in messages %}"
CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"

TEMPLATES: dict[str, str] = {
    "chatml": EACH + CHATML + "{% endfor %}" + OPENED + "<|im_start|>assistant\n{% endif %}",
    "chatml with a default system turn": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + EACH
        + CHATML
        + "{% endfor %}"
        + OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "chatml without a last line break": (
        EACH
        + "{{ '' if loop.first else '\n' }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        + OPENED
        + "\n<|im_start|>assistant\n{% endif %}"
    ),
    "chatml that trims": (
        EACH
        + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        + OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "marked": (
        EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        + OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "marked with the line break": (
        EACH + "[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}\n"
        "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}" + OPENED + "[assistant] {% endif %}"
    ),
    "marked around the content alone": (
        EACH + "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}</{{ m.role }}>\n{% endfor %}" + OPENED + "<assistant>{% endif %}"
    ),
    "headers between tokens, with bos": (
        "{{ bos_token or '' }}"
        + EACH
        + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        + OPENED
        + "<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    "instructions, system in the first turn": (
        "{{ bos_token or '' }}" + SYSTEM + NO_SYSTEM + "{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{% if loop.first and first %}<<SYS>>\n{{ first }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "instructions without spaces": (
        "{{ bos_token or '' }}" + EACH + "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
        "[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
    ),
    "bos before every turn": (
        EACH
        + "{{ bos_token or '' }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        + OPENED
        + "{{ bos_token or '' }}assistant: {% endif %}"
    ),
    "turns of user and model, no system": (
        "{{ bos_token or '' }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + EACH
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}" + OPENED + "<start_of_turn>model\n{% endif %}"
    ),
    "a token for each role": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "roles and eos": (
        EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}" + OPENED + "<|assistant|>\n{% endif %}"
    ),
    "plain words for the roles": (
        SYSTEM + NO_SYSTEM + "{% if first %}{{ first }} {% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        + OPENED
        + "ASSISTANT:{% endif %}"
    ),
    "sections": (
        EACH + "### {{ m.role | title }}:\n{{ m.content }}\n\n{% endfor %}" + OPENED + "### Assistant:\n{% endif %}"
    ),
    "no end of a turn": EACH + "{{ m.role }}\n{{ m.content }}\n{% endfor %}" + OPENED + "assistant\n{% endif %}",
    "content alone": EACH + "{{ m.content }}{% endfor %}",
    "a header after the user": (
        EACH + "{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n<|im_start|>assistant\n{% endif %}{% endfor %}"
    ),
    "earlier thoughts left out": (
        EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split(' ') | last }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "an empty thought before the answer": (
        EACH
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + OPENED + "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    ),
    "tools": (
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        + EACH
        + CHATML
        + "{% endfor %}"
        + OPENED
        + "<|im_start|>assistant\n{% endif %}"
    ),
    "tools and calls, marked": (
        "{% if tools %}{% for tool in tools %}<tool>{{ tool.function.name }}</tool>{% endfor %}\n{% endif %}"
        + EACH
        + "{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}" + OPENED + "assistant: {% endif %}"
    ),
    "a space before every word of the assistant": (
        EACH + "{{ m.role }}:{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %} {{ m.content }}\n"
        "{% endif %}{% endfor %}" + OPENED + "assistant:{% endif %}"
    ),
}
WITHOUT_SYSTEM = {"turns of user and model, no system"}
"""Templates that refuse a system turn."""
