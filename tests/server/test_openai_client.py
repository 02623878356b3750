"""The official client against a live server; the oracle is the engine that the command line uses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import pytest
from click.testing import CliRunner

from alignez_gguf import demo
from alignez_gguf.cli import main
from alignez_gguf.demo import eval_queries
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.prompts.chat_template import ChatTemplate
from alignez_gguf.prompts.templates import Templates
from tests.server.client import Server
from tests.server.conftest import Lone

TEMPLATES = Templates.from_file(demo.TEMPLATES)
QUERIES = [row.query for row in eval_queries()[:20]]
PROMPTS = [TEMPLATES.plain_prompt(query) for query in QUERIES]


def steered(strength: float, **fields: object) -> dict[str, object]:
    return {"steering": {"strength": strength, **fields}}


def test_completion_is_that_of_the_command_line(client: openai.OpenAI, control_path: Path) -> None:
    for strength in (0.0, 0.7):
        result = CliRunner(catch_exceptions=False).invoke(
            main,
            [
                "generate",
                str(demo.MODEL),
                "-c",
                str(control_path),
                "--strength",
                str(strength),
                "--threads",
                "1",
                "-p",
                PROMPTS[0],
                "--temperature",
                "1",
                "--top-p",
                "0.9",
                "--seed",
                "7",
                "--max-tokens",
                "12",
            ],
        )
        completion = client.completions.create(
            model="demo", prompt=PROMPTS[0], seed=7, max_tokens=12, top_p=0.9, extra_body=steered(strength)
        )
        assert completion.choices[0].text == json.loads(result.stdout)["completion"]


def test_chat_is_the_models_own_framing_of_the_messages(client: openai.OpenAI, lone: Lone) -> None:
    turns = [(QUERIES[0], "Sure.")]
    messages = [
        {"role": "user", "content": QUERIES[0]},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": [{"type": "text", "text": QUERIES[1]}]},
    ]
    answer = client.chat.completions.create(
        model="demo",
        messages=messages,  # type: ignore[arg-type]
        seed=3,
        max_tokens=12,
        extra_body=steered(1),
    )
    expected = lone(TEMPLATES.conversation(turns, QUERIES[1]), 3, 1.0, stop=TEMPLATES.stop)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"


def test_streamed_pieces_add_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUERIES[0]}],
        "seed": 1,
        "max_tokens": 12,
    }
    whole = client.chat.completions.create(**asked, extra_body=steered(1))  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            **asked, stream=True, stream_options={"include_usage": True}, extra_body=steered(1)
        )
    )
    *first, last, usage = chunks
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in first) == whole.choices[0].message.content
    )
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_counts_the_tokens(client: openai.OpenAI, server: Server) -> None:
    completion = client.completions.create(
        model="demo", prompt=PROMPTS[:2], max_tokens=5, n=2, temperature=0, extra_body=steered(0)
    )
    n_prompt = sum(len(server.service.model.tokenize(prompt)) for prompt in PROMPTS[:2])
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == n_prompt
    assert completion.usage.completion_tokens <= 20
    assert completion.usage.total_tokens == n_prompt + completion.usage.completion_tokens
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]


def test_choices_take_consecutive_seeds(client: openai.OpenAI, lone: Lone) -> None:
    completion = client.completions.create(
        model="demo", prompt=PROMPTS[:2], seed=5, n=2, max_tokens=12, extra_body=steered(0.5)
    )
    expected = [lone(prompt, seed, 0.5) for prompt in PROMPTS[:2] for seed in (5, 6)]
    assert [choice.text for choice in completion.choices] == expected
    assert len(set(expected)) > 1


def test_prompts_can_be_tokens(client: openai.OpenAI, server: Server, lone: Lone) -> None:
    tokens = server.service.model.tokenize(PROMPTS[0])
    for prompt in (tokens, [tokens]):
        completion = client.completions.create(
            model="demo", prompt=prompt, seed=1, max_tokens=12, extra_body=steered(0)
        )
        assert completion.choices[0].text == lone(PROMPTS[0], 1)


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI, lone: Lone) -> None:
    whole = lone(PROMPTS[0], 2)
    stop = whole[len(whole) // 2 :][:3]
    for asked in (stop, [stop, "never in it"]):
        completion = client.completions.create(
            model="demo",
            prompt=PROMPTS[0],
            seed=2,
            max_tokens=12,
            stop=asked,
            logprobs=0,
            extra_body=steered(0),
        )
        choice = completion.choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert choice.logprobs is not None
        assert max(choice.logprobs.text_offset or [0]) <= len(choice.text)


def test_logprobs_are_those_of_the_steered_model(
    client: openai.OpenAI, controls: dict, server: Server
) -> None:  # type: ignore[type-arg]
    messages = [{"role": "user", "content": QUERIES[0]}]
    answer = client.chat.completions.create(
        model="demo",
        messages=messages,  # type: ignore[arg-type]
        seed=4,
        max_tokens=4,
        temperature=0.8,
        logprobs=True,
        top_logprobs=3,
        extra_body=steered(1),
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = b"".join(bytes(token.bytes or []) for token in logprobs.content).decode("utf-8", "replace")
    assert text == answer.choices[0].message.content
    with LlamaEngine(demo.MODEL, n_ctx=256, n_parallel=1, n_threads=1) as engine:
        engine.set_edits(controls["safe"].edits)
        prompt = ChatTemplate.of(engine.model).prompt([], QUERIES[0])
        (expected,) = engine.next_token_logprobs([prompt], strength=1.0)
    first = logprobs.content[0]
    assert [one.logprob for one in first.top_logprobs] == pytest.approx(
        sorted(expected, reverse=True)[:3], abs=1e-4
    )
    likeliest = server.service.model.piece(int(np.argmax(expected)))
    assert bytes(first.top_logprobs[0].bytes or []) == likeliest
    assert float(np.min(np.abs(expected - first.logprob))) < 1e-4


def test_completion_logprobs_have_the_offsets_of_their_tokens(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="demo", prompt=PROMPTS[0], seed=4, max_tokens=8, logprobs=2, extra_body=steered(0)
    )
    choice = completion.choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert len(tokens) == len(offsets) == len(choice.logprobs.token_logprobs or [])
    for token, offset in zip(tokens, offsets, strict=True):
        assert "\ufffd" in token or choice.text[offset:].startswith(token)
    assert all(len(best) in (1, 2) for best in choice.logprobs.top_logprobs or [])


def test_divergence_is_that_of_the_two_distributions(server: Server, controls: dict) -> None:  # type: ignore[type-arg]
    body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 6, "seed": 2}
    plain, twin = (
        httpx.post(
            f"{server.url}/v1/completions", json={**body, **steered(0.8, divergence=divergence)}, timeout=60
        ).json()["choices"][0]
        for divergence in (False, True)
    )
    assert twin["text"] == plain["text"]
    tokens = twin["divergence"]
    with LlamaEngine(demo.MODEL, n_ctx=256, n_parallel=1, n_threads=1) as engine:
        engine.set_edits(controls["safe"].edits)
        (base,), (moved,) = (
            list(engine.next_token_logprobs([PROMPTS[0]], strength)) for strength in (0.0, 0.8)
        )
    assert tokens[0]["kl"] == pytest.approx(float(np.sum(np.exp(base) * (base - moved))), rel=1e-3)
    assert len(tokens) == 6
    assert all(token["kl"] > 0 for token in tokens)
    unsteered = httpx.post(
        f"{server.url}/v1/completions", json={**body, **steered(0, divergence=True)}
    ).json()
    assert {token["kl"] for token in unsteered["choices"][0]["divergence"]} == {0.0}


def test_two_hundred_neighbours_of_mixed_strengths_get_what_a_lone_request_gets(
    server: Server, lone: Lone
) -> None:
    kinds = [
        {"strength": strength, "control": control, "scope": scope}
        for strength in (0.0, 0.4, 1.0, 1.7)
        for control in ("safe", "other")
        for scope in ("generation", "all")
    ]
    asked = [
        {"prompt": PROMPTS[index % len(PROMPTS)], "seed": index // 7, "kind": kinds[index % len(kinds)]}
        for index in range(200)
    ]

    async def ask_all() -> list[str]:
        async with server.async_client() as client:

            async def ask(prompt: str, seed: int, kind: dict[str, object]) -> str:
                completion = await client.completions.create(
                    model="demo", prompt=prompt, seed=seed, max_tokens=12, extra_body={"steering": kind}
                )
                return completion.choices[0].text

            return await asyncio.gather(*(ask(**one) for one in asked))  # type: ignore[arg-type]

    found = asyncio.run(ask_all())
    expected = [lone(one["prompt"], one["seed"], **one["kind"]) for one in asked]  # type: ignore[arg-type, misc]
    assert found == expected
    assert len(set(expected)) > 100
