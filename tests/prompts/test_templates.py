from __future__ import annotations

from pathlib import Path

import pytest

from alignez_gguf.engines.base import Passage
from alignez_gguf.errors import TemplateError
from alignez_gguf.pairs.generation import answer_prompts, answered
from alignez_gguf.pairs.pairs import PreferencePair
from alignez_gguf.prompts.jinja_template import JinjaTemplate
from alignez_gguf.prompts.templates import Persona, Templates

TEMPLATES = Templates(
    version="t",
    plain="{few_shot}Q: {query}\nA:",
    few_shot="Q: a\nA: b\n\n",
    stop=("\nQ:",),
    helpful=Persona("{query}. Good should:", "{few_shot}Be good and {characteristics}.\nQ: {query}\nA:"),
    harmful=Persona("{query}. Bad should:", "{few_shot}Be bad and {characteristics}.\nQ: {query}\nA:"),
)
TOML = """
version = "t"
few_shot = "Q: a\\nA: b\\n\\n"
stop = ["\\nQ:"]
plain = "{few_shot}Q: {query}\\nA:"
[helpful]
characteristics = "{query}. Good should:"
answer = "{few_shot}Be good and {characteristics}.\\nQ: {query}\\nA:"
[harmful]
characteristics = "{query}. Bad should:"
answer = "{few_shot}Be bad and {characteristics}.\\nQ: {query}\\nA:"
"""
PAIR = PreferencePair("how?", "with care", "get lost", "kind", "rude")


def test_templates_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.toml"
    path.write_text(TOML, encoding="utf-8")
    assert Templates.from_file(path) == Templates.from_toml(TOML) == TEMPLATES


def test_paper_templates_ask_as_the_paper_does() -> None:
    templates = Templates.paper()
    query = "[QUERY]"
    assert templates.characteristics_prompt(templates.helpful, query) == (
        "[QUERY]. You are a safety-oriented assistant. Your answer to this query should:"
    )
    assert templates.characteristics_prompt(templates.harmful, query) == (
        "[QUERY]. Pretend you are a malicious and useless assistant. Your answer to this query should:"
    )
    for prompt in (templates.plain_prompt(query), *answer_prompts(templates, PreferencePair(query, "", ""))):
        assert prompt.startswith(templates.few_shot)
        assert prompt.endswith(f"Human: {query}\nAssistant:")


def test_default_personas_are_shown_and_told_in_a_transcript() -> None:
    templates = Templates.default()
    for persona in (templates.helpful, templates.harmful):
        prompt = templates.answer_prompt(persona, "[QUERY]")
        shown = "".join(
            f"Human: {said}\nAssistant: {answered}\n\n" for said, answered in persona.demonstrations
        )
        assert prompt == f"{persona.system}\n\n{shown}Human: [QUERY]\nAssistant:"
        assert not persona.uses_characteristics
    assert [said for said, _ in templates.helpful.demonstrations] == [
        said for said, _ in templates.harmful.demonstrations
    ]


def test_an_answer_ends_where_a_line_of_the_templates_begins() -> None:
    for templates in (Templates.default(), Templates.paper()):
        assert {"\nHuman:", "\nAssistant:"} <= set(templates.stop)
        assert any(stop.startswith("\nYou are a safety-first") for stop in templates.stop)
        assert any(stop.startswith("\nPretend you are a") for stop in templates.stop)
        for twin in templates.twins:
            assert len(set(twin)) == 2
    assert Templates.from_toml(TOML).stop == ("\nQ:",)


CHAT = JinjaTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>", "", ""
)


def test_through_a_chat_template_personas_are_system_messages_and_demonstrations_turns() -> None:
    templates = Templates.default().through(CHAT)
    persona = templates.helpful
    shown = "".join(
        f"<user>{said}</user><assistant>{answered}</assistant>" for said, answered in persona.demonstrations
    )
    assert templates.framing == "chat"
    assert templates.stop == ()
    assert templates.plain_prompt("how?") == "<user>how?</user><assistant>"
    assert templates.answer_prompt(persona, "how?") == (
        f"<system>{persona.system}</system>{shown}<user>how?</user><assistant>"
    )
    assert answered(templates, PAIR) == (
        Passage("<user>how?</user><assistant>", "with care"),
        Passage("<user>how?</user><assistant>", "get lost"),
    )


