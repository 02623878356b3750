"""The bench gives every figure that it promises, and each is what the timings say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from benchmarks import (  # noqa: E402
    bed,
    bench,
    ccs,
    end_to_end,
    figures,
    forms,
    generation,
    growth,
    programs,
    reading,
    report,
    steering,
    switching,
    timing,
)
from benchmarks.figures import Measured  # noqa: E402
from benchmarks.make_bench_model import Shape, make  # noqa: E402
from benchmarks.setting import SLACK, Setting, texts  # noqa: E402

from alignez_gguf.control.model_info import ModelInfo  # noqa: E402
from alignez_gguf.directions import probe_training  # noqa: E402
from alignez_gguf.runtime.model import Model  # noqa: E402

SHAPE = Shape(2, 256, 512, 4, 2, n_vocab=512)
BED = bed.Sizes(n_before=4, n_prefill=16, run_seconds=0.0, least_tokens=3, most_tokens=3)
CONTRACT = {
    "steering": {"decode_ratio", "prefill_ratio", "rank4_decode_ratio", "noise"},
    "generation": {"vs_loop", "vs_batched_bench"},
    "reading": {"vs_prefill", "vs_cvector_generator", "vs_repeng"},
    "ccs": {"seconds", "vs_loop"},
    "end_to_end": {"minutes", "extra_mb"},
}
ABOUT = {"device": "cpu", "processor": "1 thread of a machine", "model": "2x256", "date": "2000-01-01"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    cache = ROOT / ".cache" / "test-models" / "bench"
    return Setting(
        model=make(SHAPE, "Q8_0", cache),
        cache=cache,
        repeats=1,
        pairs=3,
        n_threads=1,
        n_gpu_layers=0,
        llama_bin=tmp_path_factory.mktemp("nothing"),
        n_queries=8,
    )


@pytest.fixture
def llama_bin(tmp_path: Path) -> Path:
    """Programs that print what llama.cpp's would, after a time that is known."""
    script(
        tmp_path / programs.BATCHED_BENCH,
        'import sys; print("version: 1 (fake)", file=sys.stderr); print(\'{"t": 0.5}\')',
    )
    script(
        tmp_path / programs.CVECTOR_GENERATOR,
        "import sys, time\n"
        'print("version: 2 (fake)", file=sys.stderr)\n'
        'print("n_total_tokens: 64")\n'
        "time.sleep(1)\n"
        'print("Done evaluate prompts, unload model...")',
    )
    return tmp_path


def script(path: Path, code: str) -> None:
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)


def test_ratio_is_the_median_of_side_by_side_ratios_with_quartiles() -> None:
    found = figures.ratio("a over b", [2.0, 8.0, 3.0, 20.0, 5.0], [1.0, 2.0, 1.0, 4.0, 5.0])
    assert (found.value, found.low, found.high) == (3.0, 2.0, 4.0)  # of 2, 4, 3, 5, 1


def test_a_single_run_has_no_spread() -> None:
    found = figures.quantity("one", [7.0], " s")
    assert (found.value, found.low, found.high) == (7.0, None, None)


def test_runs_alternate_so_that_a_drift_hits_both() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    first, second = timing.alternated(lambda: run("a"), lambda: run("b"), 4)
    assert "".join(order) == "abbaabba"
    assert (first, second) == ([1, 4, 5, 8], [2, 3, 6, 7])


def test_steps_are_done_in_turns_within_a_run() -> None:
    order: list[str] = []
    first, second = timing.in_turns(
        lambda step: order.append(f"a{step}"), lambda step: order.append(f"b{step}"), 3
    )
    assert "".join(order) == "a0b0b1a1a2b2"
    assert first > 0
    assert second > 0


def test_cost_of_a_form_shows_in_its_ratio(setting: Setting) -> None:
    class Slow(forms.NoEdit):
        def before_token(self) -> None:
            time.sleep(0.02)

    with (
        Model(setting.model) as model,
        bed.Bed(model, setting, BED) as base,
        bed.Bed(model, setting, BED) as other,
    ):
        without, with_form = bed.Pair(base, other, setting.pairs).decode(Slow())
    assert len(without) == len(with_form) == setting.pairs
    differences = [b - a for a, b in zip(without, with_form, strict=True)]
    assert max(differences) > 0.8 * BED.least_tokens * 0.02


