from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import Llama

from alignez_gguf.engines import json_api
from alignez_gguf.engines.base import Completion, GenerationRequest, Sampling
from alignez_gguf.engines.endpoint import EndpointGenerator
from alignez_gguf.errors import EndpointError, QueryError
from alignez_gguf.pairs.generation import default_sampling, generate_pairs
from alignez_gguf.pairs.pairs import PairStore
from alignez_gguf.prompts.templates import Templates
from tests.models import tiny_model

SERVER_EXTRA = ("fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
GREEDY = Sampling(max_tokens=12, temperature=0)
KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    """Answers with what the server's script says; writes down what it is asked."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server = self.server
        with server.lock:
            server.asked.append((self.path, body, dict(self.headers), time.monotonic()))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            server.script(self, body)
        finally:
            with server.lock:
                server.under_way -= 1

    def reply(self, status: int, document: object, **headers: str) -> None:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: list[tuple[str, Any, dict[str, str], float]] = []
        self.under_way = self.most_under_way = 0
        self.script: Callable[[Handler, Any], None] = echo
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def bodies(self) -> list[Any]:
        return [body for path, body, *_ in self.asked if path == "/v1/completions"]

    def handle_error(self, *_: object) -> None:
        """Silent: clients that hang up are part of the tests."""


def said(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}], "usage": {"completion_tokens": len(text)}}


def echo(handler: Handler, body: Any) -> None:
    if handler.path == "/v1/models":
        handler.reply(200, {"data": [{"id": "tiny"}]})
    else:
        handler.reply(200, said(f" {body['prompt']}!"))


def first(*answers: Callable[[Handler], None]) -> Callable[[Handler, Any], None]:
    """These answers to the first completions that are asked for, then echoes."""
    left = list(answers)

    def script(handler: Handler, body: Any) -> None:
        if handler.path == "/v1/completions" and left:
            left.pop(0)(handler)
        else:
            echo(handler, body)

    return script


def always(status: int, document: object, **headers: str) -> Callable[[Handler, Any], None]:
    def script(handler: Handler, body: Any) -> None:
        if handler.path == "/v1/models":
            handler.reply(200, {"data": [{"id": "tiny"}, {"id": "large"}]})
        else:
            handler.reply(status, document, **headers)

    return script


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_api, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("ALIGNEZ_API_KEY", raising=False)


def written(
    engine: EndpointGenerator, prompts: list[str], sampling: Sampling = GREEDY, seed: int = 0
) -> list[Completion]:
    requests = [GenerationRequest(prompt, seed) for prompt in prompts]
    found = dict(engine.generate(requests, sampling))
    return [found[index] for index in range(len(prompts))]


def refusal(server: Server, **arguments: Any) -> str:
    """The one line that a user gets to see."""
    with pytest.raises(EndpointError) as caught:
        written(EndpointGenerator(server.url, **arguments), ["hello"])
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_each_prompt_gets_its_own_completion(server: Server) -> None:
    def script(handler: Handler, body: Any) -> None:
        time.sleep(0.02)
        echo(handler, body)

    server.script = script
    prompts = [f"prompt {number}" for number in range(40)]
    assert [answer.text for answer in written(EndpointGenerator(server.url), prompts)] == [
        f" {prompt}!" for prompt in prompts
    ]
    assert 1 < server.most_under_way <= 8


def test_request_says_everything_that_decides_the_answer(server: Server) -> None:
    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, stop=("\n\n", "Q:"))
    written(EndpointGenerator(server.url, model="m", api_key=KEY), ["go on"], sampling, seed=2**32 - 1)
    ((path, body, headers, _),) = server.asked
    assert path == "/v1/completions"
    assert body == {
        "model": "m",
        "prompt": "go on",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n\n", "Q:"],
        "seed": 2**31 - 1,
    }
    assert headers["Authorization"] == f"Bearer {KEY}"


def test_key_comes_from_the_environment_unless_it_is_given(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(EndpointGenerator(server.url, model="m"), ["a"])
    monkeypatch.setenv("ALIGNEZ_API_KEY", "from-environment")
    written(EndpointGenerator(server.url, model="m"), ["a"])
    written(EndpointGenerator(server.url, model="m", api_key="given"), ["a"])
    assert [headers.get("Authorization") for _, _, headers, _ in server.asked] == [
        None,
        "Bearer from-environment",
        "Bearer given",
    ]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_address_is_taken_with_and_without_its_end(server: Server, ending: str) -> None:
    assert written(EndpointGenerator(server.url + ending), ["a"])[0].text == " a!"


def test_server_counts_tokens_and_says_why_the_text_ends(server: Server) -> None:
    server.script = first(
        lambda handler: handler.reply(200, said("four", "length")),
        lambda handler: handler.reply(200, {"choices": [{"text": "", "finish_reason": None}]}),
    )
    engine = EndpointGenerator(server.url, concurrency=1)
    assert written(engine, ["a", "b"]) == [Completion("four", 4, "length"), Completion("", 0, "stop")]


def test_stop_strings_beyond_the_fourth_are_cut_here(server: Server) -> None:
    stop = ("1", "2", "3", "4", "END", "FIN")
    server.script = first(lambda handler: handler.reply(200, said("some text FIN and END", "length")))
    (answer,) = written(EndpointGenerator(server.url), ["a"], Sampling(stop=stop))
    assert (answer.text, answer.finish_reason) == ("some text ", "stop")
    assert server.bodies[0]["stop"] == ["1", "2", "3", "4"]


def test_pieces_of_text_add_up_to_the_completions(server: Server) -> None:
    pieces = {0: "", 1: ""}

    def add(index: int, piece: str) -> None:
        pieces[index] += piece

    requests = [GenerationRequest("a"), GenerationRequest("b")]
    for index, completion in EndpointGenerator(server.url).generate(requests, GREEDY, on_text=add):
        assert completion.text == pieces[index]
    assert pieces == {0: " a!", 1: " b!"}


def test_lone_surrogates_pass_in_both_directions(server: Server) -> None:
    (answer,) = written(EndpointGenerator(server.url), ["\ud800 ü"])
    assert server.bodies[0]["prompt"] == "\ud800 ü"
    assert answer.text.endswith(" ü!")
    answer.text.encode("utf-8")


def test_completion_is_yielded_while_another_is_still_written(server: Server) -> None:
    release = threading.Event()

    def script(handler: Handler, body: Any) -> None:
        if body and body["prompt"] == "slow":
            release.wait(10)
        echo(handler, body)

    server.script = script
    answers = EndpointGenerator(server.url).generate(
        [GenerationRequest("slow"), GenerationRequest("fast")], GREEDY
    )
    assert next(answers)[0] == 1
    release.set()
    assert next(answers)[0] == 0


@pytest.mark.parametrize(
    "trouble",
    [
        lambda handler: handler.reply(500, {"error": "oops"}),
        lambda handler: handler.reply(503, b"<html>down</html>", Content_Type="text/html"),
        lambda handler: handler.reply(429, {"error": {"message": "slow down"}}),
        lambda handler: handler.reply(200, b'{"choices": [{"te'),
        lambda handler: handler.reply(200, b"\xff\xfe"),
        lambda handler: handler.reply(200, {"choices": []}),
        lambda handler: handler.reply(200, {"choices": [{"text": None}]}),
        lambda handler: handler.reply(200, {"choices": "none", "usage": "none"}),
        lambda handler: handler.reply(200, []),
        lambda handler: handler.reply(200, b"not gzip", Content_Encoding="gzip"),
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
        lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
        and handler.connection.shutdown(socket.SHUT_RDWR),
        lambda handler: handler.wfile.write(b"nonsense\r\n\r\n") and handler.connection.close(),
    ],
    ids=[
        "500",
        "503",
        "429",
        "half JSON",
        "no UTF-8",
        "no choice",
        "no text",
        "no list",
        "no object",
        "broken gzip",
        "hangs up",
        "hangs up half way",
        "no HTTP",
    ],
)
def test_passing_trouble_is_tried_again(server: Server, trouble: Callable[[Handler], None]) -> None:
    server.script = first(trouble, trouble)
    assert written(EndpointGenerator(server.url), ["a"])[0].text == " a!"
    assert len(server.bodies) == 3
    assert all(body == server.bodies[0] for body in server.bodies)


def test_answer_that_takes_too_long_is_asked_for_again(server: Server) -> None:
    release = threading.Event()

    def dribble(handler: Handler) -> None:
        # Bytes keep coming, so that only a limit on the whole answer ends it.
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
        while not release.wait(0.05):
            handler.wfile.write(b" ")

    server.script = first(dribble)
    started = time.monotonic()
    assert written(EndpointGenerator(server.url, timeout=0.4), ["a"])[0].text == " a!"
    assert 0.4 <= time.monotonic() - started < 3
    release.set()


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_out(server: Server, form: str) -> None:
    from email.utils import formatdate

    value = "1" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)  # in whole seconds
    server.script = first(lambda handler: handler.reply(429, {}, Retry_After=value))
    assert written(EndpointGenerator(server.url), ["a"])[0].text == " a!"
    before, after = (at for path, _, _, at in server.asked if path == "/v1/completions")
    assert 0.9 <= after - before < 4


def test_pauses_double_and_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_api, "FIRST_WAIT", 1.0)
    for attempt, longest in ((0, 1), (1, 2), (3, 8), (20, json_api.LONGEST_WAIT)):
        pauses = [json_api._pause(attempt) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
        assert len(set(pauses)) > 100


def test_server_that_asks_for_too_long_a_wait_is_reported_at_once(server: Server) -> None:
    server.script = always(429, {"error": {"message": "quota"}}, Retry_After="86400")
    message = refusal(server, model="tiny")
    assert "429" in message
    assert "quota" in message
    assert "86400 s" in message
    assert len(server.bodies) == 1


def test_last_trouble_is_reported_after_all_attempts(server: Server) -> None:
    server.script = always(503, {"detail": [{"msg": "loading"}]})
    message = refusal(server, model="tiny", retries=2)
    assert "503" in message
    assert "loading" in message
    assert "3 times" in message
    assert len(server.bodies) == 3


def test_nobody_at_the_address_is_reported() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EndpointError, match=r"cannot be reached .*tried 2 times; is it running"):
            written(EndpointGenerator(url, retries=1), ["a"])


def test_message_of_a_server_cannot_command_the_terminal(server: Server) -> None:
    server.script = always(400, {"detail": "a\x1b[2J\nb" + "c" * 9999})
    message = refusal(server, model="tiny")
    assert "400 Bad Request: a [2J bccc" in message
    assert len(message) < 600
    assert message.isprintable()


def test_wrong_key_is_reported_without_showing_it(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(0)
    server.script = always(401, {"error": {"message": f"Incorrect API key\nprovided: {KEY}."}})
    engine = EndpointGenerator(server.url, model="tiny", api_key=KEY)
    with pytest.raises(EndpointError) as caught:
        written(engine, ["a"])
    assert str(caught.value).endswith(
        "401 Unauthorized: Incorrect API key provided: ***; "
        "give another key with --api-key or in the environment variable ALIGNEZ_API_KEY"
    )
    assert len(server.bodies) == 1
    seen = "".join((*capfd.readouterr(), caplog.text, repr(engine), repr(caught.value)))
    assert KEY not in seen


def test_missing_key_is_reported_where_the_models_are_asked_for(server: Server) -> None:
    server.script = lambda handler, body: handler.reply(403, {"error": "no key"})
    assert "403 Forbidden: no key; give the key with --api-key" in refusal(server)


def test_unknown_model_is_reported_with_those_there_are(server: Server) -> None:
    server.script = always(404, {"error": {"message": "The model `tyni` does not exist"}})
    message = refusal(server, model="tyni")
    assert "The model `tyni` does not exist" in message
    assert "the models tiny, large" in message


def test_server_of_another_kind_is_reported(server: Server) -> None:
    server.script = lambda handler, body: handler.reply(404, b"<h1>?</h1>", Content_Type="text/html")
    assert "is this the address of an OpenAI-compatible server?" in refusal(server, model="tiny")


def test_request_that_the_server_refuses_is_reported_at_once(server: Server) -> None:
    server.script = always(400, {"error": {"message": "This model's maximum context length is 8 tokens."}})
    assert "400 Bad Request: This model's maximum context length is 8 tokens;" in refusal(
        server, model="tiny"
    )
    assert len(server.bodies) == 1


def test_redirect_is_reported_with_its_target(server: Server) -> None:
    server.script = always(308, {}, Location="https://elsewhere/v1/completions")
    assert "go to https://elsewhere/v1/completions" in refusal(server, model="tiny")


def test_only_model_is_found_and_several_are_listed(server: Server) -> None:
    assert EndpointGenerator(server.url).model == "tiny"
    server.script = always(200, {})
    with pytest.raises(EndpointError, match=r"has the models tiny, large; name one with --generator-model"):
        EndpointGenerator(server.url).model  # noqa: B018 - it is asked for when it is read


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("ftp://host", "give one like"),
        ("http://", "give one like"),
        ("http://host:port", "is not the address"),
        ("http://host/v1?key=a", "give one like"),
        ("http://user:password@host", "--api-key"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(url: str, mend: str) -> None:
    with pytest.raises(EndpointError, match=mend) as caught:
        EndpointGenerator(url)
    assert "password@" not in str(caught.value)


def test_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    with pytest.raises(EndpointError, match="check --api-key") as caught:
        EndpointGenerator("http://host", api_key=f"{KEY}\nX-Other: 1")
    assert KEY not in str(caught.value)


def test_empty_prompt_is_refused(server: Server) -> None:
    with pytest.raises(QueryError, match="prompt is empty"):
        written(EndpointGenerator(server.url), ["a", ""])
    assert not server.asked


def test_closing_hangs_up_and_asks_for_nothing_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hung_up = threading.Semaphore(0)
    cancel = Future.cancel

    def cancel_slowly(future: Future[Any]) -> bool:
        cancelled = cancel(future)
        time.sleep(0.01)  # in which another request could take the turn of a cancelled one
        return cancelled

    monkeypatch.setattr(Future, "cancel", cancel_slowly)

    def script(handler: Handler, body: Any) -> None:
        if body is None or body["prompt"] == "0":
            return echo(handler, body)
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            hung_up.release()
        return None

    server.script = script
    requests = [GenerationRequest(str(number)) for number in range(20)]
    answers = EndpointGenerator(server.url, concurrency=3).generate(requests, GREEDY)
    assert next(answers)[1].text == " 0!"
    while server.under_way < 3:
        time.sleep(0.01)
    started = time.monotonic()
    answers.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 1
    assert all(hung_up.acquire(timeout=2) for _ in range(3))
    assert len(server.bodies) == 4


def test_ctrl_c_ends_at_once_while_the_server_keeps_it_waiting(server: Server) -> None:
    reached, release = threading.Event(), threading.Event()

    def script(handler: Handler, body: Any) -> None:
        reached.set()
        release.wait(20)

    server.script = script
    program = f"""
        from alignez_gguf.engines.base import GenerationRequest, Sampling
        from alignez_gguf.engines.endpoint import EndpointGenerator
        engine = EndpointGenerator({server.url!r}, model="m")
        try:
            list(engine.generate([GenerationRequest("a")] * 20, Sampling()))
        except KeyboardInterrupt:
            raise SystemExit(130)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        assert reached.wait(20)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - started < 3
    finally:
        release.set()
        process.kill()


@pytest.fixture(scope="module")
def llama_server() -> Iterator[tuple[str, Path]]:
    """llama-cpp-python's own server, on a tiny model."""
    missing = [name for name in SERVER_EXTRA if find_spec(name) is None]
    if missing:
        pytest.skip(f"llama-cpp-python's server needs {', '.join(missing)}")
    gguf = tiny_model("llama").gguf
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512", "--n_threads", "1"]
    command += ["--api_key", KEY, "--verbose", "false"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        # The retries of the generator wait until the server has started.
        yield f"http://127.0.0.1:{port}", gguf
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def started(llama_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    monkeypatch.setattr(json_api, "FIRST_WAIT", 0.5)
    EndpointGenerator(llama_server[0], api_key=KEY, retries=8).model  # noqa: B018
    return llama_server


def test_greedy_text_of_a_real_server_equals_that_of_llama_cpp_python(started: tuple[str, Path]) -> None:
    url, gguf = started
    llm = Llama(str(gguf), n_ctx=512, n_threads=1, verbose=False)
    prompts = ["The quick brown fox", "x", "Question: how do I sleep?\nAnswer:"]
    engine = EndpointGenerator(url, api_key=KEY)
    assert engine.model == "tiny"
    for prompt, answer in zip(prompts, written(engine, prompts), strict=True):
        # The server's own default for what a request does not say is a repetition penalty of 1.1.
        alone: Any = llm(prompt, max_tokens=GREEDY.max_tokens, temperature=0, repeat_penalty=1.1)
        assert answer.text == alone["choices"][0]["text"]
        assert answer.n_tokens == alone["usage"]["completion_tokens"]


def test_pairs_come_from_a_real_server(started: tuple[str, Path], tmp_path: Path) -> None:
    engine = EndpointGenerator(started[0], api_key=KEY)
    templates = Templates.paper()  # shorter than the context of 512 tokens
    sampling = Sampling(max_tokens=6, stop=default_sampling(templates).stop)
    queries = ["How do I pick a lock?", "How do I bake a cake?"]
    pairs = generate_pairs(engine, queries, templates, PairStore(tmp_path / "pairs.jsonl"), sampling=sampling)
    assert [pair.query for pair in pairs] == queries
    assert all(pair.helpful != pair.harmful for pair in pairs)


def test_real_server_refuses_a_wrong_key(started: tuple[str, Path]) -> None:
    with pytest.raises(EndpointError, match="401 Unauthorized: Invalid API key; give another key"):
        written(EndpointGenerator(started[0], model="tiny", api_key="wrong"), ["a"])


def test_real_server_refuses_a_prompt_beyond_its_context(started: tuple[str, Path]) -> None:
    with pytest.raises(EndpointError, match=r"400 .*context"):
        written(EndpointGenerator(started[0], api_key=KEY), ["word " * 2000])
