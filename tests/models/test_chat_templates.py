"""Chat templates out of models' files: what would not end or take gigabytes is refused, by counting."""

import json
import time
import tracemalloc

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from dora_mm.models.chat_templates import BoundedEnvironment

GROWN = "{% set n = namespace(a='aaaaaaaa') %}{% for i in range(40) %}BODY{% endfor %}{{ n.a }}"
NESTED = "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
WIDE = "{% set n.a = n.a + ['😀' * (4000000 - i)] %}"  # of four bytes each
HOSTILE = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "characters": "{% set s = 'a' * 4000000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(90000) %}{% for b in range(100) %}" + "x" * 5000 + "{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "product": "{{ 'a' * 3000000000 }}",
    "list": "{{ [[1]] * 3000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "sums": GROWN.replace("BODY", "{% set n.a = n.a + n.a %}"),
    "joins": GROWN.replace("BODY", "{% set n.a = n.a ~ n.a %}"),
    "blocks": GROWN.replace("BODY", "{% set x %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = x %}"),
    "lists in lists": NESTED + "{{ n.a }}",
    "tojson": NESTED + "{{ n.a | tojson }}",
    "indented": "{{ {'a': 1} | tojson(indent=90000) }}",
    "%": "{{ '%2000000000d' % 1 }}",
    "*": "{{ '%*d' % (2000000000, 1) }}",
    "format": "{{ '{:2000000000}'.format(1) }}",
    "filter": "{{ 'a' | center(3000000000) }}",
    "method": "{{ 'a'.center(3000000000) }}",
    "join": "{{ ('b' * 90000).join('a' * 90000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "batch": "{{ [1] | batch(90000000, 'x') | list }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "indent": r"{{ ('\n' * 1000000) | indent(100000) }}",
    "title": "{% set s = 'ab ' * 2000 %}{% for i in range(90000) %}{% set x = s | title %}{% endfor %}",
    "title of texts": "{% set s = 'ab ' * 2000 %}{% for i in range(90000) %}{% set x = s.title() %}{% endfor %}",
    "urls": "{% set s = '<a ' * 2000 %}{% for i in range(90000) %}{% set x = s | urlize %}{% endfor %}",
    "sorted": "{% set s = ('ab ' * 30000).split() %}{% for i in range(90000) %}{% set x = s | sort %}{% endfor %}",
    "kept in a list": "{% set n = namespace(a=[]) %}{% for i in range(250) %}" + WIDE + "{% endfor %}",
    "kept as blocks": "{% set s = '😀' * 4000000 %}{% set n = namespace(a=[]) %}{% for i in range(250) %}"
    "{% set x %}{{ s }}{% endset %}{% set n.a = n.a + [x] %}{% endfor %}",
    "kept as slices": "{% set s = '😀' * 4000000 %}{% set n = namespace(a=[]) %}{% for i in range(250) %}"
    "{% set n.a = n.a + [s[i:]] %}{% endfor %}",
    "kept, small": "{% set n = namespace(a=[]) %}{% for i in range(30) %}{% set n.a = n.a + ["
    "range(90000) | map('string') | map('center', 900) | list] %}{% endfor %}",
    "written": "{% set s = '😀' * 4000000 %}{% for i in range(250) %}{{ s }}{% endfor %}",
    "compared": "{% set s = 'a' * 4000000 %}{% set t = s + 'b' %}{% set u = s + 'c' %}"
    "{% for a in range(90000) %}{% for b in range(90) %}{% if t == u %}{% endif %}{% endfor %}{% endfor %}",
    "looked for": "{% set s = 'a' * 4000000 %}"
    "{% for a in range(90000) %}{% for b in range(90) %}{% if 'b' in s %}{% endif %}{% endfor %}{% endfor %}",
    "compared lists": NESTED + NESTED.replace("n.a", "m.a").replace("n =", "m =") + "{% if n.a == m.a %}{% endif %}",
    "hashed": NESTED.replace("[n.a, n.a]", "(n.a, n.a)").replace("[1]", "1") + "{% set d = {n.a: 1} %}",
    "hashed item": NESTED.replace("[n.a, n.a]", "(n.a, n.a)").replace("[1]", "1") + "{{ {}[n.a] }}",
    "hashed method": NESTED.replace("[n.a, n.a]", "(n.a, n.a)").replace("[1]", "1") + "{{ {}.get(n.a) }}",
    "searched list": NESTED + NESTED.replace("n.a", "m.a").replace("n =", "m =") + "{{ [n.a].count(m.a) }}",
    "unique": NESTED.replace("[n.a, n.a]", "(n.a, n.a)").replace("[1]", "1") + "{{ [n.a] | unique | list | length }}",
    "map": "{{ range(100000) | map('string') | map('center', 90000) | list | length }}",
}
ENDLESS = ("loops", "calls")
KEPT = ("kept in a list", "kept as blocks", "kept as slices", "written")
SLOW = ("title", "title of texts", "urls", "sorted", "compared", "looked for")


