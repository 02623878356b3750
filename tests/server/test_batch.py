"""The server computes requests together and prompts in chunks, as llama.cpp's contexts and batches show."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.gate import Gate
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.engines.llama.sequences import EXACT_CHUNK_TOKENS
from alignez_gguf.server.openai_schema import CollectedChoice, CompletionBody, SteeringFields
from alignez_gguf.server.service import Service
from tests.models import quantized, tiny_model
from tests.server.conftest import Lone

PROMPT = "Human: hi"
N_TOKENS = 12


def answers(service: Service, *asked: dict[str, Any]) -> list[CollectedChoice]:
    """The answers to requests that arrive at the same moment."""

    async def ask() -> list[CollectedChoice]:
        submitted = []
        for fields in asked:
            body = CompletionBody.model_validate({"model": service.name, **fields})
            steering = service.steering(body.steering)
            submitted.append(service.completion_requests(body, steering))
        with service.scheduler._changed:
            replies = [service.submit(jobs, "me") for jobs in submitted]
        return [choice for reply in replies for choice in await reply.collect()]

    return asyncio.run(ask())


def test_all_controls_share_a_context(
    controls: dict[str, ControlFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], llama.llama_init_from_model

    def counted(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(llama, "llama_init_from_model", counted)
    with Service(demo.MODEL, controls, n_ctx=256, n_parallel=2, n_threads=1):
        assert len(made) == 1


def test_answers_under_all_controls_are_decoded_in_one_batch(
    controls: dict[str, ControlFile], lone: Lone, batches: list[int]
) -> None:
    kinds = [
        SteeringFields(strength=strength, control=control)
        for control, strength in (("safe", 1.0), ("other", 0.6), ("safe", 0.4), ("other", 0.0))
    ]
    expected = [lone(PROMPT, seed, kind.strength, control=kind.control) for seed, kind in enumerate(kinds)]
    assert len(set(expected)) == len(kinds)
    asked = [
        {"prompt": PROMPT, "seed": seed, "max_tokens": N_TOKENS, "steering": kind.model_dump()}
        for seed, kind in enumerate(kinds)
    ]
    with Service(demo.MODEL, controls, n_ctx=256, n_parallel=16, n_threads=1) as service:
        batches.clear()
        choices = answers(service, *asked)
        assert [choice.text for choice in choices] == expected
        assert {choice.end.n_tokens for choice in choices if choice.end} == {N_TOKENS}
        assert len(batches) == len(kinds) + N_TOKENS - 1
        assert batches[len(kinds) :] == [len(kinds)] * (N_TOKENS - 1)


def test_sequence_that_changes_its_control_keeps_nothing_of_the_former(
    controls: dict[str, ControlFile], lone: Lone
) -> None:
    with Service(demo.MODEL, controls, n_ctx=256, n_parallel=2, n_threads=1) as service:
        for seed in range(3):
            for control, strength in (("safe", 1.0), ("other", 1.0), ("safe", 0.0), ("other", 0.5)):
                for divergence in (False, True):
                    steering = {"control": control, "strength": strength, "divergence": divergence}
                    asked = {"prompt": PROMPT, "seed": seed, "max_tokens": N_TOKENS, "steering": steering}
                    (choice,) = answers(service, asked)
                    assert choice.text == lone(PROMPT, seed, strength, control=control)


@pytest.mark.parametrize("divergence", [False, True])
def test_gate_decides_by_the_prompt_of_each_request(
    controls: dict[str, ControlFile], lone: Lone, divergence: bool
) -> None:
    prompts = [PROMPT, "Human: how are you"]
    tokens, weights = np.arange(20, dtype=np.int32), np.linspace(-1, 1, 20, dtype=np.float32)
    with LlamaEngine(demo.MODEL, n_threads=1) as engine:
        scores = [Gate(tokens, weights, 0.0).score(row) for row in engine.next_token_logprobs(prompts)]
    gated = replace(controls["safe"], gate=Gate(tokens, weights, sum(scores) / 2))
    opens = [score > sum(scores) / 2 for score in scores]
    assert set(opens) == {True, False}
    asked = [
        {
            "prompt": prompt,
            "seed": seed,
            "max_tokens": N_TOKENS,
            "steering": {"control": control, "strength": strength, "divergence": divergence},
        }
        for seed in range(2)
        for strength in (1.0, 0.0)
        for control in ("safe", "other")
        for prompt in prompts
    ]
    with Service(demo.MODEL, {**controls, "safe": gated}, n_ctx=256, n_parallel=16, n_threads=1) as service:
        choices = answers(service, *asked)
    for choice, one in zip(choices, asked, strict=True):
        steering = one["steering"]
        is_open = steering["control"] == "other" or opens[prompts.index(one["prompt"])]
        strength = steering["strength"] if is_open else 0.0
        assert choice.text == lone(one["prompt"], one["seed"], strength, control=steering["control"])
        assert choice.end is not None
        assert choice.end.steered == (strength > 0)


@pytest.mark.parametrize(
    ("file_type", "chunk", "step"), [("F32", 60, 2), ("Q8_0", 60, 2), ("Q4_K_M", 300, 1), ("Q4_0", 300, 1)]
)
def test_only_weights_that_can_be_exact_are_computed_so(
    file_type: str, chunk: int, step: int, batches: list[int]
) -> None:
    model: Path = tiny_model("llama", n_embd=256).gguf
    if file_type != "F32":
        model = quantized(model, file_type)
    with Service(model, {}, n_ctx=512, n_parallel=4, n_threads=1) as service:
        batches.clear()
        (choice,) = answers(service, {"prompt": [5] * 300, "max_tokens": 8, "temperature": 0})
        assert choice.end is not None
        n_steps = choice.end.n_tokens - (choice.end.finish_reason == "length")
        assert n_steps > 0
        assert batches == [chunk] * (300 // chunk) + [step] * n_steps


def test_long_chunks_of_prompts_do_not_hold_up_answers(batches: list[int]) -> None:
    model = quantized(tiny_model("llama", n_embd=256).gguf, "Q4_K_M")
    with Service(model, {}, n_ctx=512, n_parallel=4, n_threads=1) as service:
        batches.clear()
        prompts = [[token] * 300 for token in (5, 6, 7, 8)]
        answers(service, {"prompt": prompts, "max_tokens": 8, "temperature": 2, "seed": 0})
    between, steps = [0], [size <= 4 for size in batches]
    for size, is_step in zip(batches, steps, strict=True):
        between = [*between, 0] if is_step else [*between[:-1], between[-1] + size]
    assert max(between) <= max(300, 4 * EXACT_CHUNK_TOKENS)
