"""Chat templates of the ways they are written, rendered as transformers does."""

from __future__ import annotations

import pytest

from meshnode.text.template import compile_template

pytestmark = pytest.mark.model

TURNS = [
    {"role": "system", "content": 'Be <kind> & "brief".'},
    {"role": "user", "content": "Größe? 東京 {{ 7 * 7 }}"},
    {"role": "assistant", "content": "  twelve\n"},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "plain": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}<|assistant|>",
    "trimmed": "{% for m in messages %}\n    {% if m.content %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{%- if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}\n"
    "{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "no tools": "{% if tools is not none %}{{ tools | length }}{% endif %}{% if documents is none %}-{% endif %}",
    "date": "{{ strftime_now('%Y') }}{% if strftime_now is defined %} now{% endif %}",
    "namespace": "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
    "prompt": "{% if add_generation_prompt %}{{ bos_token }}yes{{ eos_token }}{% endif %}",
    "slices": "{{ messages[1:] | map(attribute='role') | join(',') }}{{ messages[-1]['content'] | trim }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_it_says_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template([TURNS], chat_template=TEMPLATES[name], **given)
    ours = compile_template(TEMPLATES[name]).render(messages=TURNS, tools=None, documents=None, **given)
    assert ours == expected
    assert expected
