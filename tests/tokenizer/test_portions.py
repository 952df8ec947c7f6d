"""Long texts handled in portions are what they would be at once."""

import pytest

from greenroom.tokenizer import portions, template
from greenroom.tokenizer.template import TemplateRenderer

TEXTS = ["", "a", "aé", "é☃𝄞" * 5, "ab\ud800c", "x" * 12 + "𝄞", "<|end|>" * 3]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 14])
def test_portions(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(portions, "PORTION", size)
    monkeypatch.setattr(portions, "_SEARCHED", size)
    for text in TEXTS:
        parts = list(portions.portions(text))
        assert "".join(parts) == text
        assert all(len(part) <= size for part in parts)
        data = portions.encoded(text)
        assert data == text.encode("utf-8", "surrogatepass")
        assert portions.decoded(data) == text
        for what in ("a", "☃", "<|end|>", "d|><", "none"):
            for begin in (0, 1, 5):
                assert portions.find(text, what, begin) == text.find(what, begin)


def test_long_texts_travel_to_a_template_as_bytes() -> None:
    long = "é☃𝄞" * portions.PORTION
    value = {long: [long, {"a": (long, 1, None)}], "short": "é"}
    sent = template._plain(value)
    data = long.encode()
    assert sent == {data: [data, {"a": [data, 1, None]}], "short": "é"}
    renderer = TemplateRenderer()
    written = "{{ value.short }}{% for k in value %}{{ k }}{{ value[k][1].a[0] }}{% endfor %}"
    try:
        del value["short"]
        assert renderer.render(written, {"value": value}) == long * 2
    finally:
        renderer.close()
