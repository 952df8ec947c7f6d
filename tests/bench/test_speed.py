"""The speed benchmark on engines whose times are known, and on a tiny model."""

import json
from types import SimpleNamespace as Ns

import pytest

from greenroom.bench import speed, speed_report
from greenroom.bench.workloads import Case, Run, prompts, run_case, timed
from greenroom.commands import main


class Fake:
    """An engine that takes `first` seconds to the first token and `step` for each other."""

    def __init__(self, first: float, step: float) -> None:
        self.first, self.step, self.now = first, step, 100.0
        self.engine = Ns(model_config=Ns(vocabulary_size=50))

    def generate(self, asked, params):
        times = [self.now + self.first + i * self.step for i in range(params.max_tokens)]
        self.now = times[-1]
        return [Ns(outputs=[Ns(time=t) for t in times]) for _ in asked]

    def run(self, case, seed):
        return run_case(self, case, seed, lambda: self.now)

    def facts(self):
        return {
            "load_seconds": {"cold": 4.0, "warm": 2.0}, "memory": {"dense.vram": 1 << 30},
            "peak_rss": int(2**30 / self.step), "peak_vram": 0, "peak_vram_torch": 0,
            "experts": {"hits": 3, "misses": 1}, "threads": 2, "backend": "native",
        }  # fmt: skip


def test_known_times_are_reported_exactly() -> None:
    run = run_case(Fake(2.0, 0.25), Case(64, 1, 5), 0, lambda: 100.0)
    assert run.first == (2.0,)
    assert (run.prefill, run.decode, run.gaps) == (32.0, 4.0, (0.25,) * 4)


def test_a_batch_decodes_only_while_all_do() -> None:
    # The second starts at 3 and the first ends at 5: (3, 5] holds 2 + 2 tokens in 2 seconds.
    run = timed(Case(10, 2, 5), 0.0, [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7]])
    assert run.first == (1.0, 3.0)
    assert run.prefill == pytest.approx(20 / 3)
    assert run.decode == 2.0
    assert run.gaps == (1.0,) * 4


def test_a_single_token_has_no_decode_rate() -> None:
    assert timed(Case(10, 1, 1), 0.0, [[2.0]]).decode is None


def test_prompts_differ_by_seed_and_stay_inside_the_vocabulary() -> None:
    a, b = (prompts(Case(30, 2, 1), 50, seed) for seed in (1, 2))
    assert a != b
    assert [len(row) for row in a] == [30, 30]
    assert max(map(max, a)) < 50


def test_cases() -> None:
    found = speed.cases([512, 128], [1, 4], 8)
    assert found == (Case(128, 1, 8), Case(512, 1, 8), Case(128, 4, 8))


def test_the_document_compares_with_the_baseline() -> None:
    sessions = {"greenroom": Fake(2.0, 0.5), "baseline": Fake(1.0, 0.25)}
    schedule = speed.Schedule((Case(64, 1, 5),), 5)
    found = speed.measure(sessions, schedule)
    assert [len(runs) for of in found.values() for runs in of.values()] == [5, 5]
    model = {"file": "m.gguf", "name": "M", "architecture": "x", "bytes": 1, "header": ""}
    document = json.loads(json.dumps(speed.document(model, None, schedule, sessions, found)))
    case = document["results"]["greenroom"]["cases"]["1 x 64+5"]
    assert case["decode"]["median"] == 2.0
    assert case["decode"]["iqr"] == 0
    assert case["first_token"]["median"] == 2.0
    assert case["between_tokens"]["p99"] == 0.5
    assert case["curves"] == {"first_token": [2.0] * 101, "between_tokens": [0.5] * 101}
    assert document["baseline"]["speed"]["1 x 64+5"]["decode"] == {
        "value": 0.5, "low": 0.5, "high": 0.5,
    }  # fmt: skip
    assert document["baseline"]["saved"] == {"peak_rss": 0.5}
    document["against"] = {
        "greenroom": {"prompt": 30.0, "generation": 6.0},
        "llama.cpp": {"prompt": 20.0, "generation": 4.0},
    }
    text = speed_report.markdown(document)
    assert "llama.cpp: prompt 20.0, generation 4.0 tokens/s; ours are 1.50 and 1.50 times" in text
    assert "| 2.0 (0.0) |" in text
    assert "75.0%" in text
    assert "decode at 0.50 times" in text


def test_energy_is_per_token() -> None:
    run = Run((1.0,), 1.0, 1.0, (1.0,), joules=12.0)
    assert speed.summary(Case(1, 2, 3), [run])["joules_per_token"]["median"] == 2.0


def test_bench_measures_a_model(tmp_path, capsys) -> None:
    path = tmp_path / "tiny.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path), "--layers", "2"]) == 0
    capsys.readouterr()
    call = ["bench", str(path), "--lengths", "16", "--batches", "1,2", "--generate", "4"]
    report = tmp_path / "report"
    more = ["--runs", "2", "--no-ceilings", "--baseline", "--report", str(report)]
    assert main([*call, *more]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["kind"], document["version"]) == ("bench", 1)
    ours = document["results"]["greenroom"]
    assert set(ours["cases"]) == {"1 x 16+4", "2 x 16+4"}
    assert ours["load_seconds"].keys() == {"cold", "warm"}
    assert ours["peak_rss"] > 50 << 20
    assert document["baseline"]["speed"]["1 x 16+4"]["decode"]["value"] > 0
    assert json.loads((report / "report.json").read_text()) == document
    assert "## Speed" in (report / "report.md").read_text()
    for plot in ("speed.png", "latency.png"):
        assert (report / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [(["--lengths", "x"], "--lengths must be"), (["--against", "vllm"], "knows llama.cpp")],
)
def test_a_wrong_call_is_one_line(tmp_path, capsys, wrong, complaint) -> None:
    assert main(["bench", str(tmp_path / "none.gguf"), *wrong]) == 1
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
