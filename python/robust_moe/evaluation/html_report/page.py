"""The report's style sheet and Jinja template. Everything filled in is escaped, except figures, which are SVG."""

__all__ = ["PAGE"]

STYLE = """
{% for theme in (0, 1) %}
{% if theme %}@media screen and (prefers-color-scheme: dark) {
{% endif %}
:root {
  {% for name, colors in palette.items() %}--{{ name }}: {{ colors[theme] }}; {% endfor %}

  --page: {{ "#11161c" if theme else "#ffffff" }}; --card: {{ "#1a212a" if theme else "#f7f9fb" }};
  --alarm: {{ "#ff9b91" if theme else "#a61b12" }}; --alarm-page: {{ "#3a1614" if theme else "#fdecea" }};
  --good: {{ "#7ddba3" if theme else "#1c6b3c" }}; --link: {{ "#7cc0ff" if theme else "#1a5fb4" }};
}
{% if theme %}}
{% endif %}
{% endfor %}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .35rem 0 .85rem; max-width: 46rem; }
a { color: var(--link); }
code { font: .875em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere;
  background: var(--card); padding: .1em .35em; border-radius: .25rem; }
section { margin-top: 2.25rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.muted, figcaption, caption { color: var(--muted); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; margin: 1.25rem 0 0; padding: 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem 1rem; }
.cards dt { font-size: .875rem; color: var(--muted); }
.cards dd { margin: 0; font-size: .875rem; }
.cards dd:first-of-type { font-size: 1.9rem; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere; }
.cards .clean dd:first-of-type { color: var(--run0); }
.cards .robust dd:first-of-type { color: var(--run1); }
.alarm { margin: 1.25rem 0 0; padding: .8rem 1rem; border: 2px solid var(--alarm); border-left-width: .5rem;
  border-radius: .4rem; background: var(--alarm-page); }
.alarm strong { color: var(--alarm); }
.alarm ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 .25rem; }
caption { text-align: left; padding: 0 0 .4rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem 1.1rem .38rem 0; border-bottom: 1px solid var(--line); }
thead th { white-space: normal !important;
  font-size: .82rem; font-weight: 600; color: var(--muted); vertical-align: bottom; line-height: 1.3; }
tbody th { font-weight: 600; overflow-wrap: break-word; min-width: 7rem; max-width: 30rem; }
.number { text-align: right; white-space: nowrap; }
td.word { white-space: nowrap; }
td.words { min-width: 14rem; overflow-wrap: anywhere; }
tr.raised th, tr.raised td { background: var(--alarm-page); color: var(--alarm); font-weight: 600; }
tr.passed td:nth-of-type(1) { color: var(--good); }
figure { margin: .75rem 0 0; }
figcaption { font-size: .9rem; max-width: 46rem; margin-top: .35rem; }
svg { display: block; max-width: 100%; height: auto; font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(18.5rem, 1fr)); gap: 1rem; padding: 0;
  list-style: none; }
.examples figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .75rem; }
.examples .row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.examples img { width: 100%; height: auto; display: block; border-radius: .2rem; }
.examples img.pixels { image-rendering: pixelated; }
details { margin-top: .6rem; }
summary { cursor: pointer; color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media (max-width: 40rem) {
  td.word { white-space: normal; }
  td.words, tbody th { min-width: 0; }
  /* a row of many columns becomes a block of lines, each with its column's name */
  table.wide thead { position: absolute; display: block; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  table.wide, .wide caption, .wide tbody, .wide tr, .wide tbody th { display: block; }
  .wide tbody tr { padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .wide tbody th { border: 0; padding: 0; }
  .wide td, .wide td.number { display: flex; gap: 1rem; justify-content: space-between; text-align: right; border: 0;
    padding: .1rem 0; white-space: normal; }
  .wide td::before { content: attr(data-column); color: var(--muted); text-align: left; flex: none; max-width: 55%; }
}
@media (max-width: 40rem) { body { padding: 1rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
  .cards dd:first-of-type { font-size: 1.5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav, .examples figure { break-inside: avoid; }
  nav { display: none; } section { border: 0; margin-top: 1rem; padding-top: .5rem; } .scroll { overflow: visible; }
  svg { min-width: 0 !important; } figure, tr, .alarm, .cards div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; } details::details-content { content-visibility: visible; block-size: auto; } }
"""

