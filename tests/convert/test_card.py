"""Model cards: metadata the hub's library reads, figures with their source, nothing invented."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from greenroom.commands import main
from greenroom.convert.card_text import citation

from ..models.cases import CASES

EVAL = {
    "kind": "eval",
    "version": "9.9",
    "text": {"file": "sea.txt", "positions": 77},
    "machine": {"processor": "Abacus 3000"},
    "reference": None,
    "placements": [{"name": "here", "perplexity": 12.34567}],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return CASES["qwen3moe"].make_wide(gain=1.0).write(tmp_path / "model.gguf", "Q8_0")


def written(model: Path, *arguments: str) -> str:
    out = model.parent / "README.md"
    assert main(["card", str(model), "--out", str(out), *arguments]) == 0
    return out.read_text()


def test_figures_come_with_their_source(model: Path) -> None:
    folder = model.parent / "results"
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps(EVAL))
    text = written(
        model, "--results", str(folder), "--license", "mit", "--base-model", "someone/tiny"
    )
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/tiny"
    assert "mixture-of-experts" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 12.34567)
    assert result.dataset_name == "sea.txt"
    assert "Abacus 3000" in text
    assert "Source: `quality.json`" in text
    assert "2505.09388" in text
    assert len(text.splitlines()) >= 200


def test_what_was_not_measured_is_left_out(model: Path) -> None:
    text = written(model)
    for word in ("## Quality", "## Speed", "perplexity", "tokens/s", "license:", "base_model:"):
        assert word not in text
    assert ModelCard(text).data.eval_results is None


def test_the_sum_is_the_files(model: Path) -> None:
    import hashlib

    assert f"{hashlib.sha256(model.read_bytes()).hexdigest()}  model.gguf" in written(model)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_what_is_no_result_is_named(
    model: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.parent / "results"
    folder.mkdir()
    (folder / "bad.json").write_text(content)
    assert main(["card", str(model), "--results", str(folder)]) == 1
    assert "bad.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "name", "cited"),
    [
        ("granitemoe", "granite-3.0-1b-a400m", "granite-3.0-language-models"),
        ("llama", "Mixtral-8x7B-Instruct-v0.1", "2401.04088"),
        ("phimoe", "GRIN-MoE", "2409.12136"),
        ("phimoe", "Phi-3.5-MoE-instruct", "2404.14219"),
        ("deepseek", "SmolLM2-135M MoE", "2502.02737"),
        ("deepseek", "deepseek-moe-16b-base", "2401.06066"),
    ],
)
def test_the_original_authors_are_cited(architecture: str, name: str, cited: str) -> None:
    found = citation(architecture, name)
    assert found is not None
    assert cited in found


def test_nobody_is_cited_by_guess() -> None:
    assert citation("llama", "somebody's model") is None


BENCH = {
    "kind": "bench",
    "version": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "command": "greenroom bench model.gguf",
    "machine": {"processor": {"name": "Abacus 3000"}, "versions": {"greenroom": "9.9"}},
    "results": {
        "greenroom": {
            "threads": 2,
            "peak_rss": 3 << 30,
            "peak_vram": 0,
            "cases": {
                "1 x 8+4": {
                    name: {"median": median, "iqr": 0.5}
                    for name, median in (("prefill", 12.34), ("first_token", 1.5), ("decode", 7.89))
                }
            },
        }
    },
}
PLAN = {
    "kind": "plan",
    "version": 1,
    "plan": {},
    "sweep": [
        {"vram": 1 << 30, "memory": {"vram": 1 << 29, "ram": 5 << 30}, "experts_in_vram": 0.25}
    ],
}


def test_speed_and_memory_are_tables_with_machine_and_command(model: Path) -> None:
    folder = model.parent / "results"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(BENCH))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    text = written(model, "--results", str(folder))
    assert "| greenroom | 1 x 8+4 | 12.34 (0.5) | 1.5 (0.5) | 7.89 (0.5) |" in text
    assert "| greenroom | 2 | 3.00 | 0.00 |" in text
    assert "| 1.00 | 0.50 | 5.00 | 25 % |" in text
    assert "Greenroom 9.9, 2026-01-02T03:04:05+00:00, `greenroom bench model.gguf`" in text
    assert "Greenroom 1" not in text  # the version of a document is not the program's
    assert "Abacus 3000" in text


def test_a_document_of_another_form_is_listed(model: Path) -> None:
    folder = model.parent / "results"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps({"kind": "bench", "results": [1, 2.5]}))
    assert "| `results` | 1, 2.5 |" in written(model, "--results", str(folder))