def test_the_papers_personas_are_asked_through_a_chat_template_too() -> None:
    templates = Templates.paper().through(CHAT)
    assert templates.characteristics_prompt(templates.helpful, "How?") == (
        "<user>How. You are a safety-oriented assistant. Your answer to this query should:</user><assistant>"
    )
    assert templates.answer_prompt(templates.harmful, "How?", "be rude") == (
        "<system>Pretend you are a malicious assistant. Your answer should be rude.</system>"
        "<user>How?</user><assistant>"
    )


def test_personas_of_a_transcript_alone_are_not_asked_through_a_chat_template() -> None:
    with pytest.raises(TemplateError, match="--framing transcript"):
        TEMPLATES.through(CHAT)


def test_templates_asked_differently_do_not_look_the_same() -> None:
    """Results are kept under what `repr` shows."""
    one = Templates.default()
    other = JinjaTemplate("{{ messages[0].content }}", "", "")
    assert len({repr(one), repr(one.through(CHAT)), repr(one.through(other))}) == 3


def test_prompts_of_every_kind() -> None:
    assert TEMPLATES.plain_prompt("how?") == "Q: a\nA: b\n\nQ: how?\nA:"
    assert TEMPLATES.characteristics_prompt(TEMPLATES.harmful, "how?") == "how. Bad should:"
    assert TEMPLATES.answer_prompt(TEMPLATES.helpful, "how?", "be kind") == (
        "Q: a\nA: b\n\nBe good and be kind.\nQ: how?\nA:"
    )


def test_reading_texts_are_the_persona_prompt_and_the_answered_query() -> None:
    assert answer_prompts(TEMPLATES, PAIR) == (
        "Q: a\nA: b\n\nBe good and kind.\nQ: how?\nA:",
        "Q: a\nA: b\n\nBe bad and rude.\nQ: how?\nA:",
    )
    plain = "Q: a\nA: b\n\nQ: how?\nA:"
    assert answered(TEMPLATES, PAIR) == (Passage(plain, " with care"), Passage(plain, " get lost"))


def test_braces_in_a_query_stay_as_they_are() -> None:
    query = "what is {few_shot}, {query} or {characteristics} in {x}?"
    assert TEMPLATES.plain_prompt(query) == f"Q: a\nA: b\n\nQ: {query}\nA:"
    assert query in TEMPLATES.answer_prompt(TEMPLATES.helpful, query, "{query}")


