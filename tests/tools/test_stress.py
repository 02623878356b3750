"""The tool that tries to break things: what it tries, and that it notices what breaks."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from alignez_gguf.control.control_file import ControlFile

ROOT = Path(__file__).parents[2]

STAND_IN = """
import os, signal, struct, sys, time
model, file, every = sys.argv[1:]
number = 0
while head := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(struct.unpack("<I", head)[0])
    status, checksum, cpu_us, peak = 0, 0, 10, 100
    {behaviour}
    sys.stdout.buffer.write(struct.pack("<IIQQ", status, checksum, cpu_us, peak))
    sys.stdout.buffer.flush()
    number += 1
{end}
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def seeds() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield module("fuzz.corpus").corpus()
    sys.path.remove(str(ROOT / "tools"))


class TestMutation:
    def test_the_corpus_is_read_by_the_package_and_by_the_gguf_library(
        self, seeds: Any, tmp_path: Path
    ) -> None:
        for number, seed in enumerate(seeds):
            path = tmp_path / f"{number}.gguf"
            path.write_bytes(seed.data)
            assert ControlFile.load(path).edits
            read = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
            assert {tensor.name.decode(): tensor.data for tensor in seed.tensors} == read

    def test_parts_put_together_are_the_file_that_they_were_taken_from(self, seeds: Any) -> None:
        encode = module("fuzz.corpus").encode
        assert all(encode(seed.metadata, seed.tensors) == seed.data for seed in seeds)

    def test_a_number_always_makes_the_same_file_and_another_seed_other_ones(self, seeds: Any) -> None:
        mutated = module("fuzz.mutation").mutated
        files = [mutated(seeds, 0, number) for number in range(300)]
        assert files == [mutated(seeds, 0, number) for number in range(300)]
        assert len(set(files)) > 250
        assert len({*files, *(mutated(seeds, 1, number) for number in range(300))}) > 500

    def test_the_kinds_of_damage_that_matter_are_among_the_first_files(self, seeds: Any) -> None:
        mutated = module("fuzz.mutation").mutated
        files = [mutated(seeds, 0, number) for number in range(3000)]
        original = {seed.data for seed in seeds}
        counts = [struct.unpack_from("<QQ", data, 8) for data in files if len(data) >= 24]
        assert any(data in seed.data and data not in original for data in files for seed in seeds)
        assert any(n_tensors > 2**62 for n_tensors, _ in counts)
        assert any(n_keys > 2**62 for _, n_keys in counts)
        assert any(struct.pack("<f", np.nan) in data for data in files)
        assert any(data.count(b"direction.1") > 1 for data in files)
        assert any(b"projection." * 500 in data for data in files)


def run_stand_in(tmp_path: Path, behaviour: str, end: str = "", inputs: int = 40) -> Any:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.format(behaviour=behaviour, end=end), encoding="utf-8")
    scale = module("fuzz").Scale(inputs=inputs, kills=0, requests=0, cycles=0)
    command = [sys.executable, str(program)]
    return module("fuzz.loader").run(command, scale, tmp_path, tmp_path / "model.gguf")


