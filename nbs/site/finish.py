"""After the pages are rendered: maths is set by the KaTeX in this folder instead of the one on a CDN, and no theme fetches its font, so the site needs no
network to be read. Links from a name in the text lead to the page here. A NamedTuple shows its fields instead of *args, **kwargs, and a picture of double
resolution is shown at its own size. And what the renderer leaves out for readers who use a keyboard or a screen reader is added."""
import ast
import base64
import html
import os
import re
import struct
from pathlib import Path

CHANGES = {
    '.css': {r'@import url\(["\']?https://fonts\.googleapis\.com[^)]*\);?': ''},
    '.html': {
        r'https://cdn\.jsdelivr\.net/npm/katex@[^/"]+/dist': 'site/katex',
        r'(class="footnote-ref"><a [^>]*>\[\d+):\d+': r'\1',  # a note that is cited again keeps its number
        r'\[`([^`\]]+)`\]\([^)\s]+\)': r'\1',  # a link that nbdev made within code
        r'<(pre|table|span(?= class="math display"))(?=[ >])': r'<\1 tabindex="0"',  # they may scroll, so the keyboard has to reach them
        r'(<i class="bi bi-github") role="img"': r'\1 aria-hidden="true"',
        r'(<a href="https://github\.com/([^"]+\.ipynb)"[^>]*class="toc-action"[^>]*>.*?</a>)':
            r'\1 <a href="https://colab.research.google.com/github/\2" class="toc-action">Open in Colab</a>',
        r'role="navigation" (?=aria-expanded)': 'role="button" ',  # what opens a section of the sidebar
        r'<nav class="navbar': '<nav aria-label="site" class="navbar',
        r'<nav class="quarto-secondary-nav': '<nav aria-label="this page" class="quarto-secondary-nav',
        r'<nav id="quarto-sidebar"': '<nav id="quarto-sidebar" aria-label="all pages"',
        r'<nav id="TOC"': '<nav id="TOC" aria-label="on this page"',
        r'<nav class="page-navigation': '<nav aria-label="previous and next page" class="page-navigation',
        r'<div class="toc-actions"': '<div class="toc-actions" role="complementary" aria-label="source of this page"'},
}

def read_fields(folder: Path) -> dict[str, str]:
    "The fields of each NamedTuple in a package, one a line with its comment, as HTML."
    found = {}
    for path in folder.glob('*.py'):
        lines = (text := path.read_text(encoding='utf-8')).splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef) or not any(getattr(base, 'id', '') == 'NamedTuple' for base in node.bases): continue
            fields = [lines[field.lineno - 1].partition('  #') for field in node.body if isinstance(field, ast.AnnAssign)]
            found[node.name] = ''.join(f'{html.escape(code)}, <span class="co">#{html.escape(comment)}</span>\n' for code, _, comment in fields)
    return found

def set_width(image: re.Match) -> str:
    "An embedded PNG with the width that its own resolution asks for, at 100 dots per inch; a picture of 100 or fewer stays as it is."
    head = base64.b64decode(image[2][:800])
    if (at := head.find(b'pHYs')) < 0: return image[0]
    (pixels,), (per_meter,) = struct.unpack('>I', head[16:20]), struct.unpack('>I', head[at + 4:at + 8])
    return f'<img width="{round(pixels*3937/per_meter)}"{image[1]}{image[2]}' if per_meter > 4000 else image[0]

FIELDS = read_fields(Path('../fishnet_nb'))
OUTPUT = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
PAGES = {re.sub(r'^\d+[a-z]?_', '', path.name): path.name for path in OUTPUT.glob('*.html')}  # nbdev names pages without their number

for path in OUTPUT.rglob('*'):
    if path.suffix not in CHANGES: continue
    text = found = path.read_text(encoding='utf-8')
    for pattern, change in CHANGES[path.suffix].items(): text = re.sub(pattern, change, text)
    text = re.sub(r'https://fishnet-nb\.github\.io/fishnet_nb/(\w+\.html)', lambda link: PAGES.get(link[1], link[0]), text)
    text = re.sub(r'(<span class="fu">(\w+)</span>\(\n) +<span class="op">\*</span>args, .*kwargs\n', lambda shown: shown[1] + FIELDS.get(shown[2], shown[0][len(shown[1]):]), text)
    text = re.sub(r'<img((?: alt="[^"]*")? src="data:image/png;base64,)([^"]+)', set_width, text)
    if text != found: path.write_text(text, encoding='utf-8')
