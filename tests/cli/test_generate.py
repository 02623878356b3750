from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile
from alignez_gguf.control.gate import Gate
from alignez_gguf.demo import eval_queries
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.prompts.templates import Templates
from tests.cli.conftest import Run

PLAIN = Templates.from_file(demo.TEMPLATES).plain_prompt
PROMPTS = [PLAIN(row.query) for row in eval_queries()[:6]]
SHORT = ("--max-tokens", "12", "--quiet")


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def prompt_options(prompts: list[str]) -> list[str]:
    return [argument for prompt in prompts for argument in ("-p", prompt)]


@pytest.fixture
def base(run: Run, model: str) -> list[str]:
    """Greedy completions of `PROMPTS` by the base model."""
    return [row["completion"] for row in rows(run("generate", model, *SHORT, *prompt_options(PROMPTS)))]


def test_prompts_on_the_command_line_come_back_in_order(run: Run, model: str) -> None:
    found = rows(run("generate", model, *SHORT, *prompt_options(PROMPTS)))
    assert [set(row) for row in found] == [{"prompt", "completion"}] * len(PROMPTS)
    assert [row["prompt"] for row in found] == PROMPTS
    assert len({row["completion"] for row in found}) > 1


def test_greedy_completions_do_not_depend_on_how_many_grow_at_once(
    run: Run, model: str, control: str, base: list[str]
) -> None:
    asked = prompt_options(PROMPTS)
    for options in ((), ("-c", control)):
        outputs = {
            run("generate", model, *SHORT, *asked, *options, "--parallel", parallel).stdout
            for parallel in ("1", "4", "32")
        }
        assert len(outputs) == 1


