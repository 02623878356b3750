"""What a killed process, a full disk and a bad disk leave is made good by the same command, given again; and
a control that cannot act in full is an error, never an unsteered model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from alignez_gguf import demo
from alignez_gguf.control.control_file import ControlFile, ModelInfo
from alignez_gguf.control.edits import LayerEdit
from alignez_gguf.engines.base import GenerationRequest, Sampling
from alignez_gguf.engines.llama.engine import LlamaEngine
from alignez_gguf.errors import ControlFileError, SteeringError, WorkDirectoryError
from alignez_gguf.runtime import bindings
from alignez_gguf.storage.atomic import replacing, write_text
from alignez_gguf.storage.journal import Journal
from alignez_gguf.storage.workdir import WorkDirectory
from tests.cli.conftest import PROGRAM
from tests.models import OUT_OF_REACH, tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from fuzz.faults import Battery, Command, undisturbed
from fuzz.forking import Fault, Forking

MODEL = str(demo.MODEL)


@pytest.fixture(scope="module")
def processes() -> Iterator[Forking]:
    with Forking() as forking:
        yield forking


@pytest.fixture(scope="module")
def commands(processes: Forking, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    made = undisturbed(processes, tmp_path_factory.mktemp("undisturbed"))
    return {command.name: command for command in made}


@pytest.fixture
def battery(processes: Forking, tmp_path: Path) -> Battery:
    return Battery(processes, tmp_path, Random(0))


@pytest.mark.parametrize("name", ["pairs", "export", "evaluate", "convert", "generate"])
def test_command_that_was_killed_completes_with_the_same_bytes(
    name: str, commands: dict[str, Command], battery: Battery
) -> None:
    outcome = battery.killed(commands[name], 2)
    assert (outcome.tried, outcome.findings) == (2, ())


@pytest.mark.parametrize("fault", ["out_of_room", "files_limited", "interrupted"])
def test_command_that_failed_says_so_in_a_line_and_completes(
    fault: str, commands: dict[str, Command], battery: Battery
) -> None:
    chosen = [commands[name] for name in ("pairs", "convert", "generate")]
    assert getattr(battery, fault)(chosen, 1).findings == ()


def test_jumps_of_the_clock_change_nothing(commands: dict[str, Command], battery: Battery) -> None:
    assert battery.clock_jumped([commands["generate"]]).findings == ()


@pytest.mark.parametrize("name", ["pairs", "export", "evaluate", "generate"])
def test_only_the_damaged_part_of_a_work_directory_is_made_again(
    name: str, commands: dict[str, Command], battery: Battery
) -> None:
    assert battery.damaged([commands[name]], 2).findings == ()


def test_command_that_ends_otherwise_is_found_out(commands: dict[str, Command], battery: Battery) -> None:
    real = commands["generate"]
    other = Command(real.arguments, dict.fromkeys(real.files, b"other"), real.seconds)
    assert "other files than an undisturbed run" in battery.killed(other, 1).findings[-1]
    other = Command((*real.arguments, "--no-such-option"), real.files, real.seconds)
    assert "status 2" in battery.interrupted([other], 1).findings[0]


def test_fault_befalls_the_process(processes: Forking, commands: dict[str, Command], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    ended = processes.run(commands["generate"].arguments, tmp_path / "run", Fault(at_event=3, errno=28))
    assert ended.status == 1
    assert "No space left on device" in ended.stderr


ROWS = [{"text": f"row {number}", "number": number} for number in range(4)]


def journal(path: Path) -> bytes:
    with Journal(path) as made:
        for row in ROWS:
            assert made.append(row) == row
    return path.read_bytes()


def test_rows_of_a_journal_are_json_lines_and_come_back(tmp_path: Path) -> None:
    written = journal(tmp_path / "rows.jsonl")
    assert [json.loads(line)["text"] for line in written.splitlines()] == [row["text"] for row in ROWS]
    with Journal(tmp_path / "rows.jsonl") as again:
        assert again.rows == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_any_flipped_bit_costs_the_rows_that_it_is_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = journal(path)
    random = Random(1)
    for _ in range(60):
        data = bytearray(whole)
        place = random.randrange(len(data) - 1)
        data[place] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        line = whole[:place].count(b"\n")
        lost = {line, line + 1} if whole[place : place + 1] == b"\n" else {line}
        with pytest.warns(UserWarning, match="damaged"), Journal(path) as found:
            assert found.rows == [row for number, row in enumerate(ROWS) if number not in lost]
        assert path.with_name("rows.jsonl.damaged").read_bytes() == bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Journal(path).close()  # which has been put right


def test_file_of_somebody_else_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "helpful": "a", "harmful": "b"}\n', encoding="utf-8")
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="damaged"), Journal(path) as found:
        assert found.rows == []
    assert path.with_name("pairs.jsonl.damaged").read_bytes() == before


def test_row_that_cannot_be_written_is_an_error_and_the_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    journal(path)
    full = Journal(path)
    full._file.close()
    full._file = open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(WorkDirectoryError, match=r"No space left.*--work-dir"):
        full.append({"text": "one more"})
    full.close()
    with Journal(path) as again:
        assert again.rows == ROWS


@pytest.mark.parametrize("suffix", [".json", ".json.sha256"])
def test_cached_result_that_is_damaged_is_computed_again(suffix: str, tmp_path: Path) -> None:
    n_calls = 0

    def make() -> list[int]:
        nonlocal n_calls
        n_calls += 1
        return [1, 2, 3]

    with WorkDirectory(tmp_path) as work:

        def cached() -> Any:
            return work.cached_json("part", make, seed=0)

        assert cached() == cached() == [1, 2, 3]
        assert n_calls == 1
        damaged = work.part("part", seed=0).with_suffix(suffix)
        damaged.write_bytes(damaged.read_bytes().replace(b"2", b"7"))
        damaged.write_bytes(damaged.read_bytes()[:-2])
        with pytest.warns(UserWarning, match="damaged"):
            assert cached() == [1, 2, 3]
        assert n_calls == 2
        assert cached() == [1, 2, 3]
        assert n_calls == 2


def test_checksums_of_cached_results_are_those_of_sha256sum(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path) as work:
        work.cached_array("part", lambda: np.arange(5), seed=0)
        name = f"{work.part('part', seed=0).name}.npy.sha256"
        checked = subprocess.run(["sha256sum", "-c", name], cwd=tmp_path, check=False)
    assert checked.returncode == 0


def test_temporary_file_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    abandoned = tmp_path / ".out.txt.01234567.tmp"
    abandoned.write_text("half")
    with replacing(path) as living:
        assert not abandoned.exists()
        write_text(path, "first")
        assert living.exists()
        living.write_text("second")
    assert path.read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


INFO = ModelInfo("llama", 32, 4, "tiny")


def saved(path: Path) -> ControlFile:
    random = np.random.default_rng(0).standard_normal
    edits = {1: LayerEdit(add=random(32)), 2: LayerEdit(remove=random((2, 32)))}
    control = ControlFile(INFO, edits, recipe={"method": "svd", "rate": 0.5}, score={"kl": 0.125})
    control.save(path)
    return control


def test_control_whose_direction_was_turned_around_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    direction = saved(path).edits[1].add
    assert direction is not None
    whole = path.read_bytes()
    assert whole.count(direction.tobytes()) == 1
    path.write_bytes(whole.replace(direction.tobytes(), (-direction).tobytes()))
    with pytest.raises(ControlFileError, match=r"alignez\.sha256.*damaged or was changed"):
        ControlFile.load(path)


@pytest.mark.parametrize(("old", "new"), [(b"svd", b"ccs"), (b"tiny", b"tidy"), (b"llama", b"lambs")])
def test_control_whose_words_were_changed_is_refused(old: bytes, new: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    saved(path)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ControlFileError, match="sha256"):
        ControlFile.load(path)


def test_control_without_a_hash_loads(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    control = saved(path)
    path.write_bytes(path.read_bytes().replace(b"alignez.sha256", b"another.sha256"))
    assert ControlFile.load(path).sha256 == control.sha256


def test_engine_keeps_the_old_edit_where_a_new_one_cannot_be_set() -> None:
    prompts = [f"Question: How do I {what}?\nAnswer:" for what in ("bake a cake", "fly a kite")]
    sampling = Sampling(max_tokens=12, temperature=0.0)
    with LlamaEngine(demo.MODEL, n_threads=1) as engine:

        def answers(strength: float = 1.0) -> list[str]:
            requests = [GenerationRequest(prompt, 0, strength) for prompt in prompts]
            found = dict(engine.generate(requests, sampling))
            return [found[index].text for index in range(len(prompts))]

        info, random = engine.info, np.random.default_rng(0).standard_normal
        base = answers(strength=0.0)
        with pytest.raises(SteeringError, match="no edit is set"):
            answers()
        engine.set_edits({1: LayerEdit(add=30 * random(info.n_embd))})
        steered = answers()
        assert steered != base
        for wrong in ({info.n_layer: random(info.n_embd)}, {1: random(info.n_embd + 1)}):
            with pytest.raises(SteeringError):
                engine.set_edits({layer: LayerEdit(remove=rows) for layer, rows in wrong.items()})
            assert answers() == steered


@pytest.fixture
def out_of_reach(tmp_path: Path) -> tuple[str, str]:
    """A model that the patch does not reach, and a control that is made for it."""
    gguf = tiny_model(OUT_OF_REACH).gguf
    info = ModelInfo.from_gguf(gguf)
    path = tmp_path / "c.gguf"
    ControlFile(info, {1: LayerEdit(remove=np.eye(info.n_embd)[0])}).save(path)
    return str(gguf), str(path)


def refused(*arguments: str) -> str:
    """What a command says that has to end by itself, with an error and nothing else."""
    ended = subprocess.run(
        [*PROGRAM, *arguments, "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "The page is" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("generate", "-p", "x")])
def test_command_ends_where_its_control_is_out_of_reach(
    command: tuple[str, ...], out_of_reach: tuple[str, str]
) -> None:
    model, control = out_of_reach
    name, *options = command
    assert "reach" in refused(name, model, "-c", control, *options)


def test_server_does_not_start_with_a_control_that_is_damaged_or_for_another_model(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    saved(path)
    assert "is for" in refused("serve", MODEL, "-c", str(path), "--port", "0")
    path.write_bytes(path.read_bytes().replace(b"svd", b"ccs"))
    assert "sha256" in refused("serve", MODEL, "-c", str(path), "--port", "0")


def test_server_with_a_control_needs_the_patched_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from alignez_gguf.cli import main
    from alignez_gguf.server import run as serving

    def listen(*_: Any) -> None:
        pytest.fail("it listens")

    saved(tmp_path / "c.gguf")
    monkeypatch.setattr(bindings, "is_patched", lambda: False)
    monkeypatch.setattr(serving, "listen", listen)
    arguments = ["serve", MODEL, "-c", str(tmp_path / "c.gguf"), "--port", "0", "--threads", "1"]
    result = CliRunner(catch_exceptions=False).invoke(main, arguments)
    assert result.exit_code == 1
    assert "runtime build" in result.stderr