def rendered(template: str, **values) -> str:
    """As transformers renders it."""
    return chat_template_utils._compile_jinja_template(template).render(**values)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in (*ENDLESS, *KEPT, "kept, small", *SLOW)])
def test_what_takes_gigabytes_is_refused_before_it_is_made(name, monkeypatch):
    monkeypatch.setattr("dora_mm.models.chat_templates.MOST_TOTAL", 2**27)
    with pytest.raises(Exception, match="the bounds of a chat template"):
        rendered(HOSTILE[name])


@pytest.mark.parametrize("name", [*KEPT, pytest.param("kept, small", marks=pytest.mark.slow)])
def test_the_memory_of_what_is_kept_or_written_is_bounded(name, monkeypatch):
    """Texts of four bytes a character: within the bounds of characters they took 2 GB."""
    monkeypatch.setattr("dora_mm.models.chat_templates.MOST_KEPT", 2**26)
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match="the bounds of a chat template: it (keeps|writes) .* bytes, of at most"):
            rendered(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SLOW)
def test_slow_filters_and_comparisons_are_counted_by_the_length_of_what_they_read(name):
    start = time.perf_counter()
    with pytest.raises(Exception, match="the bounds of a chat template: it takes too many steps"):
        rendered(HOSTILE[name])
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_refused(name, monkeypatch):
    monkeypatch.setattr("dora_mm.models.chat_templates.MOST_STEPS", 100_000)
    with pytest.raises(Exception, match="the bounds of a chat template"):
        rendered(HOSTILE[name])


CHAT = """{%- set ns = namespace(first=true, text='') -%}
{%- for m in messages if m.role != 'system' -%}
{%- if loop.first or not loop.last %}{{ loop.index }}/{{ loop.length }}{% endif -%}
{%- macro shown(x) %}<{{ x | trim | replace('\\n', ' ') }}>{% endmacro -%}
{%- set ns.text = ns.text ~ m.role ~ ': ' + shown(m.content) -%}
{%- for c in (m.content.split(' ') | map('upper') | list)[:2] %}{{ '%5s|' % c }}{% endfor -%}
{{- m | tojson(indent=2) }}{{ 3 * 4 + 2 ** 5 }}{{ 'ab' * 2 }}{{ '{:>4}'.format(m.role[0]) }}
{%- endfor -%}{{ ns.text }}{% for k, v in {'a': [1, 2]} | dictsort recursive %}{{ k }}{{ v }}{% endfor %}
{%- for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}"""


def test_templates_render_as_they_did():
    """Every kind of what is counted, in transformers' environment with and without the bounds."""
    messages = [{"role": "system", "content": "Be kind."}]
    messages += [{"role": ("user", "assistant")[n % 2], "content": f"Turn {n}\nof some"} for n in range(6)]
    bounded = rendered(CHAT, messages=messages)
    assert chat_template_utils.ImmutableSandboxedEnvironment is BoundedEnvironment
    chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment
    try:
        plain = chat_template_utils._cached_compile_jinja_template(CHAT).render(messages=messages)
    finally:
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    assert bounded == plain
    assert json.dumps(messages[1]["content"]) in plain


def test_long_conversations_are_within_the_bounds():
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 100} for n in range(1000)]
    start = time.perf_counter()
    assert rendered(CHAT, messages=messages).count("WORD|") == 2000
    assert time.perf_counter() - start < 20