@pytest.mark.parametrize(("options", "n_parallel"), [((), 6), (("--compare",), 12), (("--parallel", "4"), 4)])
def test_engine_is_made_for_no_more_texts_than_there_are(
    run: Run,
    model: str,
    control: str,
    options: tuple[str, ...],
    n_parallel: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Watched(LlamaEngine):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            made.append(self.n_parallel)

    monkeypatch.setattr("alignez_gguf.engines.llama.engine.LlamaEngine", Watched)
    rows(run("generate", model, "-c", control, *SHORT, *prompt_options(PROMPTS), *options))
    assert made == [n_parallel]


@pytest.mark.parametrize("name", ["prompts.txt", "-"])
def test_text_has_a_prompt_a_line(run: Run, model: str, tmp_path: Path, base: list[str], name: str) -> None:
    one_line = [prompt.replace("\n", " ") for prompt in PROMPTS]
    text = "\ufeff" + "\r\n\n".join(one_line)
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8", newline="")
    found = rows(run("generate", model, *SHORT, "--prompts", name, stdin=text.encode()))
    assert [row["prompt"] for row in found] == one_line


def test_jsonl_rows_keep_their_fields(run: Run, model: str, tmp_path: Path, base: list[str]) -> None:
    given = [
        {"id": index, "prompt": prompt, "tags": ["größer", None], "base": "old", "sample": 7}
        for index, prompt in enumerate(PROMPTS)
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in given)
    (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
    found = rows(run("generate", model, *SHORT, "--prompts", "prompts.jsonl"))
    assert found == [{**row, "completion": text} for row, text in zip(given, base, strict=True)]


TABLES = {
    "p.JSONL": lambda rows: "".join(json.dumps(row) + "\r" for row in rows).encode(),
    "p.ndjson": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "p.jsonl.txt": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "p.jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "p.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "-": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "p.csv": lambda rows: b"id;prompt\r\n" + "".join(_csv_row(row, ";") for row in rows).encode(),
    "p.tsv": lambda rows: b"id\tprompt\n" + "".join(_csv_row(row, "\t") for row in rows).encode("utf-8"),
}


def _csv_row(row: dict[str, str], delimiter: str) -> str:
    return f"{row['id']}{delimiter}" + '"{}"\r\n'.format(row["prompt"].replace('"', '""'))


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_every_form_of_table_keep_their_fields(
    run: Run, model: str, tmp_path: Path, base: list[str], name: str
) -> None:
    given = [{"id": str(index), "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    data = TABLES[name](given)
    (tmp_path / name).write_bytes(data)
    found = rows(run("generate", model, *SHORT, "--prompts", name, stdin=data))
    assert found == [{**row, "completion": text} for row, text in zip(given, base, strict=True)]


def test_rows_of_parquet_keep_values_that_json_has_not_as_text(
    run: Run, model: str, tmp_path: Path, base: list[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"prompt": PROMPTS[:1], "day": [date(2024, 2, 29)], "tags": [["a", None]]}
    parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    (row,) = rows(run("generate", model, *SHORT, "--prompts", "p.parquet"))
    assert row == {"prompt": PROMPTS[0], "day": "2024-02-29", "tags": ["a", None], "completion": base[0]}


def test_lines_of_prompts_are_cut_at_line_ends_only_and_empty_ones_left_out(
    run: Run, model: str, tmp_path: Path
) -> None:
    given = ["How can I write\u2028a song?", "How can I flood\x0ca tunnel?", "How can I\x85fly?", " indented"]
    text = "\u200b\r" + "\r\n\ufeff\n".join(given)
    (tmp_path / "p.txt").write_text(text, encoding="utf-8", newline="")
    result = run("generate", model, *SHORT, "--prompts", "p.txt")
    assert [json.loads(line)["prompt"] for line in result.stdout.split("\n")[:-1]] == given


def test_prompts_of_published_sets_are_generated_from(run: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,label\nKill a process,safe\nPick a lock,unsafe\n")
    found = rows(run("generate", model, *SHORT, "--prompts", "xstest=x.csv"))
    assert [row["prompt"] for row in found] == ["Kill a process", "Pick a lock"]


@pytest.mark.parametrize(
    ("field", "options"), [("completion", ()), ("base", ("--compare",)), ("sample", ("--n", "2"))]
)
def test_field_that_would_be_overwritten_is_refused_by_its_name(
    run: Run, refused: Any, model: str, control: str, tmp_path: Path, field: str, options: tuple[str, ...]
) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "x"}}\n{{"prompt": "x", "{field}": "old"}}\n')
    (tmp_path / "p.csv").write_text(f"prompt,{field}\nx,old\n")
    for name in ("p.jsonl", "p.csv"):
        line = refused("generate", model, *SHORT, "-c", control, "--prompts", name, *options, "-o", "out")
        assert f"{name}, line 2 has a field `{field}`" in line
        assert "rename it" in line
    if options:  # without it, nothing is overwritten
        found = rows(run("generate", model, *SHORT, "-c", control, "--prompts", "p.csv"))
        assert found[0][field] == "old"


def test_output_file_holds_what_would_be_printed(run: Run, model: str, tmp_path: Path) -> None:
    printed = run("generate", model, *SHORT, "-p", PROMPTS[0])
    written = run("generate", model, *SHORT, "-p", PROMPTS[0], "-o", "out.jsonl")
    assert written.stdout == "out.jsonl\n"
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == printed.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_chat_puts_each_prompt_into_the_models_framing(run: Run, model: str, base: list[str]) -> None:
    queries = [row.query for row in eval_queries()[: len(PROMPTS)]]
    found = rows(run("generate", model, *SHORT, "--chat", *prompt_options(queries)))
    assert [row["prompt"] for row in found] == queries
    assert [row["completion"] for row in found] == [text.split("\n")[0] for text in base]


def test_templates_decide_the_framing(run: Run, model: str, tmp_path: Path, base: list[str]) -> None:
    text = demo.TEMPLATES.read_text(encoding="utf-8")
    framed = text.replace('plain = "Human', 'plain = "{few_shot}Human')
    (tmp_path / "mine.toml").write_text(framed.replace('few_shot = ""', 'few_shot = "Hi\\n"'), "utf-8")
    query = eval_queries()[0].query
    chat = rows(run("generate", model, *SHORT, "--chat", "--templates", "mine.toml", "-p", query))
    plain = rows(run("generate", model, *SHORT, "--stop", "\n", "-p", f"Hi\n{PROMPTS[0]}"))
    assert chat[0]["completion"] == plain[0]["completion"]


def test_stop_string_ends_a_completion(run: Run, model: str, base: list[str]) -> None:
    stop = base[0][3:6]
    found = rows(run("generate", model, *SHORT, "--stop", stop, "-p", PROMPTS[0]))
    assert found[0]["completion"] == base[0][: base[0].index(stop)]


def test_control_changes_the_completions(run: Run, model: str, control: str, base: list[str]) -> None:
    asked = ("generate", model, *SHORT, "-c", control, *prompt_options(PROMPTS))
    steered = [row["completion"] for row in rows(run(*asked))]
    half = [row["completion"] for row in rows(run(*asked, "--strength", "0.5"))]
    assert steered != base
    assert half != steered


def test_strength_zero_equals_no_control_byte_for_byte(run: Run, model: str, control: str) -> None:
    for sampling in (("--temperature", "0"), ("--temperature", "1", "--seed", "3")):
        asked = ("generate", model, *SHORT, *sampling, *prompt_options(PROMPTS))
        plain = run(*asked).stdout_bytes
        assert plain
        for scope in ("generation", "all", "first:2"):
            off = run(*asked, "-c", control, "--strength", "0", "--scope", scope)
            assert off.stdout_bytes == plain


def test_scope_decides_which_tokens_are_steered(run: Run, model: str, control: str) -> None:
    drawn = ("--temperature", "1", "--strength", "0.3")
    asked = ("generate", model, *SHORT, *drawn, "-c", control, *prompt_options(PROMPTS), "--scope")
    outputs = [run(*asked, scope).stdout for scope in ("generation", "all", "first:1", "first:12")]
    assert len({*outputs[:3]}) == 3
    assert outputs[3] == outputs[0]


def test_seed_decides_drawn_completions(run: Run, model: str) -> None:
    asked = ("generate", model, *SHORT, "--temperature", "1", *prompt_options(PROMPTS), "--seed")
    zero, again, one = (run(*asked, seed).stdout for seed in ("0", "0", "1"))
    assert zero == again != one


def test_progress_goes_to_standard_error_unless_quiet(run: Run, model: str) -> None:
    asked = ("generate", model, "--max-tokens", "2", "-p", "x")
    assert "generating" in run(*asked).stderr
    assert run(*asked, "--quiet").stderr == ""


def test_text_that_is_not_unicode_is_completed_with_replacements(
    run: Run, model: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\ud800", "id": "\\ud800"}', encoding="utf-8")
    expected = rows(run("generate", model, *SHORT, "-p", "a?"))[0]["completion"]
    for source in (("--prompts", "prompts.jsonl"), ("-p", "a\udcff")):
        (row,) = rows(run("generate", model, *SHORT, *source))
        assert (row["prompt"], row["completion"]) == ("a?", expected)


def test_control_made_from_another_file_of_this_shape_warns_in_one_line(
    run: Run, model: str, control: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    from alignez_gguf.control.control_file import ControlFile

    loaded = ControlFile.load(control)
    ControlFile(replace(loaded.model, fingerprint="0" * 64), loaded.edits).save(tmp_path / "other.gguf")
    result = run("generate", model, *SHORT, "-p", "x", "-c", "other.gguf")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: the control file was made from another file of this shape")
    assert result.stderr.count("\n") == 1


def test_compare_adds_what_the_base_model_says(run: Run, model: str, control: str, base: list[str]) -> None:
    asked = ("generate", model, *SHORT, "-c", control, *prompt_options(PROMPTS), "--strength", "0.5")
    steered = rows(run(*asked))
    both = rows(run(*asked, "--compare"))
    assert both == [{**row, "base": text} for row, text in zip(steered, base, strict=True)]
    assert [row["completion"] for row in both] != base


def test_samples_of_a_prompt_are_rows_of_their_own_seed(run: Run, model: str, tmp_path: Path) -> None:
    drawn = ("--temperature", "1", "--seed", "3")
    found = rows(run("generate", model, *SHORT, *drawn, *prompt_options(PROMPTS[:2]), "--n", "3"))
    assert [(row["prompt"], row["sample"]) for row in found] == [
        (prompt, sample) for prompt in PROMPTS[:2] for sample in range(3)
    ]
    repeated = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    alone = rows(run("generate", model, *SHORT, *drawn, *prompt_options(repeated)))
    assert [row["completion"] for row in found] == [row["completion"] for row in alone]
    assert len({row["completion"] for row in found}) > 2


def test_interrupted_run_goes_on_where_it_stopped(
    run: Run, model: str, control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", model, "--max-tokens", "12", "-c", control, "--compare", *prompt_options(PROMPTS))
    expected = run(*asked, "--quiet").stdout
    generate, n_asked = LlamaEngine.generate, list[int]()

    def interrupted(self: LlamaEngine, requests: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        n_asked.append(len(requests))
        for number, found in enumerate(generate(self, requests, *arguments, **options)):
            if len(n_asked) == 1 and number == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(LlamaEngine, "generate", interrupted)
    stopped = run(*asked, "-o", "out.jsonl")
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert "the same command goes on" in stopped.stderr.splitlines()[-1]
    (store,) = (tmp_path / "out.jsonl.work").glob("*.jsonl")
    store.write_bytes(
        store.read_bytes() + b'{"index": 3, "te'
    )  # as a crash in the middle of a line leaves it

    assert run(*asked, "-o", "out.jsonl").exit_code == 0
    assert n_asked == [12, 7]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == expected
    assert not (tmp_path / "out.jsonl.work").exists()


def test_kept_work_serves_the_same_job_only(run: Run, model: str, tmp_path: Path) -> None:
    asked = ("generate", model, *SHORT, *prompt_options(PROMPTS), "--work-dir", "work", "-o")
    assert run(*asked, "one.jsonl").exit_code == run(*asked, "two.jsonl").exit_code == 0
    assert len(list((tmp_path / "work").glob("*.jsonl"))) == 1
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert run(*asked, "three.jsonl", "--temperature", "1").exit_code == 0
    assert len(list((tmp_path / "work").glob("*.jsonl"))) == 2


def test_compare_without_a_control_is_refused(refused: Any, model: str) -> None:
    assert "-c FILE" in refused("generate", model, "-p", "x", "--compare", exit_code=2)


def test_gate_of_the_control_decides_row_by_row_and_says_so(
    run: Run, model: str, control: str, base: list[str], tmp_path: Path
) -> None:
    asked = prompt_options(PROMPTS)
    steered = [row["completion"] for row in rows(run("generate", model, *SHORT, "-c", control, *asked))]
    tokens, weights = np.arange(20, dtype=np.int32), np.linspace(-1, 1, 20, dtype=np.float32)
    with LlamaEngine(demo.MODEL) as engine:
        scores = [Gate(tokens, weights, 0.0).score(row) for row in engine.next_token_logprobs(PROMPTS)]
    threshold = float(np.median(scores))
    gated = replace(ControlFile.load(control), gate=Gate(tokens, weights, threshold))
    gated.save(tmp_path / "gated.gguf")
    found = rows(run("generate", model, *SHORT, "-c", str(tmp_path / "gated.gguf"), *asked))
    opens = [score > threshold for score in scores]
    assert set(opens) == {True, False}
    assert [row["steered"] for row in found] == opens
    for row, is_open, ours, theirs in zip(found, opens, steered, base, strict=True):
        assert row["completion"] == (ours if is_open else theirs)

    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "steered": 1}) + "\n")
    given = ("--prompts", str(tmp_path / "in.jsonl"))
    refused = run("generate", model, *SHORT, "-c", str(tmp_path / "gated.gguf"), *given)
    assert refused.exit_code == 1
    assert "a row has a field `steered`" in refused.stderr
    assert run("generate", model, *SHORT, "-c", control, *given).exit_code == 0
