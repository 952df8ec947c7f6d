"""Outputs split into reasoning, content and tool calls, however the text is cut."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenroom.tokenizer import ChatDelta, ChatFormat, OutputParser

from .templates import TEMPLATES, TOOLS
from .vocabularies import bpe_tokenizer

MISTRAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
DEEPSEEK = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
]
TOKENIZERS = {
    "qwen": bpe_tokenizer(user_defined=["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "mistral": bpe_tokenizer(control=[*MISTRAL, "[THINK]", "[/THINK]"]),
    "deepseek": bpe_tokenizer(control=[], user_defined=["<think>", "</think>", *DEEPSEEK]),
    "phi": bpe_tokenizer(control=["<|tool_call|>", "<|/tool_call|>", "<|end|>"]),
    "llama": bpe_tokenizer(control=["<|python_tag|>", "<|eot_id|>"]),
    "plain": bpe_tokenizer(control=()),
}
TEMPLATE = {"phi": "functools {{ messages[0].content }}"}
CALL = ("get_weather", {"city": "Röm"})
JSON_CALL = json.dumps({"name": CALL[0], "arguments": CALL[1]}, ensure_ascii=False)
PARAMETERS = JSON_CALL.replace("arguments", "parameters")

Result = tuple[str, str, list[tuple[str, object]]]


def collect(deltas: list[ChatDelta]) -> Result:
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.kind == "tool_call":
            if delta.name is not None:
                calls.append((delta.name, ""))
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    reasoning = "".join(d.text for d in deltas if d.kind == "reasoning")
    content = "".join(d.text for d in deltas if d.kind == "content")
    return reasoning, content, [(name, json.loads(text)) for name, text in calls]


def form(family: str) -> ChatFormat:
    metadata = {"tokenizer.chat_template": TEMPLATE.get(family, "{{ messages[0].content }}")}
    return ChatFormat.from_metadata(metadata, TOKENIZERS[family])


def parse(family: str, output: str, skip: bool, thinking: bool = False) -> Result:
    """By tokens, with or without the text of control tokens."""
    tokenizer = TOKENIZERS[family]
    prompt = tokenizer.encode("<think>\n", parse_special=True) if thinking else []
    parser = form(family).parser(prompt, TOOLS)
    stream = tokenizer.stream(skip_special=skip)
    deltas: list[ChatDelta] = []
    for token in tokenizer.encode(output, parse_special=True):
        deltas += parser.push(token, stream.push(token))
    return collect(deltas + parser.finish())


ONE = [CALL]
CASES = [
    ("plain", "Hello <b> {world} [1]", ("", "Hello <b> {world} [1]", [])),
    ("plain", '{"answer": 1}', ("", '{"answer": 1}', [])),
    ("plain", PARAMETERS, ("", "", ONE)),
    ("plain", f"[{JSON_CALL}]", ("", "", ONE)),
    ("plain", '{"name": "unknown_tool"}', ("", '{"name": "unknown_tool"}', [])),
    ("plain", " padded \n", ("", " padded \n", [])),
    ("qwen", "<think>\nhm\n</think>\n\nyes", ("hm", "yes", [])),
    ("qwen", "<think>\n\n</think>\n\nyes", ("", "yes", [])),
    ("qwen", "<think>cut off", ("cut off", "", [])),
    ("qwen", "I write <think> in text", ("", "I write <think> in text", [])),
    ("qwen", f"<tool_call>\n{JSON_CALL}\n</tool_call>", ("", "", ONE)),
    ("qwen", f"So:\n\n<tool_call>{JSON_CALL}</tool_call>\nok", ("", "So:ok", ONE)),
    ("qwen", f"<tool_call>{JSON_CALL}</tool_call>\n" * 2, ("", "", ONE * 2)),
    ("qwen", f"<think>a</think><tool_call>{JSON_CALL}", ("a", "", ONE)),
    ("qwen", "<tool_call>{bad</tool_call>", ("", "<tool_call>{bad</tool_call>", [])),
    ("qwen", "<tool_call>{bad", ("", "<tool_call>{bad", [])),
    (
        "qwen",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRöm\n</parameter>\n"
        "</function>\n</tool_call>",
        ("", "", ONE),
    ),
    (
        "qwen",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Röm</arg_value>\n</tool_call>",
        ("", "", ONE),
    ),
    ("qwen", "<tool_call>get_weather\n</tool_call>", ("", "", [("get_weather", {})])),
    ("qwen", "<tool_call>word</tool_call>", ("", "<tool_call>word</tool_call>", [])),
    ("mistral", f"[TOOL_CALLS][{JSON_CALL}]", ("", "", ONE)),
    ("mistral", f"[TOOL_CALLS] [{JSON_CALL},{JSON_CALL}]", ("", "", ONE * 2)),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Röm"}', ("", "", ONE)),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]{"city": "Röm"}' * 2, ("", "", ONE * 2)),
    ("mistral", "[THINK]hm[/THINK]yes [1]", ("hm", "yes [1]", [])),
    (
        "deepseek",
        "ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Röm"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ("", "ok", ONE),
    ),
    (
        "deepseek",
        "<think>x</think><｜tool▁calls▁begin｜>"
        + '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Röm"}<｜tool▁call▁end｜>' * 2,
        ("x", "", ONE * 2),
    ),
    ("phi", f"<|tool_call|>[{JSON_CALL}]<|/tool_call|>", ("", "", ONE)),
    ("phi", f" functools[{JSON_CALL}]", ("", "", ONE)),
    ("phi", "functools[1] is a list", ("", "functools[1] is a list", [])),
    ("phi", "see functools[x]", ("", "see functools[x]", [])),
    ("llama", PARAMETERS, ("", "", ONE)),
    ("llama", f"{PARAMETERS}; {PARAMETERS}", ("", "", ONE * 2)),
    ("llama", f"<|python_tag|>{PARAMETERS}", ("", "", ONE)),
    ("llama", "<|python_tag|>print(1)", ("", "<|python_tag|>print(1)", [])),
]


@pytest.mark.parametrize(("family", "output", "expected"), CASES)
@pytest.mark.parametrize("skip", [True, False])
def test_outputs(family: str, output: str, expected: Result, skip: bool) -> None:
    assert parse(family, output, skip) == expected


@pytest.mark.parametrize(("family", "output", "expected"), CASES)
def test_any_cut_gives_the_same(family: str, output: str, expected: Result) -> None:
    draw = random.Random(0)
    for _ in range(20):
        parser = form(family).parser([], TOOLS)
        deltas, rest = [], output
        while rest:
            length = draw.randint(1, 12)
            deltas += parser.push(-1, rest[:length])
            rest = rest[length:]
        assert collect(deltas + parser.finish()) == expected


def test_reasoning_opened_by_the_prompt() -> None:
    assert parse("qwen", "hm</think>yes", True, thinking=True) == ("hm", "yes", [])
    assert parse("qwen", "hm, no end", True, thinking=True) == ("hm, no end", "", [])
    opening = TEMPLATES["chatml"].replace("assistant\n' }}", "assistant\n<think>\n' }}")
    chat = ChatFormat.from_metadata({"tokenizer.chat_template": opening}, TOKENIZERS["qwen"])
    prompt = chat.render([{"role": "user", "content": "x"}])
    for parser in (chat.parser(), chat.parser(prompt)):
        assert [d.kind for d in parser.push(-1, "hm") + parser.push(-1, "</think>yes")] == [
            "reasoning",
            "content",
        ]


def test_text_streams_while_no_mark_is_near() -> None:
    parser = form("qwen").parser([], TOOLS)
    assert [d.text for d in parser.push(-1, "Hello wor")] == ["Hello wor"]
    assert parser.push(-1, " <tool") == []
    assert [d.text for d in parser.push(-1, "box>")] == [" <toolbox>"]


def test_no_tools_asked_no_calls_looked_for() -> None:
    text = f"<tool_call>{JSON_CALL}</tool_call>"
    parser = form("qwen").parser([], [])
    assert collect(parser.push(-1, text) + parser.finish()) == ("", text, [])
    parser = form("qwen").parser([])
    assert collect(parser.push(-1, text) + parser.finish())[2] == ONE


def test_values_follow_the_schema() -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {"properties": {"s": {"type": "string"}, "n": {"type": "number"}}},
            },
        }
    ]
    parser = form("qwen").parser([], tools)
    body = "<function=f><parameter=s>1</parameter><parameter=n>1</parameter></function>"
    deltas = parser.push(-1, f"<tool_call>{body}</tool_call>") + parser.finish()
    assert collect(deltas)[2] == [("f", {"s": "1", "n": 1})]


WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "{", "}", "a", " ", "\n", "<", "b c"]


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=12))
def test_nothing_but_marks_and_space_is_lost(words: list[str]) -> None:
    parser: OutputParser = form("qwen").parser([], TOOLS)
    deltas = [d for word in words for d in parser.push(-1, word)] + parser.finish()
    got = "".join(d.text for d in deltas)

    def letters(text: str) -> str:
        for mark in WORDS[:2]:
            text = text.replace(mark, "")
        return "".join(text.split())

    assert letters(got) == letters("".join(words))
