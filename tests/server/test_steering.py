"""How the default is changed, and what a server tells of its controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.gate import Gate
from alignez_gguf.errors import SteeringError
from alignez_gguf.server.controls import Controls
from alignez_gguf.server.service import Service
from tests.server.client import Server, serving
from tests.server.conftest import Lone, Serve


def text(client: openai.OpenAI, **steering: object) -> str:
    extra = {"steering": steering} if steering else {}
    completion = client.completions.create(
        model="demo", prompt="Human: hi", seed=0, max_tokens=12, extra_body=extra
    )
    return completion.choices[0].text


def test_default_is_read_and_changed_in_part(serve: Serve, lone: Lone) -> None:
    with serve() as server, server.client() as client:
        url = f"{server.url}/v1/steering"
        default = httpx.get(url).json()
        assert (default["control"], default["strength"], default["scope"]) == ("safe", 1.0, "generation")
        assert text(client) == lone("Human: hi", strength=1.0)

        changed = httpx.put(url, json={"strength": 0.5, "control": "other"}).json()
        assert changed == httpx.get(url).json()
        assert (changed["control"], changed["strength"], changed["scope"]) == ("other", 0.5, "generation")
        assert text(client) == lone("Human: hi", strength=0.5, control="other")

        httpx.put(url, json={"scope": "all"})
        assert text(client) == lone("Human: hi", strength=0.5, control="other", scope="all")
        assert text(client, strength=0) == lone("Human: hi")


@pytest.mark.parametrize(
    "body",
    [
        {"strength": -1},
        {"scope": "x"},
        {"control": "x"},
        {"control": "other", "strength": 0.3, "scope": "x"},
        {"control": "x", "strength": 0.3, "scope": "all"},
        {"control": "other", "scope": "all", "strength": 1e9},
        {"control": "other", "nonsense": 1},
        [],
    ],
)
def test_default_that_is_not_valid_leaves_the_former_one_in_force(
    server: Server, client: openai.OpenAI, lone: Lone, body: object
) -> None:
    url = f"{server.url}/v1/steering"
    before = httpx.get(url).json()
    response = httpx.put(url, json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(url).json() == before
    assert text(client) == lone("Human: hi", strength=1.0)


def test_profile_names_every_layer_and_what_is_done_there(server: Server) -> None:
    controls = httpx.get(f"{server.url}/v1/steering").json()["controls"]
    assert [control["name"] for control in controls] == ["safe", "other"]
    layers = controls[0]["layers"]
    assert [layer["layer"] for layer in layers] == list(range(server.service.model.info.n_layer))
    assert [layer["decision"] for layer in layers][:4] == ["none", "remove", "add", "none"]
    assert (layers[1]["rank"], layers[1]["scale"]) == (1, 0.0)
    assert layers[2]["scale"] > 0


def test_answers_say_how_they_were_steered(server: Server) -> None:
    body = {
        "model": "demo",
        "prompt": "x",
        "max_tokens": 1,
        "steering": {"strength": 0.25, "scope": "first:2"},
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert answer["steering"] == {"control": "safe", "strength": 0.25, "scope": "first:2"}


def test_server_without_a_control_answers_unsteered_only(lone: Lone) -> None:
    with pytest.raises(SteeringError, match="no control file to steer with"):
        Controls({}, 1.0, "all").choose(strength=0.5)
    assert Controls({}, 1.0, "all").choose().strength == 0


def test_control_brings_the_scope_that_it_was_chosen_for(controls: dict) -> None:  # type: ignore[type-arg]
    from dataclasses import replace

    chosen_for = {"first": replace(controls["safe"], recipe={"scope": "first:3"}), "plain": controls["other"]}
    found = Controls(chosen_for, 1.0, None)
    assert str(found.choose().scope) == "first:3"
    assert str(found.choose(control="plain").scope) == "generation"
    found.set_default(scope="all")
    assert str(found.choose(control="first").scope) == "all"


def test_control_of_another_model_is_refused_before_anything_is_served(controls: dict) -> None:  # type: ignore[type-arg]
    from dataclasses import replace

    from alignez_gguf.errors import ControlFileError

    foreign = replace(controls["safe"], model=replace(controls["safe"].model, arch="gpt2"))
    with pytest.raises(ControlFileError):
        Service(demo.MODEL, {"foreign": foreign}, n_ctx=256, n_parallel=2, n_threads=1)


@pytest.mark.parametrize(("threshold", "is_open"), [(-1.0, True), (1.0, False)])
def test_finished_choices_say_whether_the_gate_opened(
    controls: dict[str, ControlFile], threshold: float, is_open: bool
) -> None:
    weightless = Gate(np.arange(3, dtype=np.int32), np.zeros(3, np.float32), threshold)
    gated = {"safe": replace(controls["safe"], gate=weightless), "other": controls["other"]}
    service = Service(demo.MODEL, gated, n_ctx=256, n_parallel=2, n_threads=1)
    with serving(service) as server, server.client() as client:

        def choices(stream: bool, control: str) -> list[Any]:
            found = client.completions.create(
                model="demo",
                prompt="Human: hi",
                max_tokens=3,
                stream=stream,
                extra_body={"steering": {"control": control}},
            )
            return [one.choices[0] for one in (found if stream else [found])]

        for stream in (False, True):
            *growing, last = choices(stream, "safe")
            assert last.steered is is_open
            assert not any("steered" in one.model_dump() for one in growing)
            assert not any("steered" in one.model_dump() for one in choices(stream, "other"))
        told = {one["name"]: one["gate"] for one in httpx.get(f"{server.url}/v1/steering").json()["controls"]}
        assert told == {"safe": True, "other": False}
