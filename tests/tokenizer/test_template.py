"""Templates render as transformers renders them; hostile ones end soon and with one line."""

import os
import subprocess
import sys
import time

import pytest

from greenroom.errors import ChatTemplateError
from greenroom.tokenizer.template import TemplateRenderer, TemplateTypeError, shared_renderer

from .templates import CONVERSATIONS, TEMPLATES, TOOLS


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_equal_to_transformers(name: str, conversation: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for tools in (None, TOOLS):
        for prompt in (True, False):
            messages = CONVERSATIONS[conversation]
            reference, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                **tokens,
            )
            variables = {
                **tokens,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": prompt,
            }
            assert shared_renderer().render(TEMPLATES[name], variables) == reference[0]


def test_contract() -> None:
    render = shared_renderer().render
    assert render("{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}", {}) == "1\n"
    assert render("{{ d | tojson }}", {"d": {"é": "<&'>"}}) == '{"é": "<&\'>"}'
    assert render("{{ d | tojson(indent=1, sort_keys=true) }}", {"d": {"b": 1, "a": 2}}) == (
        '{\n "a": 2,\n "b": 1\n}'
    )
    loop = "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}"
    assert render(loop + "{% endif %}{{ i }}{% endfor %}", {}) == "013"
    assert render("{% generation %}a{{ x }}{% endgeneration %}b", {"x": 1}) == "a1b"
    assert render("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}", {}) == "2"
    assert render("{{ dict(a=1).a }}{{ missing }}", {}) == "1"
    assert render("{{ strftime_now('%Y') | length }}", {}) == "4"
    assert render("{{ x }}", {"x": "\ud800é\x00"}) == "\ud800é\x00"


@pytest.fixture(scope="module")
def impatient() -> TemplateRenderer:
    return TemplateRenderer(seconds=1.0, memory=512 << 20)


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": "{{ 'a' * 10 ** 12 }}",
    "doubling": "{% set n = namespace(x='aaaa') %}"
    "{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide": "{{ '%99999999999d' % 1 }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].name }}",
    "init": "{{ namespace.__init__.__globals__ }}",
    "attr": "{{ '' | attr('__class__') | attr('mro') }}{{ (''|attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ x.append(1) }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(name: str, impatient: TemplateRenderer) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        impatient.render(HOSTILE[name], {"x": []})
    assert "\n" not in str(caught.value)
    assert impatient.render("{{ 1 + 1 }}", {}) == "2", "the next request is served"


def test_time_and_memory_are_named(impatient: TemplateRenderer) -> None:
    with pytest.raises(ChatTemplateError, match=r"longer than 1 s"):
        impatient.render(HOSTILE["loops"], {})
    with pytest.raises(ChatTemplateError, match="more than 512 MiB"):
        impatient.render(HOSTILE["product"], {})


def test_what_is_wrong_is_said() -> None:
    render = shared_renderer().render
    with pytest.raises(ChatTemplateError, match="refuses these messages: no system role"):
        render("{{ raise_exception('no system\nrole') }}", {})
    with pytest.raises(ChatTemplateError, match=r"syntax error: .*line 2"):
        render("a\n{% if %}", {})
    with pytest.raises(TemplateTypeError):
        render("{{ 'a' + 1 }}", {})
    with pytest.raises(ChatTemplateError, match="cannot be given"):
        render("a", {"x": object()})


def test_the_worker_is_kept_and_replaced() -> None:
    renderer = TemplateRenderer()
    renderer.render("a", {})
    process = renderer._process
    renderer.render("b", {})
    assert renderer._process is process
    assert process is not None
    process.kill()
    process.wait()
    assert renderer.render("c", {}) == "c"
    renderer.close()


def test_a_worker_ends_with_its_parent() -> None:
    code = (
        "from greenroom.tokenizer.template import TemplateRenderer as R; r = R();"
        "r.render('a', {}); print(r._process.pid); import os; os._exit(0)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for _ in range(1500):
        try:
            os.kill(int(out.stdout), 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{int(out.stdout)}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.02)
    pytest.fail("the worker outlived its parent")