def test_steering_has_a_figure_for_every_form(setting: Setting) -> None:
    found = steering.measure(setting, BED).figures
    assert CONTRACT["steering"] <= found.keys()
    for form in ("lora", "control_vector", "merged"):
        assert {f"{form}_decode_ratio", f"{form}_prefill_ratio"} <= found.keys()
    others = {"generation_prefill_ratio", "changing_strength_ratio", "prefill_noise"}
    others |= {"side_by_side_ratio", "side_by_side_steering_ratio", "loaded_for_many_prefill_ratio"}
    assert others <= found.keys()
    assert all(figure.value is not None and figure.value > 0 for figure in found.values())


def test_generation_is_held_against_what_batched_bench_says(setting: Setting, llama_bin: Path) -> None:
    sizes = generation.Sizes(n_parallel=4, n_shared=8, n_prompt=12, n_answer=8, looped=1)
    measured = generation.measure(replace(setting, llama_bin=llama_bin), sizes)
    found = {key: figure.value or 0.0 for key, figure in measured.figures.items()}
    assert CONTRACT["generation"] <= found.keys()
    limit = 4 * 8 / 0.5
    assert found["vs_batched_bench"] == pytest.approx(found["tokens_per_second"] / limit)
    assert found["vs_loop"] > 0
    assert measured.anchors[programs.BATCHED_BENCH] == "1 (fake)"