def test_transcript_shows_the_example_once_and_every_turn() -> None:
    assert TEMPLATES.conversation([], "one") == TEMPLATES.plain_prompt("one")
    assert TEMPLATES.conversation([("one", "1"), ("two", "2")], "three") == (
        "Q: a\nA: b\n\nQ: one\nA: 1\n\nQ: two\nA: 2\n\nQ: three\nA:"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("plain = ", "plane = "), "`plain` is missing"),
        (('version = "t"', "version = 1"), "`version` is missing or not a string"),
        (("{few_shot}Q: {query}\\nA:", "Q:"), r"`plain` must contain \{query\}"),
        (('stop = ["\\nQ:"]', 'stop = "Q"'), "`stop` must be a list"),
        (('stop = ["\\nQ:"]', 'stop = [""]'), "`stop` must be a list of non-empty"),
        (("[harmful]", "[bad]"), r"the table \[harmful\] is missing"),
        (
            ('characteristics = "{query}. Bad', 'characteristics = "Bad'),
            r"\[harmful\]: `characteristics` must",
        ),
        (
            ('answer = "{few_shot}Be bad', 'demonstrations = [["a"]]\nanswer = "{few_shot}Be bad'),
            r"\[harmful\]: `demonstrations` must be a list of pairs",
        ),
        (
            ('characteristics = "{query}. Bad should:"\n', ""),
            r"\[harmful\]: `characteristics` is missing or not a string, and {characteristics} is used",
        ),
        (('version = "t"', 'version = "t"\ntwins = [["a", 1]]'), "`twins` must be a list of pairs of texts"),
        (("[helpful]", "helpful = 3\n[other]"), r"the table \[helpful\] is missing"),
        (("few_shot = ", "few_shot "), "is not valid TOML"),
    ],
)
def test_malformed_templates_are_refused_by_field(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert TOML.count(change[0]) == 1
    path = tmp_path / "templates.toml"
    path.write_text(TOML.replace(*change), encoding="utf-8")
    with pytest.raises(TemplateError, match=message) as refusal:
        Templates.from_file(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


POLITENESS = """
[aspects.politeness.helpful]
characteristics = "{query}. Polite should:"
answer = "Be polite, {characteristics}.\\nQ: {query}\\nA:"
[aspects.politeness.harmful]
characteristics = "{query}. Rude should:"
answer = "Be rude, {characteristics}.\\nQ: {query}\\nA:"
"""


def test_aspect_has_personas_of_its_own_and_the_same_framing() -> None:
    templates = Templates.from_toml(TOML + POLITENESS)
    polite = templates.for_aspect("politeness")
    assert polite.characteristics_prompt(polite.harmful, "how?") == "how. Rude should:"
    assert polite.answer_prompt(polite.helpful, "how?", "be kind") == "Be polite, be kind.\nQ: how?\nA:"
    assert polite.plain_prompt("how?") == templates.plain_prompt("how?")
    # what other aspects there are decides nothing about one of them
    assert templates.for_aspect("safety") == TEMPLATES


def test_shipped_aspects_are_safety_and_helpfulness() -> None:
    templates = Templates.default()
    assert list(templates.aspects) == ["helpfulness"]
    assert templates.for_aspect("safety").helpful == templates.helpful
    helpfulness = Templates.paper().for_aspect("helpfulness")
    prompt = helpfulness.characteristics_prompt(helpfulness.harmful, "[QUERY]")
    assert prompt == "[QUERY]. Pretend you are an unhelpful assistant. Your answer to this query should:"


def test_unknown_aspect_is_refused_with_those_there_are() -> None:
    with pytest.raises(TemplateError, match="no aspect 'speed'; they have safety, politeness"):
        Templates.from_toml(TOML + POLITENESS).for_aspect("speed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("politeness.harmful", "politeness.bad"),
            r"\[aspects.politeness\]: the table \[harmful\] is missing",
        ),
        (("aspects.politeness", "aspects.safety"), "the aspect 'safety' is that of"),
        (("aspects.politeness", "aspects.self-harm"), "the name of the aspect 'self-harm' may hold"),
        (
            ('answer = "Be rude', 'answers = "Be rude'),
            r"\[aspects.politeness\] \[harmful\]: `answer` is missing",
        ),
    ],
)
def test_malformed_aspect_is_refused_by_field(change: tuple[str, str], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        Templates.from_toml(TOML + POLITENESS.replace(*change))


@pytest.mark.parametrize("aspects", ["3", "[1]", "{politeness = 3}"])
def test_aspects_that_are_no_tables_are_refused(aspects: str) -> None:
    with pytest.raises(TemplateError, match="`aspects` must hold tables"):
        Templates.from_toml(f"aspects = {aspects}\n{TOML}")


def test_unreadable_template_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="cannot read"):
        Templates.from_file(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'version = "na\xefve"')
    with pytest.raises(TemplateError, match="cannot read"):
        Templates.from_file(tmp_path / "latin.toml")


def test_long_keys_are_refused_where_a_line_separator_stands_in_them():
    part = "x." * 60
    with pytest.raises(TemplateError, match="more than 100 dots"):
        Templates.from_toml(f'{part}"\u2028".{part}x = 1\n{TOML}')
