from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignez_gguf import demo
from alignez_gguf.pairs.pairs import PairStore, load_pairs
from tests.cli.conftest import Run

QUICK = ("--max-tokens", "12")


def test_pairs_are_written_in_the_order_of_the_queries(
    run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    result = run("pairs", model, "-q", queries, "-o", "pairs.jsonl", *QUICK)
    assert (result.exit_code, result.stdout) == (0, "pairs.jsonl\n")
    assert "generating pairs" in result.stderr
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert [pair.query for pair in pairs] == Path(queries).read_text(encoding="utf-8").splitlines()
    assert all(pair.helpful_characteristics and pair.harmful_characteristics for pair in pairs)
    assert sum(pair.helpful != pair.harmful for pair in pairs) > len(pairs) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_seed_decides_the_pairs_and_the_number_at_once_does_not(
    run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    def written(*options: str) -> bytes:
        result = run("pairs", model, "-q", queries, "-o", "pairs.jsonl", *QUICK, "--quiet", *options)
        assert (result.exit_code, result.stderr) == (0, "")
        return (tmp_path / "pairs.jsonl").read_bytes()

    first = written()
    assert written("--parallel", "3") == first
    assert written("--seed", "1") != first


def test_work_directory_that_is_named_is_kept_and_used_again(
    run: Run, model: str, queries: str, tmp_path: Path
) -> None:
    command = ("pairs", model, "-q", queries, *QUICK, "--work-dir", "work", "--quiet")
    assert run(*command, "-o", "one.jsonl").exit_code == 0
    (store,) = (tmp_path / "work").glob("pairs-*.jsonl")
    stored = load_pairs(store)
    store.unlink()
    with PairStore(store) as marked:
        for pair in stored:
            marked.append(replace(pair, helpful=f"MARK {pair.helpful}"))
    assert run(*command, "-o", "two.jsonl").exit_code == 0
    assert all(pair.helpful.startswith("MARK ") for pair in load_pairs(tmp_path / "two.jsonl"))


def test_shipped_and_piped_queries_are_understood(run: Run, model: str, tmp_path: Path) -> None:
    lines = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:2]
    piped = run("pairs", model, "-q", "-", "-o", "pairs.jsonl", *QUICK, stdin="\n".join(lines))
    assert piped.exit_code == 0
    assert [pair.query for pair in load_pairs(tmp_path / "pairs.jsonl")] == lines


def test_several_samples_follow_each_other(run: Run, model: str, tmp_path: Path) -> None:
    lines = demo.FIT_QUERIES.read_text(encoding="utf-8").splitlines()[:2]
    command = ("pairs", model, "-q", "-", "-o", "pairs.jsonl", *QUICK, "--samples", "3")
    assert run(*command, stdin="\n".join(lines)).exit_code == 0
    pairs = load_pairs(tmp_path / "pairs.jsonl")
    assert [(pair.query, pair.sample) for pair in pairs] == [(q, n) for q in lines for n in range(3)]


def test_export_finds_the_pairs_in_the_same_work_directory(
    run: Run, model: str, few_queries: str, tmp_path: Path
) -> None:
    # Templates with further aspects: those decide nothing about the pairs.
    own = demo.TEMPLATES.read_text(encoding="utf-8")
    personas = own[own.index("[helpful]") :].replace("[helpful]", "[aspects.order.helpful]")
    personas = personas.replace("[harmful]", "[aspects.order.harmful]")
    (tmp_path / "two.toml").write_text(f"{own}\n{personas}", encoding="utf-8")
    shared = (*QUICK, "--work-dir", "work", "--templates", "two.toml", "--quiet")
    assert run("pairs", model, "-q", few_queries, "-o", "pairs.jsonl", *shared).exit_code == 0
    paper = ("--recipe", "paper", "--method", "mean", "--threshold", "0")
    assert run("export", model, "-q", few_queries, "-o", "c.gguf", *paper, *shared).exit_code == 0
    assert len(list((tmp_path / "work").glob("pairs-*"))) == 1
