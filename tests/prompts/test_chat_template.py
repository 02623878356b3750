"""Chat templates as transformers renders them, and the transcript of models without one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from alignez_gguf.errors import QueryError, TemplateError
from alignez_gguf.installer.source import source_tree
from alignez_gguf.prompts.chat_template import ChatTemplate, Message, Turn
from alignez_gguf.prompts.jinja_template import JinjaTemplate
from alignez_gguf.prompts.templates import METADATA_KEY, Templates
from tests.models import tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
WITH_BREAK_AND_JSON = """\
{% for message in messages %}
    {% if loop.index0 > 9 %}
        {% break %}
    {% endif %}
    {{ message | tojson }}
{% endfor %}
"""
WITH_GENERATION_BLOCKS = """\
{%- set first = "outside" -%}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {% generation %}
        {%- set first = "inside" %}
        {{- "<|im_start|>assistant\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {% endgeneration %}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- first }}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
"""As SmolLM3 and Phi-4-reasoning have it."""
WITH_TYPED_PARTS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""As SmolVLM has it."""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for message in messages if message['role'] != 'system' %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
)
ONE_SYSTEM_MESSAGE = (
    "{% if messages[0]['role'] == 'system' %}<sys>{{ messages[0]['content'] }}</sys>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
)
"""As gpt-oss, DeepSeek R1 and MiniMax have it."""
PARTS_OF_SYSTEM_ALONE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}\n"
    "{% else %}[{{ message['role'] }}] {{ message['content'] }}\n{% endif %}{% endfor %}"
)
LAST_TURN_ONLY = "User: {{ messages[-1]['content'] }}\nAssistant:"
TEMPLATES = {
    "ChatML": CHATML,
    "generation blocks": WITH_GENERATION_BLOCKS,
    "Llama 3": LLAMA_3,
    "Llama 3.2": LLAMA_3_2,
    "Mistral": MISTRAL,
    "break and tojson": WITH_BREAK_AND_JSON,
}
CONVERSATIONS: dict[str, tuple[list[Turn], str]] = {
    "first message": ([], "How do I bake a cake?"),
    "later message": (
        [("Hi", "Hello & <b>welcome</b>"), ("  2 + 2?  ", '4\n\nIt\'s "four".')],
        "Grüße {{x}}?",
    ),
}


class FakeModel:
    """Metadata alone."""

    bos, eos = 0, 1

    def __init__(self, **metadata: str) -> None:
        self._metadata = {key.replace("_", ".", 1): value for key, value in metadata.items()}

    def metadata(self, key: str) -> str | None:
        return self._metadata.get(key)

    def token_text(self, token: int) -> str:
        return ("<s>", "</s>")[token]


def expected(template: str, messages: list[dict[str, Any]]) -> str:
    """What transformers makes of the messages."""
    return str(
        tokenizer().apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def typed(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_template_is_rendered_as_by_transformers(
    template: str, conversation: tuple[list[Turn], str]
) -> None:
    turns, message = conversation
    messages = [{"role": "user", "content": message}]
    for said, answered in reversed(turns):
        messages[:0] = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]

    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=template))

    assert framing.prompt(turns, message) == expected(template, messages)
    assert framing.stop == ()


def test_templates_of_real_models_are_rendered_as_by_transformers() -> None:
    paths = sorted((source_tree() / "vendor" / "llama.cpp" / "models" / "templates").glob("*.jinja"))
    n_alike = 0
    for path in paths:
        template = path.read_text(encoding="utf-8")
        messages = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bake a cake?")]
        try:
            wanted = expected(template, [{"role": role, "content": text} for role, text in messages])
        except Exception:  # a template that cannot do without tools
            continue
        framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=template))
        assert framing.prompt_of([Message(*message) for message in messages]) == wanted, path.name
        n_alike += 1
    assert n_alike > 50


def test_template_that_walks_over_content_parts_gets_typed_parts() -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=WITH_TYPED_PARTS))
    assert framing.prompt([], "Hi") == expected(WITH_TYPED_PARTS, [typed("user", "Hi")])
    assert framing.prompt([("a", "b")], "c", "Be kind.") == expected(
        WITH_TYPED_PARTS,
        [typed("system", "Be kind."), typed("user", "a"), typed("assistant", "b"), typed("user", "c")],
    )


@pytest.mark.parametrize("template", [GEMMA, WITHOUT_SYSTEM, MISTRAL])
def test_system_message_that_a_template_refuses_or_drops_begins_the_users_first_message(
    template: str,
) -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=template))
    first = {"role": "user", "content": "Be kind.\n\na"}
    assert framing.prompt([], "a", "Be kind.") == expected(template, [first])
    later = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert framing.prompt([("a", "b")], "c", "Be kind.") == expected(template, [first, *later])
    messages = [Message("system", "Be"), Message("system", "kind."), Message("user", "a")]
    assert framing.prompt_of(messages) == expected(
        template, [{"role": "user", "content": "Be\n\nkind.\n\na"}]
    )


@pytest.mark.parametrize("more", [[], [Message("assistant", "b"), Message("user", "c")]])
def test_system_messages_become_one_where_a_template_knows_one(more: list[Message]) -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=ONE_SYSTEM_MESSAGE))
    later = [Message("user", "a"), *more]
    prompt = framing.prompt_of([Message("system", "Be"), Message("system", "kind."), *later])
    assert prompt == expected(
        ONE_SYSTEM_MESSAGE,
        [{"role": one.role, "content": one.content} for one in (Message("system", "Be\n\nkind."), *later)],
    )


def test_typed_parts_are_not_written_into_a_prompt_as_data() -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=PARTS_OF_SYSTEM_ALONE))
    assert framing.prompt([], "a", "Be kind.") == "[user] Be kind.\n\na\n"


def test_template_that_drops_a_message_is_refused_with_the_mend() -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=LAST_TURN_ONLY))
    assert framing.prompt([], "Hi") == "User: Hi\nAssistant:"
    with pytest.raises(TemplateError, match=r"drops message 1 of 3 \(user\); give --templates"):
        framing.prompt([("a", "b")], "c")
    with pytest.raises(TemplateError, match=r"drops message 3 of 4 \(system\)"):
        ChatTemplate.of(FakeModel(tokenizer_chat_template=WITHOUT_SYSTEM)).prompt_of(
            [Message(role, "x") for role in ("user", "assistant", "system", "user")]
        )
    with pytest.raises(TemplateError, match=r"drops message 1 of 1 \(user\)"):
        ChatTemplate.of(FakeModel(tokenizer_chat_template="Answer:")).prompt([], "Answer")


def test_form_is_looked_for_once_for_each_kind_of_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    template = JinjaTemplate(GEMMA, "<s>", "</s>")
    rendered: list[list[dict[str, Any]]] = []
    render = template._rendered
    monkeypatch.setattr(template, "_rendered", lambda messages: rendered.append(messages) or render(messages))
    for text in ("a", "b", "c"):
        template.render([Message("system", "Be kind."), Message("user", text)])
    assert len(rendered) == 3 + 3  # as they are, as typed parts, merged; then the three prompts


def test_date_in_a_template_is_today() -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=LLAMA_3_2))
    assert f"Today Date: {datetime.now():%d %b %Y}" in framing.prompt([], "Hi")


@pytest.mark.parametrize("metadata", [{}, {"tokenizer_chat_template": ""}])
def test_base_model_gets_the_transcript(metadata: dict[str, str]) -> None:
    framing = ChatTemplate.of(FakeModel(**metadata))
    default = Templates.default()
    turns = [("one", "1")]
    assert framing.prompt(turns, "two") == default.conversation(turns, "two")
    assert framing.stop == default.stop


def test_users_templates_come_first_then_the_models_own_then_the_chat_template(tmp_path: Path) -> None:
    own, given = (
        f'version = "{name}"\nfew_shot = ""\nstop = ["{name}"]\nplain = "{name} {{query}}"\n'
        '[helpful]\ncharacteristics = "{query}"\nanswer = "{query}"\n'
        '[harmful]\ncharacteristics = "{query}"\nanswer = "{query}"\n'
        for name in ("own", "given")
    )
    model = FakeModel(tokenizer_chat_template=CHATML)
    model._metadata[METADATA_KEY] = own
    path = tmp_path / "templates.toml"
    path.write_text(given, encoding="utf-8")

    assert ChatTemplate.of(model).prompt([], "q") == "own q"
    assert ChatTemplate.of(model).stop == ("own",)
    assert ChatTemplate.of(model, path).prompt([], "q") == "given q"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "cannot be read"),
        ("{{ raise_exception('no such role') }}", "fails: no such role"),
        ("{{ messages[9].content.x }}", "fails"),
        ("{{ ''.__class__.__mro__ }}", "fails"),
    ],
)
def test_broken_chat_template_is_refused_with_the_mend(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as refusal:
        ChatTemplate.of(FakeModel(tokenizer_chat_template=template)).prompt([], "q")
    assert "give --templates" in str(refusal.value)


def test_models_own_templates_that_are_malformed_are_refused_by_origin() -> None:
    model = FakeModel()
    model._metadata[METADATA_KEY] = "version ="
    with pytest.raises(TemplateError, match="the templates in the model's metadata is not valid TOML"):
        ChatTemplate.of(model)


def test_system_message_is_a_message_of_a_chat_template_and_the_beginning_of_a_transcript() -> None:
    framed = ChatTemplate.of(FakeModel(tokenizer_chat_template=CHATML)).prompt([], "Hi", "Be kind.")
    assert framed.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    transcript = ChatTemplate.of(FakeModel()).prompt([], "Hi", "Be kind.")
    assert transcript == "Be kind.\n\n" + Templates.default().conversation([], "Hi")


def test_messages_become_the_transcript_of_their_turns() -> None:
    framing = ChatTemplate.of(FakeModel())
    messages = [
        Message("system", "Be kind."),
        Message("system", "Be brief."),
        Message("user", "one"),
        Message("assistant", "1"),
        Message("user", "two"),
        Message("user", "or three"),
    ]
    expected = framing.prompt([("one", "1")], "two\n\nor three", "Be kind.\n\nBe brief.")
    assert framing.prompt_of(messages) == expected


def test_messages_go_to_a_chat_template_as_they_are() -> None:
    framing = ChatTemplate.of(FakeModel(tokenizer_chat_template=CHATML))
    assert framing.prompt_of([Message("user", "a"), Message("assistant", "b"), Message("user", "c")]) == (
        framing.prompt([("a", "b")], "c")
    )
    assert "<|im_start|>tool\nx" in framing.prompt_of([Message("tool", "x")])


@pytest.mark.parametrize(
    "roles",
    [[], ["system"], ["assistant"], ["assistant", "user"], ["user", "assistant"], ["user", "system", "user"]],
)
def test_messages_that_are_no_transcript_are_refused(roles: list[str]) -> None:
    with pytest.raises(QueryError):
        ChatTemplate.of(FakeModel()).prompt_of([Message(role, "x") for role in roles])
