"""After the pages are rendered: maths is set by the KaTeX in this folder instead of the one on a CDN, and no theme fetches its font, so the site needs no
network to be read. Links from a name in the text lead to the page here. And what the renderer leaves out for readers who use a keyboard or a screen reader is added."""
import os
import re
from pathlib import Path

CHANGES = {
    '.css': {r'@import url\(["\']?https://fonts\.googleapis\.com[^)]*\);?': ''},
    '.html': {
        r'https://cdn\.jsdelivr\.net/npm/katex@[^/"]+/dist': 'site/katex',
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

OUTPUT = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
PAGES = {re.sub(r'^\d+[a-z]?_', '', path.name): path.name for path in OUTPUT.glob('*.html')}  # nbdev names pages without their number

for path in OUTPUT.rglob('*'):
    if path.suffix not in CHANGES: continue
    text = found = path.read_text(encoding='utf-8')
    for pattern, change in CHANGES[path.suffix].items(): text = re.sub(pattern, change, text)
    text = re.sub(r'https://fishnet-nb\.github\.io/fishnet_nb/(\w+\.html)', lambda link: PAGES.get(link[1], link[0]), text)
    if text != found: path.write_text(text, encoding='utf-8')
