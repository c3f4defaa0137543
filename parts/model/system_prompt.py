"""The system prompt that travels with a model: in its chat template, for conversations that bring none. Knows no text
of one."""

import copy
import json
import re

# In front of a chat template: the system message of a conversation that brings none. The text is a JSON string, which
# is one of Jinja's too, so quotes, line breaks and braces in it are text.
DEFAULT = """\
{%- if not messages or messages[0].role != 'system' %}
{%- set messages = [{'role': 'system', 'content': TEXT}] + messages %}
{%- endif %}
"""
PATTERN = re.compile(re.escape(DEFAULT).replace("TEXT", r'("(?:[^"\\]|\\.)*")'))


def with_default(tokenizer, system_prompt: str):
    """A copy of `tokenizer` whose chat template begins each conversation that has no system message with this one, in
    place of an earlier default. A conversation that has one is rendered as before."""
    tokenizer = copy.copy(tokenizer)
    template = PATTERN.sub("", tokenizer.get_chat_template(), count=1)
    tokenizer.chat_template = DEFAULT.replace("TEXT", json.dumps(system_prompt, ensure_ascii=False)) + template
    return tokenizer


def default(tokenizer) -> str | None:
    """What `with_default` put there, or None."""
    found = PATTERN.match(tokenizer.get_chat_template())
    return json.loads(found[1]) if found else None
