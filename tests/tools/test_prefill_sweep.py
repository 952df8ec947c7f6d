"""tools/prefill_sweep.py without a GPU: its arguments, its clock, and that what it watches is
there."""

from tool import tool

from greenroom import LLM
from greenroom.commands import main
from greenroom.experts.ring import Ring
from greenroom.experts.stream import GroupMlp, LayerStream

sweep = tool("prefill_sweep")


def test_arguments() -> None:
    args = sweep.parsed(["m.gguf", "--prompts", "512", "--operations", "0", "own", "--slots"])
    assert args.prompts == [512]
    assert args.operations == ["0", "own"]
    assert args.slots
    assert args.vram == ["4GiB", "6GiB"]


def test_a_prompt_is_timed(tmp_path) -> None:
    path = tmp_path / "m.gguf"
    assert main(["synth", "gpt-oss-20b-tiny", str(path), "--layers", "1"]) == 0
    with LLM(path, threads=1, context_length=64, prefix_cache=False) as llm:
        before = llm.engine.stats()
        assert 0 < sweep.seconds_of(llm, 40, seed=1) < 60
        assert llm.engine.stats() != before


def test_what_was_watched_is_as_before() -> None:
    kept = Ring.fetch, GroupMlp.__call__, LayerStream._serve, LayerStream._send
    with sweep.watching() as watch:
        assert Ring.fetch is not kept[0]
        LayerStream._send = watch.lends(lambda stream, step, hidden, lent: len(lent))
        assert LayerStream._send(None, None, None, [3, 4]) == 2
    assert (Ring.fetch, GroupMlp.__call__, LayerStream._serve, LayerStream._send) == kept
    assert watch.lent == [2]
    assert watch.periods() == 0