class TestLoader:
    def test_every_file_reaches_the_program_and_a_good_one_has_no_findings(self, tmp_path: Path) -> None:
        outcome = run_stand_in(tmp_path, f"open({str(tmp_path / 'seen')!r}, 'ab').write(head + data)")
        seeds, mutated = module("fuzz.corpus").corpus(), module("fuzz.mutation").mutated
        files = [mutated(seeds, 0, number) for number in range(40)]
        assert (tmp_path / "seen").read_bytes() == b"".join(struct.pack("<I", len(d)) + d for d in files)
        assert (outcome.tried, outcome.findings) == (40, ())

    @pytest.mark.parametrize(
        ("behaviour", "said"),
        [
            ("data.count(b'') and len(data) % 7 == 0 and os.abort()", "died: -6"),
            (
                "if number == 3: print('x.c:7: GGML_ASSERT(y) failed', file=sys.stderr); os._exit(1)",
                "GGML_ASSERT(y)",
            ),
            ("if number == 3: os.kill(os.getpid(), signal.SIGPROF)", "still at work"),
            ("status = 4 if number == 3 else 0", "not as wide"),
            ("status = 5 if number == 3 else 0", "without a reason"),
            ("status = 6 if number == 3 else 0", "not what it was"),
            ("peak = 10**7 if number == 3 else 0", "more than 4x the file"),
        ],
    )
    def test_what_goes_wrong_with_a_file_is_a_finding_and_the_others_are_still_tried(
        self, tmp_path: Path, behaviour: str, said: str
    ) -> None:
        outcome = run_stand_in(tmp_path, behaviour)
        assert outcome.tried == 40
        assert len(outcome.findings) == 1
        assert said in outcome.findings[0]
        kept = next(tmp_path.glob("loader-*.gguf"))
        assert kept.name in outcome.findings[0]
        number = int(kept.stem.removeprefix("loader-"))
        seeds = module("fuzz.corpus").corpus()
        assert kept.read_bytes() == module("fuzz.mutation").mutated(seeds, 0, number)

    def test_vectors_that_are_not_those_of_the_file_are_a_finding(self, tmp_path: Path) -> None:
        outcome = run_stand_in(tmp_path, "status, checksum = 1, 12345", inputs=600)
        assert outcome.findings[0].startswith("loaded other vectors than the file holds")

    def test_a_complaint_at_the_end_is_a_finding(self, tmp_path: Path) -> None:
        end = "print('SUMMARY: AddressSanitizer: 8 byte(s) leaked', file=sys.stderr); sys.exit(23)"
        outcome = run_stand_in(tmp_path, "pass", end)
        assert outcome.findings == ("died: SUMMARY: AddressSanitizer: 8 byte(s) leaked",)


class TestSetAndClear:
    def test_the_installed_library_keeps_its_memory_and_its_answers(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        from alignez_gguf.runtime import bindings

        if not bindings.is_patched():
            pytest.skip("the installed llama-cpp-python lacks the patch")
        model = module("fuzz.tiny_model").tiny_model(tmp_path)
        outcome = module("fuzz.sanitizers").installed(200, model)
        assert (outcome.tried, outcome.findings) == (200, ())

    def test_an_answer_that_depends_on_an_edit_that_was_refused_is_a_finding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("llama_cpp")
        from alignez_gguf.runtime import bindings

        monkeypatch.setattr(bindings, "set_edits", lambda *_: None)
        monkeypatch.setattr(bindings, "set_strength", lambda *_: None)
        model = module("fuzz.tiny_model").tiny_model(tmp_path)
        findings = " ".join(module("fuzz.sanitizers").installed(200, model).findings)
        assert "strength 0.5 is not what it says" in findings
        assert "a layer that the model has not" in findings


def outcomes() -> list[Any]:
    outcome = module("fuzz").Outcome
    return [
        outcome("files, reader", 1000, ("it crashed",), "slowest 0.1 s"),
        outcome("kills, export", 5, kind="faults"),
    ]


class TestTool:
    def test_the_json_counts_inputs_faults_and_findings(self) -> None:
        found = module("fuzz.report").as_json(outcomes())
        assert json.loads(json.dumps(found)) == {
            "inputs": {"files, reader": 1000},
            "faults": {"kills, export": 5},
            "findings": 1,
        }

    def test_the_table_takes_the_place_of_the_last_one_in_the_document(self, tmp_path: Path) -> None:
        report = module("fuzz.report")
        document = tmp_path / "reliability.md"
        document.write_text("before\n<!-- stress -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
        for _ in range(2):
            report.write(document, outcomes(), seconds=120, seed=3)
        text = document.read_text(encoding="utf-8")
        assert text.startswith("before\n<!-- stress -->\n20")
        assert text.endswith("| kills, export | 5 | 0 |  |\n<!-- end -->\nafter\n")
        assert text.count("| files, reader | 1,000 | 1 | slowest 0.1 s |") == 1
        assert "old" not in text

    def test_the_project_has_a_place_for_the_table(self) -> None:
        assert module("fuzz.report").has_place(ROOT / "docs" / "reliability.md")

    def test_a_stress_that_cannot_run_is_a_finding_and_the_tool_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stress = module("fuzz.stress")
        monkeypatch.setattr(stress, "STRESSES", ("missing",))
        monkeypatch.setattr(sys, "argv", ["stress.py", "--short", "--json"])
        assert stress.main() == 1
        last = capsys.readouterr().out.splitlines()[-1]
        assert json.loads(last) == {"inputs": {"missing": 0}, "faults": {}, "findings": 1}
