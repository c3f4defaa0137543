"""The system prompt in a chat template."""

import pytest

import data
from parts.model import encoding, weights

EARLIER = [["头痛，怎么办？", "您好。\n\n先休息。"], ["还痛。", "多久了？"]]


@pytest.mark.parametrize(
    "system",
    [data.SYSTEM_PROMPT, "", "两\n行\r\t\\n", "\"引'号'\"", "{{ messages }}{% endif %}{#", "\\u4f60 é 😀 \u2028"],
)
def test_the_default_is_in_the_template(any_tokenizer, tmp_path, system):
    given = encoding.with_system(any_tokenizer, "之前的")
    tokenizer = encoding.with_system(given, system)
    assert [encoding.default_system(each) for each in (any_tokenizer, given, tokenizer)] == [None, "之前的", system]
    assert tokenizer.chat_template.count("set messages = ") == 1
    tokenizer.save_pretrained(tmp_path)
    saved = weights.load_tokenizer(str(tmp_path))
    assert encoding.default_system(saved) == system
    trained = data.to_messages("问", history=EARLIER, system=system)
    expected = any_tokenizer.apply_chat_template(trained, tokenize=False, add_generation_prompt=True)
    for messages in (trained, trained[1:]):  # one who sends a system message is obeyed
        assert saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    asked = data.to_messages("问", "想", "答", EARLIER, system="别的")
    assert encoding.encode_example(saved, asked) == encoding.encode_example(any_tokenizer, asked)
