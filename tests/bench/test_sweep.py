"""Speed against VRAM: engines whose times and memory are known, and the command on a tiny model."""

import json
from types import SimpleNamespace as Ns

import pytest
import torch

from greenroom.bench import sweep
from greenroom.bench.workloads import Case
from greenroom.commands import main
from greenroom.engine import LLM, EngineConfig, SamplingParams
from greenroom.engine.load import load_engine
from greenroom.errors import BudgetError
from greenroom.experts.shelf import Shelf

GIB = 1 << 30


class Engine:
    """Two layers of four experts; a token takes a second, a quarter of that with slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.engine = Ns(
            model_config=Ns(vocabulary_size=9, layers=3, moe=Ns(experts=4, dense_layers=1)),
            placement=Ns(slots=slots),
            stats=lambda: {"experts": {"hits": 3, "misses": 1}} if slots else {"experts": None},
        )

    def generate(self, asked, params):
        step = 0.25 if self.slots else 1.0
        times = [1e9 + i * step for i in range(params.max_tokens)]
        return [Ns(outputs=[Ns(time=t) for t in times]) for _ in asked]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture(autouse=True)
def one_warm_run(monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_WARM_SECONDS", 1e-9)


def opened(budget):
    if budget == "1MiB":
        raise BudgetError("needs 2 GiB")
    slots = 6 if budget == "max" else 0
    return Engine(slots), lambda: sweep.Memory(8 * GIB if slots else 2 * GIB, GIB // 2)


def test_rates_are_compared_with_the_first_budget() -> None:
    points = list(sweep.measure(["max", "4GiB", "1GiB", "1MiB"], Case(4, 1, 5), 3, opened))
    whole, fits, over, refused = points
    assert whole.decode["median"] == 4.0
    assert (whole.resident, whole.hits, whole.nbytes) == (0.75, 0.75, None)
    assert fits.decode["median"] == 1.0
    assert (fits.resident, fits.hits) == (0.0, None)
    assert [sweep.within(p) for p in (whole, fits, over)] == [True, True, False]
    assert refused.refused == "needs 2 GiB"
    lines = sweep.rows(points)
    assert lines[0][-3:] == ("4.0 (0.0)", "100.0%", "0.0%")
    assert lines[1][-3:] == ("1.0 (0.0)", "25.0%", "75.0%")
    assert lines[2][1] == "2.00 (OVER)"
    assert "needs 2 GiB" in lines[3]


def test_the_command_writes_a_report(tmp_path, capsys) -> None:
    path, out = tmp_path / "m.gguf", tmp_path / "report"
    assert main(["synth", "gpt-oss-20b-tiny", str(path)]) == 0
    capsys.readouterr()
    call = ["sweep", str(path), "--vram", "max,0", "--runs", "2", "--generate", "4"]
    assert main([*call, "--context", "128", "--report", str(out)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    there = torch.cuda.is_available()  # without a GPU budgets would all be the same
    assert [p["budget"] for p in document["points"]] == (["max", "0"] if there else ["0"])
    assert ("the CPU alone is measured" in captured.err) is not there
    assert all(p["decode"]["runs"] == 2 for p in document["points"])
    saved = json.loads((out / "sweep.json").read_text())
    assert saved["points"] == document["points"]
    assert (out / "sweep.png").stat().st_size > 1000
    assert "100.0%" in (out / "sweep.md").read_text()


def test_a_budget_that_is_none_is_one_line(tmp_path, capsys) -> None:
    assert main(["sweep", str(tmp_path / "none.gguf"), "--vram", "much"]) == 1
    assert "size like 6GiB" in capsys.readouterr().err


def test_equal_placements_are_measured_once() -> None:
    asked = []

    def counted(budget):
        asked.append(budget)
        return opened(budget)

    places = {"max": "all", "16GiB": "all", "4GiB": "all", "2GiB": "some"}
    points = list(sweep.measure(places, Case(4, 1, 5), 2, counted, placed=places.get))
    assert asked == ["max", "4GiB", "2GiB"]  # 4 GiB cannot have what took 8
    assert [point.same for point in points] == [None, "max", None, None]
    assert points[1].decode == points[0].decode
    assert points[1].nbytes == 16 * GIB
    assert sweep.rows(points)[1][0] == "16 (as max)"


def on_shelf(path, shelf, threads):
    return LLM.from_engine(load_engine(path, EngineConfig(threads=threads), None, shelf))


def test_a_shelf_keeps_the_experts_of_one_file(tmp_path) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    for file in (path, other):
        assert main(["synth", "gpt-oss-20b-tiny", str(file)]) == 0
    shelf, prompt = Shelf(), [list(range(20))]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with on_shelf(path, shelf, 1) as llm:
        first, bank = llm.generate(prompt, params), llm.engine.model.blk[0].ffn.experts
        packed = sum(blk.ffn.experts.nbytes for blk in llm.engine.model.blk)
    assert shelf.nbytes == packed > 0
    with on_shelf(path, shelf, 2) as llm:
        again = llm.engine.model.blk[0].ffn.experts
        assert again is bank
        assert again.threads == 2
        assert llm.generate(prompt, params)[0].token_ids == first[0].token_ids
    with on_shelf(other, shelf, 1) as llm:
        assert llm.engine.model.blk[0].ffn.experts is not bank