def test_reading_is_held_against_the_time_between_what_cvector_generator_prints(
    setting: Setting, llama_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = [(3.0, "loading"), (10.0, "n_total_tokens: 64"), (10.5, "Done evaluate prompts"), (20.0, "PCA")]
    monkeypatch.setattr(programs, "_timed_lines", lambda _: printed)
    program = programs.find(replace(setting, llama_bin=llama_bin), programs.CVECTOR_GENERATOR)
    assert program is not None
    assert programs.cvector_generator(program, ["a", "b"]) == 64 / 0.5


def test_lines_are_timed_when_a_program_prints_them(llama_bin: Path) -> None:
    lines = programs._timed_lines([str(llama_bin / programs.CVECTOR_GENERATOR)])
    assert [line for _, line in lines] == ["n_total_tokens: 64", "Done evaluate prompts, unload model..."]
    assert lines[1][0] - lines[0][0] > 0.3  # a pipe would give both at once


def test_program_that_fails_is_named(setting: Setting, tmp_path: Path) -> None:
    script(tmp_path / programs.BATCHED_BENCH, 'import sys; sys.exit("no such model")')
    program = programs.find(replace(setting, llama_bin=tmp_path), programs.BATCHED_BENCH)
    assert program is not None
    with pytest.raises(programs.ProgramError, match=r"batched-bench ended with 1: no such model"):
        programs.batched_bench(program, 8, 8, 2)


def test_what_is_not_built_or_not_installed_is_null(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_there(*_: object) -> None:
        raise reading.RepengError("not here")

    monkeypatch.setattr(reading.Repeng, "fastest", not_there)
    found = {
        "reading": reading.measure(setting, reading.Sizes(n_prompts=4, n_tokens=16)),
        "generation": generation.measure(setting, generation.Sizes(2, 4, 8, 4, 1)),
    }
    assert CONTRACT["reading"] <= found["reading"].figures.keys()
    values = report.as_json(found, ABOUT)
    assert values["reading"]["vs_cvector_generator"] is None
    assert values["reading"]["vs_repeng"] is None
    assert values["reading"]["vs_prefill"] > 0
    assert values["generation"]["vs_batched_bench"] is None
    assert "not built" in report.as_text(found)


def test_ccs_and_its_loop_are_timed_on_the_same_task(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignez_gguf.directions.ccs import RESTARTS

    monkeypatch.setattr(ccs, "_reference_probe", lambda *_: 0.01)
    monkeypatch.setattr(probe_training, "EPOCHS", 20)
    found = ccs.measure(setting, ccs.Sizes(n_layer=2, n_pairs=16, n_embd=32, sampled_layers=1)).figures
    assert CONTRACT["ccs"] <= found.keys()
    taken = found["seconds"].value or 0.0
    assert found["vs_loop"].value == pytest.approx(0.01 * 2 * RESTARTS / taken)


def test_export_is_measured_with_its_stages_and_memory(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(
        tmp_path / "child.py",
        "import sys, time\n"
        "time.sleep(0.1)\n"
        "print('generating pairs: 1.5 s\\n5 of 8 pairs are of use', file=sys.stderr)\n"
        "print('trying edits (all): 0.5 s\\nfitting directions (svd): 0.0 s', file=sys.stderr)\n"
        "print(f'peak memory: {2 if \"paper\" in sys.argv else 3}000000 bytes', file=sys.stderr)",
    )
    monkeypatch.setattr(end_to_end, "_CHILD", tmp_path / "child.py")
    found = {key: figure.value or 0.0 for key, figure in end_to_end.measure(setting).figures.items()}
    assert CONTRACT["end_to_end"] <= found.keys()
    assert found["seconds: generating pairs"] == 3.0
    assert found["seconds: trying edits (all)"] == 1.0
    assert "seconds: fitting directions (svd)" not in found
    assert found["minutes"] >= 2 * 0.1 / 60
    assert found["minutes"] == pytest.approx(found["paper_minutes"] + found["auto_minutes"])
    assert found["extra_mb"] == pytest.approx(3 - setting.model.stat().st_size / 1e6)


def test_export_that_fails_is_an_error(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "child.py", "import sys; sys.exit('peak memory: 1 bytes\\nError: the disk is full')")
    monkeypatch.setattr(end_to_end, "_CHILD", tmp_path / "child.py")
    with pytest.raises(end_to_end.ExportError, match="the disk is full"):
        end_to_end.measure(setting)


def test_peak_memory_is_that_of_the_child_alone() -> None:
    held_here = bytearray(b"x") * 400_000_000
    code = (
        "from benchmarks.export_child import peak_bytes; "
        "h = bytearray(b'x') * 200_000_000; print(peak_bytes())"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert 200_000_000 <= int(done.stdout) < len(held_here)


def test_child_of_the_export_is_the_command_line() -> None:
    command = [sys.executable, str(end_to_end._CHILD), "--version"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "alignez-gguf" in done.stdout
    assert done.stderr.startswith("peak memory: ")


def test_switches_are_timed_apart_from_the_token_after_them(setting: Setting) -> None:
    measured = switching.measure(setting, switching.Sizes(n_prompt=12))
    values = report.as_json({"switching": measured}, ABOUT)
    assert values["switch_ms"] > 0
    assert values["switching"]["strength_ms"] > 0
    assert {"first_token_ratio", "after_strength_ratio", "after_file_ratio", "noise"} <= values[
        "switching"
    ].keys()


def test_first_tokens_after_a_change_and_of_an_unsteered_request_take_one_token(
    setting: Setting, tmp_path: Path
) -> None:
    controls = switching.two_controls(ModelInfo.from_gguf(setting.model), tmp_path)
    with closing(setting.open_llama()) as llm:
        computed: list[int] = []
        evaluate = llm.eval
        llm.eval = lambda tokens: (computed.append(len(tokens)), evaluate(tokens))[1]  # type: ignore[method-assign]
        switches = switching.Switches(llm, controls, [llm.tokenize(b"one two three")], 1)
        for first_token in (switches.unsteered, switches.after_strength, switches.after_file):
            first_token()
            assert computed[-1] == 1, first_token.__name__


def test_growth_is_one_where_time_follows_the_line_and_more_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growth, "seconds", lambda work: work())
    linear = growth.against_line("fit_pairs", lambda factor: lambda: 3.0 * factor, 3)
    square = growth.against_line("fit_pairs", lambda factor: lambda: 3.0 * factor**2, 3)
    assert [figure.value for figure in linear.values()] == [1, 1, 1]
    assert {name: figure.value for name, figure in square.items()} == {
        "fit_pairs_2x": 2,
        "fit_pairs_4x": 4,
        "fit_pairs_8x": 8,
    }


def test_growth_covers_queries_pairs_and_layers(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "FACTORS", (1, 2))
    monkeypatch.setattr(probe_training, "EPOCHS", 20)
    sizes = growth.Sizes(
        replace(SHAPE, n_layer=1),
        n_generated=2,
        n_read=2,
        n_selected=2,
        n_fitted=8,
        n_tokens=8,
        n_shared=4,
        n_answer=2,
    )
    found = growth.measure(setting, sizes).figures
    assert {name.split("_")[1] for name in found} == {"queries", "pairs", "layers"}
    assert all(figure.value is not None and figure.value > 0 for figure in found.values())


def test_json_is_one_object_with_plain_numbers() -> None:
    figure = figures.Figure("a", 1.23456789, 1.0, 2.0)
    found = {
        "steering": Measured({"noise": figure}, {"torch": "2"}),
        "switching": Measured({"switch_ms": figure}),
    }
    values = json.loads(json.dumps(report.as_json(found, ABOUT)))
    assert values["steering"] == {"noise": 1.2346}
    assert values["switch_ms"] == 1.2346
    assert values["spread"]["steering"] == {"noise": [1.0, 2.0]}
    assert values["anchors"]["steering"] == {"torch": "2"}


def test_table_takes_its_place_in_a_document_and_leaves_the_rest(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- ccs on cpu -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    found = {
        "ccs": Measured({"seconds": figures.Figure("a fit", 2.5, unit=" s", bound=30.0)}, {"torch": "2"})
    }
    for _ in range(2):  # again, what it wrote goes
        report.write(document, found, ABOUT)
        lines = document.read_text().splitlines()
        assert lines[:2] == ["before", "<!-- ccs on cpu -->"]
        assert "| `seconds` | a fit | 2.500 s |  | <= 30 |" in lines
        assert lines[-3].startswith("2000-01-01, 1 thread of a machine, 2x256; torch 2")
        assert lines[-2:] == ["<!-- end -->", "after <!-- end -->"]
        assert "old" not in lines


@pytest.mark.parametrize("device", ["cpu", "cpu with amx"])
def test_document_has_a_place_for_every_measurement(device: str, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text((ROOT / "docs" / "performance.md").read_text())
    report.require_places(document, bench.MEASUREMENTS, device)
    for name in bench.MEASUREMENTS:
        report.write(document, {name: Measured({})}, ABOUT | {"device": device})
    with pytest.raises(report.NoPlaceError, match="steering on abacus"):
        report.write(document, {"steering": Measured({})}, ABOUT | {"device": "abacus"})


def test_document_without_a_place_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(report.NoPlaceError, match=r"missing\.md cannot be read"):
        report.require_places(tmp_path / "missing.md", ["ccs"], "cpu")
    document = tmp_path / "performance.md"
    document.write_text("<!-- ccs on cpu -->\n<!-- end -->\n")
    report.require_places(document, ["ccs"], "cpu")
    with pytest.raises(report.NoPlaceError, match="growth on cpu"):
        report.require_places(document, ["ccs", "growth"], "cpu")


def test_bench_names_the_missing_document_first(setting: Setting, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["bench.py", "--only", "ccs", "--model", str(setting.model), "--write", "no-such.md"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", options)
        with pytest.raises(SystemExit, match=r"Error: no-such\.md cannot be read"):
            bench.main()
    assert "measuring" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def model(setting: Setting) -> Iterator[Model]:
    with Model(setting.model) as model:
        yield model


def test_texts_differ_have_the_length_and_share_their_beginning(model: Model) -> None:
    tokens = [model.tokenize(text) for text in texts(model.tokenize, 6, 48, n_shared=24)]
    assert all(48 <= len(one) < 48 + SLACK for one in tokens)
    assert len(set(map(tuple, tokens))) == 6
    assert len({tuple(one[:24]) for one in tokens}) == 1
    apart = [model.tokenize(text) for text in texts(model.tokenize, 6, 48)]
    assert len({tuple(one[:8]) for one in apart}) == 6


def test_bench_model_reads_what_it_wrote_in_about_as_many_tokens(model: Model) -> None:
    import random

    written = random.Random(0).choices(range(300, model.n_vocab), k=500)
    assert 0.8 * 500 < len(model.tokenize(model.detokenize(written))) < 1.25 * 500