MACROS = """
{% macro cell(it) %}{% if it.value is none %}{{ it.text }}{% else %}<data value="{{ it.value }}">{{ it.text }}</data>
{%- endif %}{% endmacro %}
{% macro table_of(it) %}
<div class="scroll" tabindex="0" role="group" aria-label="{{ it.caption }}">
<table{% if it.columns | length > 3 %} class="wide"{% endif %}><caption>{{ it.caption }}</caption>
<thead><tr>{% for name in it.columns %}<th scope="col" class="{{ it.look(loop.index0) }}">
{{- name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in it.rows %}
<tr{% if it.marks %} class="{{ it.marks[loop.index0] }}"{% endif %}><th scope="row">{{ cell(row[0]) }}</th>
{%- for entry in row[1:] %}<td class="{{ it.look(loop.index) }}" data-column="{{ it.columns[loop.index] }}">
{{- cell(entry) }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro figure_of(it) %}
<figure><div class="scroll" tabindex="0" role="group" aria-label="{{ it.caption }}">{{ it.svg | safe }}</div>
<figcaption>{{ it.caption }}</figcaption></figure>
{% endmacro %}
{% macro examples_of(it) %}
<ul class="examples">
{% for example in it.pictures %}
<li><figure><div class="row">
{% for image in example.images %}
<img src="{{ image.source }}" alt="{{ image.alt }}"{% if image.small %} class="pixels"{% endif %}>
{% endfor %}
</div><figcaption>{{ example.caption }}</figcaption></figure></li>
{% endfor %}
</ul>
{% endmacro %}
{% macro blocks_of(blocks) %}
{% for it in blocks %}
{% if it.kind == "table" %}{{ table_of(it) }}
{% elif it.kind == "figure" %}{{ figure_of(it) }}
{% elif it.kind == "examples" %}{{ examples_of(it) }}
{% elif it.kind == "heading" %}<h3>{{ it.text }}</h3>
{% elif it.kind == "folded" %}<details><summary>{{ it.summary }}</summary>{{ blocks_of(it.blocks) }}</details>
{% else %}<p>{{ it.text }}</p>
{% endif %}
{% endfor %}
{% endmacro %}
"""

PAGE = (
    MACROS
    + """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="muted">{{ subtitle }}</p>
{% if raised %}
<div class="alarm" role="note" aria-label="raised sanity flags"><strong>⚠ {{ raised | length }} sanity
{{ "flag" if raised | length == 1 else "flags" }} raised: do not trust these numbers before this is explained.</strong>
<ul>{% for flag in raised %}<li><strong>{{ flag.name }}</strong>: {{ flag.message }}</li>{% endfor %}</ul></div>
{% endif %}
<dl class="cards">
{% for card in cards %}
<div class="{{ card.look }}"><dt>{{ card.name }}</dt><dd>{{ cell(card.number) }}</dd>
{% for note in card.notes %}<dd class="muted">{{ note }}</dd>{% endfor %}</div>
{% endfor %}
</dl>
<nav aria-label="sections"><ul>
{% for section in sections %}<li><a href="#{{ section.slug }}">{{ section.title }}</a></li>{% endfor %}

{% if missing %}<li><a href="#missing">Not in this report</a></li>{% endif %}
</ul></nav>
</header>
<main>
{% for section in sections %}
<section id="{{ section.slug }}" aria-labelledby="{{ section.slug }}-title">
<h2 id="{{ section.slug }}-title">{{ section.title }}</h2>
{{ blocks_of(section.blocks) }}
</section>
{% endfor %}
{% if missing %}
<section id="missing" aria-labelledby="missing-title">
<h2 id="missing-title">Not in this report</h2>
<ul>
{% for it in missing %}
<li>{{ it.what }}{% if it.command %} <code>{{ it.command }}</code> gives it.{% endif %}</li>
{% endfor %}
</ul>
</section>
{% endif %}
</main>
</body>
</html>
"""
)
